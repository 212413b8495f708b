"""Start: where the parameters of a model began, as numbers that any device can make again from a seed.

Each start value is a pure function of (seed, parameter name, index in the parameter). A hash on 64-bit integers makes
the random bits; what is done in floating point is exactly rounded, so every device, thread count and chunking agrees to
the bit.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from fxprune.errors import InitializeError
from fxprune.graph.trace import unwrap_model
from fxprune.graph.traced import START, is_traced
from fxprune.rewrite.kept import Kept, compose_kept
from fxprune.rewrite.param_map import ParamMap

GENERATOR = "splitmix64 1"  # the last number changes when any value does
KINDS = ("uniform", "normal", "constant")
FLUSH = 1e-10  # decayed values below are zero
WIDEST = 4.0  # no value is so many times the scale
CHUNK = 1 << 16  # values made at once on a CPU: their integers fit the cache
LANES = 0x0000FFFF0000FFFF
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True)
class Origin:
    """How one parameter began.

    Attributes:
        kind: "uniform" on (-scale, scale); "normal", a sum of four uniforms with standard deviation ``scale`` and no
            value beyond 3.47 of them; or "constant", all ``scale``.
        scale: of the kind; used as a float32.
        shape: of the parameter before any cut.
    """

    kind: str
    scale: float
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS or not math.isfinite(self.scale):
            raise InitializeError(
                f"a parameter can't start as {self.kind!r} {self.scale!r}: the kinds are {', '.join(map(repr, KINDS))},"
                " each with a finite number"
            )


@dataclass(frozen=True)
class Start:
    """Where every parameter of a model began.

    Attributes:
        seed: any integer.
        origins: by the name of the parameter.
        kept: of parameters that were cut, the original indices that stayed, by axis; None = all.
        factor: what all values have decayed to; below 1, those smaller than 1e-10 are zero.
    """

    seed: int
    origins: Mapping[str, Origin]
    kept: Mapping[str, Kept] = field(default_factory=dict)
    factor: float = 1.0

    def values(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """float32, in the shape that the parameter ``name`` has after the cuts so far: its start values."""
        shape = self.origins[name].shape
        kept = self.kept.get(name, (None,) * len(shape))
        axes = [
            torch.arange(size, device=device) if index is None else index.to(device)
            for size, index in zip(shape, kept, strict=True)
        ]
        first, *inner = axes or [torch.zeros(1, dtype=torch.int64, device=device)]
        row = torch.zeros(1, dtype=torch.int64, device=device)  # the positions of one row, made of those of each axis
        for size, index in zip(shape[1:], inner, strict=True):
            row = (row[:, None] * size + index).flatten()
        parts = torch.split(first, max(1, chunk_on(first.device) // max(1, len(row))))
        rows = [self.at(name, part[:, None] * math.prod(shape[1:]) + row).flatten() for part in parts]
        return torch.cat(rows).reshape(self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """That of the parameter ``name`` after the cuts so far."""
        shape = self.origins[name].shape
        kept = self.kept.get(name, (None,) * len(shape))
        return tuple(size if index is None else len(index) for size, index in zip(shape, kept, strict=True))

    def at(self, name: str, position: Tensor) -> Tensor:
        """float32, shaped like ``position``: the start values at these flat positions in the original parameter.

        Args:
            name: of the parameter.
            position: int64 of any shape.
        """
        origin = self.origins[name]
        position = position.contiguous()
        result = torch.zeros(position.shape, dtype=torch.float32, device=position.device)
        if abs(origin.scale) * WIDEST * self.factor < FLUSH:
            return result
        chunk, key = chunk_on(position.device), derive_key(self.seed, name)
        for part, out in zip(*(torch.split(tensor.view(-1), chunk) for tensor in (position, result)), strict=True):
            out.copy_(draw_numbers(origin, key, part))
        return result if self.factor == 1 else fade_numbers(result, self.factor)

    def decayed(self, factor: float) -> "Start":
        """The start with all values ``factor`` times those before any decay."""
        return replace(self, factor=factor)

    def after(self, param_map: ParamMap) -> "Start":
        """The start of what a cut leaves: a kept weight keeps the start value of its original index."""
        origins = {name: origin for name, origin in self.origins.items() if name not in param_map.gone}
        kept = {
            name: tuple(map(compose_kept, self.kept.get(name, (None,) * len(param_map[name])), param_map[name]))
            for name in origins
            if name in param_map
        }
        return replace(self, origins=origins, kept=kept)

    def fits(self, model: nn.Module) -> bool:
        """Whether ``model`` has these parameters, and all of them whole."""
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        return not self.kept and shapes == {name: origin.shape for name, origin in self.origins.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything but ``kept``, which follows from the plan."""
        origins = {name: [origin.kind, origin.scale, list(origin.shape)] for name, origin in self.origins.items()}
        return {"generator": GENERATOR, "seed": self.seed, "factor": self.factor, "origins": origins}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Undo ``to_json``.

        Raises:
            InitializeError: made by another generator.
        """
        if data["generator"] != GENERATOR:
            raise InitializeError(
                f"its start values are those of generator {data['generator']!r}; this version of fxprune has "
                f"{GENERATOR!r}. Use the version that wrote it."
            )
        origins = {name: Origin(kind, scale, tuple(shape)) for name, (kind, scale, shape) in data["origins"].items()}
        return cls(data["seed"], origins, factor=data["factor"])


def start_of(model: nn.Module) -> Start | None:
    """How ``model`` was initialised, if ``fxprune.initialize`` did it."""
    start: Start | None = notes_of(model).get(START)
    return start


def remember_start(model: nn.Module, start: Start) -> None:
    """Leave on ``model`` how it was initialised. Traces, copies and cuts of it take it along."""
    notes_of(model)[START] = start


def forget_start(model: nn.Module) -> None:
    """The opposite of ``remember``."""
    notes_of(model).pop(START, None)


def notes_of(model: nn.Module) -> dict[str, Any]:
    """Where such things stand: in what a traced model hands on to copies and cuts, or with the attributes."""
    core: Any = unwrap_model(model)
    notes: dict[str, Any] = core.meta if is_traced(core) else vars(core)
    return notes


# ------------------------------------------------------------------------------------------------------- the numbers


def draw_numbers(origin: Origin, key: int, counter: Tensor) -> Tensor:
    """float32[n]: the values with the numbers ``counter`` (int64[n]) in the stream of ``key``."""
    if origin.kind == "constant":
        return torch.full(counter.shape, as_float32(origin.scale), device=counter.device)
    random = mix_bits(key, counter)
    if origin.kind == "uniform":  # odd integers between -2^24 and 2^24, exact in float32
        return (2 * shift_bits(random, 40) + (1 - (1 << 24))).float() * as_float32(origin.scale * 2.0**-24)
    pairs = (random & LANES) + (shift_bits(random, 16) & LANES)  # two sums of 16-bit numbers, side by side
    four = (pairs + (pairs >> 32)) & 0x3FFFF
    return (four - 2 * 0xFFFF).float() * as_float32(origin.scale * math.sqrt(3 / (2.0**32 - 1)))


def fade_numbers(values: Tensor, factor: float) -> Tensor:
    """``values``, times ``factor`` in place; zero where little is left."""
    values.mul_(as_float32(factor))
    return values.masked_fill_(values.abs() < FLUSH, 0.0)


def chunk_on(device: torch.device) -> int:
    """How many values to make at once."""
    return CHUNK if device.type == "cpu" else 1 << 24


def derive_key(seed: int, name: str) -> int:
    """The stream of one parameter: an int64."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little", signed=True)


def mix_bits(key: int, counter: Tensor) -> Tensor:
    """int64[n], 64 random bits each: splitmix64 (Steele, Lea and Flood 2014; Stafford's mix 13), all modulo 2^64."""
    state = (counter * as_signed(GOLDEN)).add_(key)
    state.bitwise_xor_(shift_bits(state, 30)).mul_(as_signed(FIRST))
    state.bitwise_xor_(shift_bits(state, 27)).mul_(as_signed(SECOND))
    return state.bitwise_xor_(shift_bits(state, 31))


def shift_bits(bits: Tensor, by: int) -> Tensor:
    """``bits`` as unsigned integers, shifted to the right."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def as_signed(number: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return number - (1 << 64) if number >> 63 else number


def as_float32(number: float) -> float:
    """The float32 nearest to ``number``: a factor that every device multiplies by alike."""
    return torch.tensor(number, dtype=torch.float32).item()
