"""Magnitude: small weights matter little."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

from fxprune.budget.cost import Floats
from fxprune.budget.sums import Sums
from fxprune.channels.analysis import Analysis
from fxprune.errors import PlanError

from ..base import Criterion, normalize_scores, weights_of


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The p-norm of all weights of a channel, over every member of its group.

    For channel c: score(c) = (sum over weights w in the slices of c of |w|^p)^(1/p), divided by the mean of its group
    so that groups compare. Biases and norms' scales are left out. After Li et al., "Pruning Filters for Efficient
    ConvNets" (2017), on whole groups.

    Attributes:
        p: the exponent, positive.
    """

    p: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.p, Real) or not 0 < self.p < math.inf:
            raise PlanError(f"p={self.p!r} must be a positive number")

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group."""
        weights = {name: weight for name, weight in weights_of(analysis).items() if weight.ndim > 1}
        sums = Sums(analysis, weights, lambda w: w.square() if self.p == 2 else w.abs().pow(self.p))
        return {name: normalize_scores(sums(group) ** (1 / self.p)) for name, group in analysis.groups.items()}
