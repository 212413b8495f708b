"""Uniform: the same share of every group, the baseline of widths."""

from collections.abc import Mapping
from dataclasses import dataclass

from fxprune.budget.cost import Floats
from fxprune.channels.analysis import Analysis

from .allocator import Allocator, spread_evenly


@dataclass(frozen=True, kw_only=True)
class Uniform(Allocator):
    """Every group keeps the same share of its channels: a width multiplier that the budget sets.

    Groups of the same width keep exactly the same share, so that a model's config can say it, unless only unequal
    ones meet the budget; the log says so then. After Howard et al., "MobileNets" (2017), on whole groups.
    """

    scope: str = "local"

    def worth(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group."""
        return {name: spread_evenly(group.size) for name, group in analysis.groups.items()}
