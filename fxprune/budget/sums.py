"""Sums over the slices of channels: what every score and norm is made of."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from fxprune.budget.cost import Floats
from fxprune.channels.analysis import Analysis
from fxprune.channels.groups import Group


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
                for at, slices in sums.items():
                    slices.append(sum_slices(part, at))
            for at, slices in sums.items():
                self._reduced[name, at] = np.concatenate(slices) if at == 0 else np.sum(slices, axis=0)
        return self._reduced[name, axis]


def sum_slices(tensor: Tensor, axis: int) -> Floats:
    """float64[size]: the sum over all other axes, those before ``axis`` first, which runs along the memory."""
    if axis > 0:
        tensor = tensor.flatten(0, axis - 1).sum(0)
    if tensor.ndim > 1:
        tensor = tensor.flatten(1).sum(1)
    result: Floats = tensor.double().cpu().numpy()
    return result


def median_norms(analysis: Analysis) -> dict[str, float]:
    """The median, over the channels of each group, of the 2-norm of all weights in a channel's slices."""
    weights = {name: p.detach() for name, p in analysis.graph.named_parameters() if p.ndim > 1 and not p.is_meta}
    sums = Sums(analysis, weights, lambda weight: weight.float().square())
    return {name: float(np.median(np.sqrt(sums(group)))) for name, group in analysis.groups.items()}
