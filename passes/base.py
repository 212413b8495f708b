"""What a pass is.

A criterion scores channels, and plans from the scores and a budget. Passes are frozen dataclasses: their fields are
their options.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.budget import Bounds, Budget, patterns_of
from fxprune.channels.analysis import Analysis
from fxprune.channels.groups import Group
from fxprune.cost import Floats
from fxprune.errors import BudgetError, PlanError, require
from fxprune.param_map import ParamMap
from fxprune.plan import Plan
from fxprune.solve import solve


@dataclass(frozen=True, kw_only=True)
class Criterion(Bounds, ABC):
    """Scores channels; ``plan`` removes those of the lowest scores. Its options are those of ``Bounds``."""

    @abstractmethod
    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group that can be scored; the others stay whole."""

    def plan(self, analysis: Analysis, budget: Budget, *, keep: Sequence[str] = ()) -> Plan:
        """The plan that meets ``budget``.

        Args:
            analysis: of the model.
            budget: what may remain.
            keep: patterns of what stays whole, besides those of the pass.

        Raises:
            BudgetError: the budget is out of reach; names the nearest value. Or the model already meets it.
            PlanError: nothing can be pruned, or a pattern matches nothing.
        """
        require(analysis, Analysis, "analysis", PlanError)
        require(budget, Budget, "budget", BudgetError)
        bounds = Bounds(
            minimum=self.minimum,
            maximum=self.maximum,
            keep=(*patterns_of(self.keep), *patterns_of(keep)),
            round_to=self.round_to,
            scope=self.scope,
        )
        return solve(analysis, self.score(analysis), budget, bounds)

    def finish(self, graph: nn.Module, compact: nn.Module, param_map: ParamMap) -> None:
        """What a method does to ``compact`` after the cut from ``graph``: nothing, for most."""


def weights_of(analysis: Analysis) -> dict[str, Tensor]:
    """The parameters (not buffers) that some group lives on, by name, detached and in float32 at least."""
    parameters = dict(analysis.graph.named_parameters())
    members = dict.fromkeys(member.parameter for group in analysis.groups.values() for member in group.members)
    found = {name: detached(parameters[name]) for name in members if name in parameters}
    if any(parameter.is_meta for parameter in found.values()):
        raise PlanError(
            "the weights are on the meta device and have no values to score. Use passes.Random, or load them."
        )
    return found


class Sums:
    """Sums of an elementwise quantity over the slices of every channel.

    Each tensor is read once, in parts that fit the cache: writing out the quantity of a large weight takes longer.
    """

    PART = 1 << 18  # elements

    def __init__(
        self, analysis: Analysis, tensors: Mapping[str, Tensor], quantity: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """``tensors``: parameter name -> a tensor shaped like it, of whose elements ``quantity`` is summed."""
        self.tensors, self.quantity = tensors, quantity or torch.Tensor.detach
        self._axes: dict[str, set[int]] = {}
        for group in analysis.groups.values():
            for member in group.members:
                self._axes.setdefault(member.parameter, set()).add(member.axis)
        self._reduced: dict[tuple[str, int], Floats] = {}

    def __call__(self, group: Group) -> Floats:
        """float64[channels]: the sum over all members of the group."""
        total = np.zeros(group.size)
        for member in group.members:
            if member.parameter in self.tensors:
                along = self._along(member.parameter, member.axis)
                total += np.bincount(member.channel, along[member.index], minlength=group.size)
        return total

    def _along(self, name: str, axis: int) -> Floats:
        if (name, axis) not in self._reduced:
            tensor = self.tensors[name]
            parts = torch.split(tensor, max(1, self.PART * len(tensor) // max(1, tensor.numel())))
            sums = {at: list[Floats]() for at in self._axes.get(name, set()) | {axis}}
            for part in map(self.quantity, parts):
                for at, its in sums.items():
                    its.append(summed(part, at))
            for at, its in sums.items():
                self._reduced[name, at] = np.concatenate(its) if at == 0 else np.sum(its, axis=0)
        return self._reduced[name, axis]


def summed(tensor: Tensor, axis: int) -> Floats:
    """float64[size]: the sum over all other axes, those before ``axis`` first, which runs along the memory."""
    if axis > 0:
        tensor = tensor.flatten(0, axis - 1).sum(0)
    if tensor.ndim > 1:
        tensor = tensor.flatten(1).sum(1)
    result: Floats = tensor.double().cpu().numpy()
    return result


def normalized(scores: Floats) -> Floats:
    """Scores over their mean, so that groups compare; all equal where the mean is 0."""
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


def detached(tensor: Tensor) -> Tensor:
    """A tensor without its gradient history, in float32 at least."""
    value = tensor.detach()
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def input_axis(graph: nn.Module, parameter: str) -> int | None:
    """The axis along which a weight reads its layer's input, if it has one."""
    path, _, leaf = parameter.rpartition(".")
    module = graph.get_submodule(path)
    if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) or leaf != "weight":
        return None
    depthwise = getattr(module, "groups", 1) > 1 and module.weight.shape[1] == 1
    return None if depthwise else 0 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 1
