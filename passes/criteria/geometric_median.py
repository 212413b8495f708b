"""GeometricMedian: a channel that the others of its group can stand for matters little (FPGM)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fxprune.budget.cost import Floats
from fxprune.channels.analysis import Analysis
from fxprune.channels.groups import Group, Member

from ..base import Criterion, detach_weights, share_in_layers, weights_of


@dataclass(frozen=True)
class GeometricMedian(Criterion):
    """The sum of the Euclidean distances from a channel's weights to those of every other channel of its group.

    score(c) = sum over channels d of |W_c - W_d|, where W_c holds all weights in the slices of c, over every member of
    the group; shares and costs are as for ``Magnitude``. The channels nearest to the geometric median go first. Biases
    and norms are left out. After He et al., "Filter Pruning via Geometric Median" (2019), on whole groups.
    """

    per_cost: ClassVar[bool] = True
    scores_layers: ClassVar[bool] = False

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group that has weights."""
        weights = {name: weight for name, weight in weights_of(analysis).items() if weight.ndim > 1}
        scores = {}
        for name, group in analysis.groups.items():
            if any(member.parameter in weights for member in group.members):
                scores[name] = share_in_layers(analysis, group, sum_distances(group, weights))
        return scores


def sum_distances(group: Group, weights: Mapping[str, Tensor]) -> Floats:
    """float64[channels]: the sum of the distances to all others."""
    members = [member for member in group.members if member.parameter in weights]
    rows = [by_channel(member, detach_weights(weights[member.parameter]), group.size) for member in members]
    centred = [matrix - matrix.mean(0) for matrix in rows]  # distances stay, and are less lost in rounding
    products = torch.stack([matrix @ matrix.T for matrix in centred]).sum(0)  # of each pair of channels
    norms = products.diagonal()
    squares = norms[:, None] + norms - 2 * products
    result: Floats = squares.clamp_min(0).sqrt().sum(1, dtype=torch.float64).cpu().numpy()
    return result


def by_channel(member: Member, weight: Tensor, size: int) -> Tensor:
    """float[channels, weights of a channel]: the slices of a channel in a row; zeros where it has fewer."""
    order = np.argsort(member.channel, kind="stable")
    channel = member.channel[order]
    turn = np.arange(len(channel)) - np.searchsorted(channel, channel)  # the how-manieth slice of its channel
    slices = weight.movedim(member.axis, 0)[torch.from_numpy(member.index[order]).to(weight.device)].flatten(1)
    rows = slices.new_zeros((size, int(turn.max()) + 1, slices.shape[1]))
    rows[torch.from_numpy(channel), torch.from_numpy(turn)] = slices
    return rows.flatten(1)
