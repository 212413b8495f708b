"""Magnitude: small weights matter little."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

from torch import Tensor

from fxprune.budget.cost import Floats
from fxprune.budget.sums import Sums
from fxprune.channels.analysis import Analysis
from fxprune.errors import PlanError

from ..base import Criterion, detach_weights, share_in_layers, weights_of


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The weights of a channel, over every member of its group, as a share of the group's.

    For channel c: score(c) = layers * s(c) / (sum of s over the group), s(c) = sum over weights w in the slices of c of
    |w|^p: how much of how many layers goes with the channel. ``plan`` divides it by what the channel costs, in FLOPs or
    what else the budget limits. Biases and norms' scales are left out. After Li et al., "Pruning Filters for Efficient
    ConvNets" (2017), on whole groups.

    Attributes:
        p: the exponent, positive.
    """

    per_cost: ClassVar[bool] = True
    p: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.p, Real) or not 0 < self.p < math.inf:
            raise PlanError(f"p={self.p!r} must be a positive number")

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group."""
        weights = {name: weight for name, weight in weights_of(analysis).items() if weight.ndim > 1}
        sums = Sums(analysis, weights, self.take_power)
        return {name: share_in_layers(analysis, group, sums(group)) for name, group in analysis.groups.items()}

    def take_power(self, weights: Tensor) -> Tensor:
        """|w|^p of each weight, in float32 at least."""
        wide = detach_weights(weights)
        return wide.square() if self.p == 2 else wide.abs().pow(self.p)
