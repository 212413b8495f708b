"""The group lasso: norms of the channels of weights, summed, with a gradient that takes one pass over each weight."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.channels.groups import Member

from ._norms import EPSILON, at_least_float32


class Slices:
    """The channels of a group on one axis of a weight."""

    def __init__(self, weight: nn.Parameter, member: Member, group: str, size: int, reads: bool = False) -> None:
        self.weight, self.axis, self.group, self.size, self.reads = weight, member.axis, group, size, reads
        self.other_axes = [axis for axis in range(weight.ndim) if axis != member.axis]
        covers_axis = len(member.index) == weight.shape[member.axis]
        self.index = None if covers_axis else torch.from_numpy(member.index).to(weight.device)
        in_order = len(member.channel) == size and (member.channel == np.arange(size)).all()
        self.channel = None if in_order else torch.from_numpy(member.channel).to(weight.device)

    def norms(self, squares: Tensor, epsilon: float = EPSILON) -> Tensor:
        """float[channels]: sqrt(sum + epsilon) of each, from the squares of the weight."""
        sums = squares.sum(list(range(self.axis))) if self.axis else squares  # first what vectorizes
        sums = sums.flatten(1).sum(1) if sums.ndim > 1 else sums
        sums = sums if self.index is None else sums[self.index]
        if self.channel is not None:
            sums = sums.new_zeros(self.size).index_add(0, self.channel, sums)
        return (sums + epsilon).sqrt()

    def spread(self, values: Tensor, default: float = 0.0) -> Tensor:
        """``values``, one a channel, where the channels are on the axis; broadcasts against the weight."""
        values = values if self.channel is None else values[self.channel]
        if self.index is not None:
            spread_out = values.new_full((self.weight.shape[self.axis],), default)
            values = spread_out.index_copy(0, self.index, values)
        return values.reshape([-1 if axis == self.axis else 1 for axis in range(self.weight.ndim)])

    @torch.no_grad()
    def peak(self) -> Tensor:
        """float[channels]: the largest absolute weight of each."""
        peaks = self.weight.detach().abs().amax(self.other_axes)
        peaks = peaks if self.index is None else peaks[self.index]
        if self.channel is not None:
            peaks = peaks.new_zeros(self.size).scatter_reduce(0, self.channel, peaks, "amax")
        return peaks

    @torch.no_grad()
    def shrink(self, by: float) -> None:
        """Multiply each channel by max(0, 1 - by / norm)."""
        if by:
            factors = (1 - by / self.norms(at_least_float32(self.weight).square(), epsilon=0.0)).clamp(min=0)
            self.weight.mul_(self.spread(factors, default=1.0).to(self.weight.dtype))


def sum_norms(weights: Mapping[nn.Parameter, Sequence[Slices]]) -> Tensor:
    """P, a scalar: the sum of the norms of all channels of ``weights``."""
    result: Tensor = _Lasso.apply(list(weights.values()), *weights)
    return result


class _Lasso(torch.autograd.Function):
    """P, and its gradient w * sum over axes of 1 / norm: one pass over each weight, where autograd takes a dozen."""

    @staticmethod
    def forward(ctx: Any, slices: list[list[Slices]], *weights: Tensor) -> Tensor:
        """Sum the norms; they are kept for the gradient, and so are the weights."""
        norms = all_norms(slices, weights)
        ctx.slices = slices
        ctx.save_for_backward(*weights, *norms)
        return torch.stack([norm.sum() for norm in norms]).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of each weight, in its dtype."""
        weights, norms = ctx.saved_tensors[: len(ctx.slices)], ctx.saved_tensors[len(ctx.slices) :]
        if torch.is_grad_enabled():  # create_graph=True: as a function of the weights, to be differentiated again
            norms = all_norms(ctx.slices, weights)
        remaining = iter(norms)
        gradients: list[Tensor | None] = [None]
        for weight, axes in zip(weights, ctx.slices, strict=True):
            factor = sum(axis.spread(gradient / next(remaining)) for axis in axes)
            # In place where that saves memory as large as the weight.
            product = factor.mul_(weight) if factor.shape == weight.shape else weight * factor
            gradients.append(product.to(weight.dtype))
        return tuple(gradients)


def all_norms(slices: Sequence[Sequence[Slices]], weights: Sequence[Tensor]) -> list[Tensor]:
    """For each weight and each of its axes, the norms of the channels."""
    norms = []
    for weight, axes in zip(weights, slices, strict=True):
        squares = at_least_float32(weight).square()
        norms += [axis.norms(squares) for axis in axes]
        del squares  # the next ones take its memory: half the time
    return norms
