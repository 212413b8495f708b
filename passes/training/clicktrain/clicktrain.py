"""ClickTrain: in one training run, four of nine weights stay in each 3×3 kernel, and whole kernels go."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxprune.budget.budget import patterns_of
from fxprune.budget.solver import matches_pattern
from fxprune.errors import PlanError
from fxprune.graph.traced import Model
from fxprune.rewrite.param_map import ParamMap
from fxprune.training.passes import Memory, TrainingPass
from fxprune.training.session import Session

from ..prunetrain import at_least_float32, optimizers_of
from ._kernels import (
    Layer,
    Mask,
    cut_kernels,
    find_convolutions,
    find_shortcuts,
    first_convolution,
    norm_of_kernels,
)
from ._patterns import SHARES, check_pool, choose_patterns, dynamic_pool, least_patterns, static_pool


@dataclass(frozen=True)
class ClickTrain(TrainingPass):
    """Zhang et al., "ClickTrain" (ICS 2021), with the details of the authors' code.

    - Before epoch ``select``, plain training.
    - At its first step, from the gradient G of the task loss on that batch: in each layer the kernels go whose
      sum (W G)^2 is least, and each 3×3 kernel gets the pattern P of the pool with the largest sum (W G P)^2.
    - From then on the penalty is ``strength`` times the sum over all kernels of the norm of what their pattern will
      remove, plus that of the norms of the kernels that will go. What stays is not penalised.
    - From epoch ``hard``, all of that is zero: weights, gradients and the optimizer's state. The authors add mixup.

    Shapes stay as they are. The first convolution, depthwise kernels (which keep their kernel and get a pattern),
    1×1 convolutions in a shortcut, transposed convolutions and linear layers keep all kernels; kernels of another size
    than 3×3 have no pattern. ``passes.PatternConv`` makes the network faster where patterns are shared.

    Attributes:
        select: the epoch, from 0, at whose start patterns and kernels are chosen.
        hard: the epoch from which what was not chosen is zero.
        kernels: the fraction of each layer's kernels that go: a number; two, for the first layer and the last with
            those between in even steps; or numbers by patterns of names, {"layer1.*": 0.5}, where others keep all.
        pool: "static4" (the 2×2 corners), "static8", "static12": those of the authors. "dynamic": the most frequent
            choices if each kernel kept its four most important taps.
        patterns: how many a dynamic pool has.
        share: whether a pattern is for one kernel, "none"; or for all that read an "input_channel", or are in a
            "filter". Both give networks that ``passes.PatternConv`` can make faster.
        strength: the coefficient of the penalty.
        batches: batches from which (W G)^2 is averaged before the choice.
        keep: patterns of names of layers that stay whole.
    """

    select: int = 61
    hard: int = 141
    kernels: float | Sequence[float] | Mapping[str, float] = (0.55, 0.75)
    pool: str = "static4"
    patterns: int = 8
    share: str = "none"
    strength: float = 2.5e-4
    batches: int = 1
    keep: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, smallest in (("select", 0), ("hard", 1), ("batches", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise PlanError(f"{name}={value!r} must be an integer of at least {smallest}")
        if self.hard <= self.select:
            raise PlanError(f"hard={self.hard} must come after select={self.select}: the penalty works between them")
        if not (isinstance(self.strength, (int, float)) and 0 <= self.strength < math.inf):
            raise PlanError(f"strength={self.strength!r} must be a number that is not negative")
        if self.share not in SHARES:
            raise PlanError(f"share={self.share!r} is not known; use {', '.join(map(repr, SHARES))}")
        check_pool(self.pool, self.patterns)
        patterns_of(self.keep)
        fractions = self.kernels.values() if isinstance(self.kernels, Mapping) else self.kernels
        listed = list(fractions) if isinstance(fractions, Collection) else [fractions]
        between = all(isinstance(each, (int, float)) and 0 <= each < 1 for each in listed)
        if not between or (not isinstance(self.kernels, (Mapping, int, float)) and len(listed) != 2):
            raise PlanError(
                f"kernels={self.kernels!r} must be a fraction from 0 up to 1, two of them (first layer, last layer), "
                "or fractions by patterns of names"
            )

    # ------------------------------------------------------------------------------------------------------- hooks

    def prepare(self, session: Session, memory: Memory) -> None:
        """Find the layers.

        Raises:
            PlanError: there is none, or a pattern of names matches none.
        """
        if "layers" not in memory.saved:  # later, cuts may have left nothing that a pattern matches
            self._check(session.graph)
        layers = {layer.name: layer for layer in self._layers(session.graph)}
        memory.saved.setdefault("layers", len(layers))
        memory.derived |= {"layers": layers, "settled": False}
        if "removed" in memory.saved:
            self._mask(memory)

    def penalty(self, session: Session, memory: Memory, task: Tensor) -> Tensor | None:
        """The penalty on what will go, a scalar; None before ``select`` and from ``hard`` on."""
        if "masks" not in memory.derived or session.epoch >= self.hard or not self.strength:
            return None
        norms = [
            norm_of_kernels(mask.layer.weight, gone).sum()
            for mask in memory.derived["masks"]
            for gone in (mask.outside, mask.removed)
            if gone is not None
        ]
        return torch.stack(norms).sum() * self.strength if norms else None

    @torch.no_grad()
    def after_backward(self, session: Session, memory: Memory) -> None:
        """Choose, at the first steps of epoch ``select``; from ``hard`` on, no gradients for what is gone."""
        if session.epoch >= self.select and "masks" not in memory.derived:
            self._look(memory)
        if self._is_hard(session, memory):
            for mask in memory.derived["masks"]:
                if mask.layer.weight.grad is not None:
                    mask.layer.weight.grad.masked_fill_(mask.gone, 0.0)

    @torch.no_grad()
    def after_step(self, session: Session, memory: Memory) -> None:
        """From ``hard`` on, zero what is gone, and once the optimizer's state of it."""
        if not self._is_hard(session, memory):
            return
        for mask in memory.derived["masks"]:
            weight = mask.layer.weight
            weight.masked_fill_(mask.gone, 0.0)
            for optimizer in () if memory.derived["settled"] else optimizers_of(session):
                for value in optimizer.state.get(weight, {}).values():
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        value.masked_fill_(mask.gone, 0)
        memory.derived["settled"] = True

    def after_cut(self, session: Session, memory: Memory, param_map: ParamMap) -> None:
        """Cut what is known of each kernel as the weights were cut."""
        memory.derived.pop("masks", None)
        for kind in ("pattern", "removed", "importance"):
            its: dict[str, Tensor] = memory.saved.get(kind, {})
            memory.saved[kind] = {
                name: cut_kernels(param_map, name, tensor) for name, tensor in its.items() if name not in param_map.gone
            }
            if not its:
                del memory.saved[kind]

    def report(self, session: Session, memory: Memory) -> Mapping[str, float]:
        """How many times fewer weights the convolutions have, once that is chosen."""
        if "masks" not in memory.derived:
            return {}
        weights = sum(layer.weight.numel() for layer in find_convolutions(session.graph))
        gone = sum(int(mask.gone.sum()) for mask in memory.derived["masks"])
        return {"compression": weights / max(1, weights - gone)}

    # ------------------------------------------------------------------------------------------------------ within

    def _is_hard(self, session: Session, memory: Memory) -> bool:
        return session.epoch >= self.hard and "masks" in memory.derived

    def _check(self, model: Model) -> None:
        for pattern in (*patterns_of(self.keep), *(self.kernels if isinstance(self.kernels, Mapping) else ())):
            if not any(matches_pattern(layer.path, pattern) for layer in find_convolutions(model)):
                raise PlanError(f"{pattern!r} matches no convolution of this model; names are those of its state_dict")
        if not any(self._layers(model)):
            raise PlanError("ClickTrain finds no layer to prune: it needs convolutions with weights that train")

    def _layers(self, model: Model) -> Iterator["Layer"]:
        """The layers that are pruned, in the order of the model, each with the fraction of kernels that goes."""
        left = {first_convolution(model), *find_shortcuts(model)}
        kept = patterns_of(self.keep)
        pruned = [
            layer
            for layer in find_convolutions(model)
            if layer.path not in left
            and layer.weight.requires_grad
            and not any(matches_pattern(layer.path, p) for p in kept)
        ]
        for place, layer in enumerate(pruned):
            fraction = 0.0 if layer.depthwise else self._fraction(layer.path, place / max(1, len(pruned) - 1))
            if fraction or layer.three:
                yield replace(layer, fraction=fraction)

    def _fraction(self, path: str, depth: float) -> float:
        """The fraction of kernels that goes from the layer at ``path``, ``depth`` from 0 (first) to 1 (last)."""
        if isinstance(self.kernels, Mapping):
            return next((float(its) for pattern, its in self.kernels.items() if matches_pattern(path, pattern)), 0.0)
        if isinstance(self.kernels, (int, float)):
            return float(self.kernels)
        first, last = self.kernels
        return first + (last - first) * depth

    def _look(self, memory: Memory) -> None:
        """Add this batch's (W G)^2 to what is known; choose when that is enough."""
        layers: dict[str, Layer] = memory.derived["layers"]
        gradients = {name: layer.weight.grad for name, layer in layers.items() if layer.weight.grad is not None}
        if not gradients or not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
            return  # mixed precision skips this step too
        sums: dict[str, Tensor] = memory.saved.setdefault("importance", {})
        for name, gradient in gradients.items():
            importance = (at_least_float32(layers[name].weight.detach()) * at_least_float32(gradient)).square()
            sums[name] = sums[name].to(importance.device) + importance if name in sums else importance
        memory.saved["looked"] = memory.saved.get("looked", 0) + 1
        if memory.saved["looked"] >= self.batches:
            self._choose(memory, memory.saved.pop("importance"))

    def _choose(self, memory: Memory, importance: Mapping[str, Tensor]) -> None:
        """Give kernels their patterns, and say which go."""
        layers: dict[str, Layer] = {n: layer for n, layer in memory.derived["layers"].items() if n in importance}
        three = {name: importance[name] for name, layer in layers.items() if layer.three}
        pool = static_pool(self.pool) if self.pool != "dynamic" else dynamic_pool(list(three.values()), self.patterns)
        memory.saved |= {
            "pool": pool,
            "pattern": {
                name: choose_patterns(its, pool, self.share, layers[name].groups) for name, its in three.items()
            },
            "removed": {name: least_patterns(importance[name], layer.fraction) for name, layer in layers.items()},
        }
        self._mask(memory)

    def _mask(self, memory: Memory) -> None:
        """Derive the masks of what goes."""
        layers, saved = memory.derived["layers"], memory.saved
        memory.derived["masks"] = [
            Mask(layers[name], saved["pool"], saved["pattern"].get(name), removed)
            for name, removed in saved["removed"].items()
            if name in layers
        ]
