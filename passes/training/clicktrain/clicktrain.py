"""ClickTrain: in one training run, four of nine weights stay in each 3×3 kernel, and whole kernels go."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxprune.budget.budget import patterns_of
from fxprune.budget.solver import matches_pattern
from fxprune.errors import PlanError
from fxprune.graph.traced import Model
from fxprune.options import Rule, allow_count, allow_number, allow_words, check_options, is_integer, is_real
from fxprune.rewrite.param_map import ParamMap
from fxprune.training.memory import derived_field
from fxprune.training.run import Run, TrainingPass

from .._norms import at_least_float32
from ._kernels import (
    KernelLayer,
    Mask,
    cut_kernels,
    find_convolutions,
    find_shortcuts,
    first_convolution,
    norm_of_kernels,
)
from ._patterns import POOLS, SHARES, choose_patterns, dynamic_pool, least_patterns, static_pool


@dataclass
class Kernels:
    """What ClickTrain remembers.

    Attributes:
        layers: how many layers are pruned.
        looked: batches whose importance is known.
        importance: of each layer's taps, float[out, in, h, w], summed over those batches; None once that was enough.
        pool: bool[patterns, 3, 3], once it is chosen.
        pattern: of each kernel of a layer, uint8[out, in], by place in the pool.
        removed: whether each kernel of a layer goes, bool[out, in].
        convolutions: the layers by the names of their weights.
        masks: what goes from each layer; None before it is chosen.
        settled: whether the optimizer's state of what is gone is zero.
    """

    layers: int
    looked: int = 0
    importance: dict[str, Tensor] | None = None
    pool: Tensor | None = None
    pattern: dict[str, Tensor] | None = None
    removed: dict[str, Tensor] | None = None
    convolutions: dict[str, KernelLayer] = derived_field(dict)
    masks: list[Mask] | None = derived_field(lambda: None)
    settled: bool = derived_field(lambda: False)


@dataclass(frozen=True)
class ClickTrain(TrainingPass[Kernels]):
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

    zeroes_weights: ClassVar[bool] = True

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
        check_options(
            self,
            PlanError,
            select=allow_count(least=0),
            hard=allow_count(),
            pool=allow_words(*POOLS, "dynamic"),
            patterns=Rule(
                lambda value: is_integer(value) and 1 <= value <= 126,
                "must be a count from 1 to 126: there are so many of four taps",
            ),
            share=allow_words(*SHARES),
            strength=allow_number(least=0, below=math.inf),
            batches=allow_count(),
            kernels=Rule(
                is_kernels,
                "must be a fraction from 0 up to 1, two of them (first layer, last layer), or fractions by patterns of "
                "names",
            ),
        )
        if self.hard <= self.select:
            raise PlanError(f"hard={self.hard} must come after select={self.select}: the penalty works between them")
        patterns_of(self.keep)

    # ------------------------------------------------------------------------------------------------------- hooks

    def begin(self, run: Run) -> Kernels:
        """Count the layers.

        Raises:
            PlanError: there is none, or a pattern of names matches none.
        """
        self._check(run.graph)
        return Kernels(layers=sum(1 for _ in self._layers(run.graph)))

    def prepare(self, run: Run, memory: Kernels) -> None:
        """Find the layers."""
        memory.convolutions = {layer.name: layer for layer in self._layers(run.graph)}
        self._mask(memory)

    def penalty(self, run: Run, memory: Kernels, task: Tensor) -> Tensor | None:
        """The penalty on what will go, a scalar; None before ``select`` and from ``hard`` on."""
        if memory.masks is None or run.epoch >= self.hard or not self.strength:
            return None
        norms = [
            norm_of_kernels(mask.layer.weight, gone).sum()
            for mask in memory.masks
            for gone in (mask.outside, mask.removed)
            if gone is not None
        ]
        return torch.stack(norms).sum() * self.strength if norms else None

    @torch.no_grad()
    def after_backward(self, run: Run, memory: Kernels) -> None:
        """Choose, at the first steps of epoch ``select``; from ``hard`` on, no gradients for what is gone."""
        if run.epoch >= self.select and memory.masks is None:
            self._look(memory)
        for mask in self._hard_masks(run, memory):
            if mask.layer.weight.grad is not None:
                mask.layer.weight.grad.masked_fill_(mask.gone, 0.0)

    @torch.no_grad()
    def after_step(self, run: Run, memory: Kernels) -> None:
        """From ``hard`` on, zero what is gone, and once the optimizer's state of it."""
        masks = self._hard_masks(run, memory)
        optimizers = [] if memory.settled or not masks else run.optimizers()
        for mask in masks:
            weight = mask.layer.weight
            weight.masked_fill_(mask.gone, 0.0)
            for optimizer in optimizers:
                for value in optimizer.state.get(weight, {}).values():
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        value.masked_fill_(mask.gone, 0)
        memory.settled = memory.settled or bool(masks)

    def after_cut(self, run: Run, memory: Kernels, param_map: ParamMap) -> None:
        """Cut what is known of each kernel as the weights were cut."""

        def cut(known: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
            if known is None:
                return None
            stays = {name: tensor for name, tensor in known.items() if name not in param_map.gone}
            return {name: cut_kernels(param_map, name, tensor) for name, tensor in stays.items()}

        memory.importance, memory.pattern = cut(memory.importance), cut(memory.pattern)
        memory.removed = cut(memory.removed)

    def report(self, run: Run, memory: Kernels) -> Mapping[str, float]:
        """How many times fewer weights the convolutions have, once that is chosen."""
        if memory.masks is None:
            return {}
        weights = sum(layer.weight.numel() for layer in find_convolutions(run.graph))
        gone = sum(int(mask.gone.sum()) for mask in memory.masks)
        return {"compression": weights / max(1, weights - gone)}

    # ------------------------------------------------------------------------------------------------------ within

    def _hard_masks(self, run: Run, memory: Kernels) -> list[Mask]:
        """What is zero now: nothing before ``hard``."""
        return (memory.masks or []) if run.epoch >= self.hard else []

    def _check(self, model: Model) -> None:
        for pattern in (*patterns_of(self.keep), *(self.kernels if isinstance(self.kernels, Mapping) else ())):
            if not any(matches_pattern(layer.path, pattern) for layer in find_convolutions(model)):
                raise PlanError(f"{pattern!r} matches no convolution of this model; names are those of its state_dict")
        if not any(self._layers(model)):
            raise PlanError("ClickTrain finds no layer to prune: it needs convolutions with weights that train")

    def _layers(self, model: Model) -> Iterator[KernelLayer]:
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
            return next(
                (float(share) for pattern, share in self.kernels.items() if matches_pattern(path, pattern)), 0.0
            )
        if isinstance(self.kernels, (int, float)):
            return float(self.kernels)
        first, last = self.kernels
        return first + (last - first) * depth

    def _look(self, memory: Kernels) -> None:
        """Add this batch's (W G)^2 to what is known; choose when that is enough."""
        weights = {name: layer.weight for name, layer in memory.convolutions.items()}
        gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        if not gradients or not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
            return  # mixed precision skips this step too
        sums = dict(memory.importance or {})
        for name, gradient in gradients.items():
            importance = (at_least_float32(weights[name].detach()) * at_least_float32(gradient)).square()
            sums[name] = sums[name].to(importance.device) + importance if name in sums else importance
        memory.importance = sums
        memory.looked += 1
        if memory.looked >= self.batches:
            memory.importance = None
            self._choose(memory, sums)

    def _choose(self, memory: Kernels, importance: Mapping[str, Tensor]) -> None:
        """Give kernels their patterns, and say which go."""
        layers = {name: layer for name, layer in memory.convolutions.items() if name in importance}
        three = {name: importance[name] for name, layer in layers.items() if layer.three}
        pool = static_pool(self.pool) if self.pool != "dynamic" else dynamic_pool(list(three.values()), self.patterns)
        memory.pool = pool
        memory.pattern = {
            name: choose_patterns(taps, pool, self.share, layers[name].groups) for name, taps in three.items()
        }
        memory.removed = {name: least_patterns(importance[name], layer.fraction) for name, layer in layers.items()}
        self._mask(memory)

    def _mask(self, memory: Kernels) -> None:
        """Derive the masks of what goes, once that is chosen."""
        if memory.pool is None or memory.pattern is None or memory.removed is None:
            return
        memory.masks = [
            Mask(memory.convolutions[name], memory.pool, memory.pattern.get(name), removed)
            for name, removed in memory.removed.items()
            if name in memory.convolutions
        ]


def is_kernels(value: Any) -> bool:
    """Whether ``value`` is a fraction below 1, two of them, or some by patterns of names."""
    fractions = value.values() if isinstance(value, Mapping) else value if isinstance(value, Collection) else [value]
    if not all(is_real(fraction) and 0 <= fraction < 1 for fraction in fractions):
        return False
    return isinstance(value, Mapping) or is_real(value) or len(list(fractions)) == 2
