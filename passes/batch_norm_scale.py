"""BatchNormScale: what batch norm scales down matters little."""

from collections.abc import Mapping
from dataclasses import dataclass

from fxprune.channels.analysis import Analysis
from fxprune.cost import Floats
from fxprune.sums import Sums

from .base import Criterion, weights_of


@dataclass(frozen=True)
class BatchNormScale(Criterion):
    """The mean absolute scale |gamma| of the batch norms that a channel goes through.

    Groups without a batch norm stay whole. Scores are compared across groups as they are. After Liu et al., "Learning
    Efficient Convolutional Networks through Network Slimming" (2017), on whole groups.
    """

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group with a batch norm."""
        scales = {name: w.abs() for name, w in weights_of(analysis).items() if name in analysis.batch_norm_scales}
        sums = Sums(analysis, scales)
        scores = {}
        for name, group in analysis.groups.items():
            count = sum(member.parameter in scales for member in group.members)
            if count:
                scores[name] = sums(group) / count
        return scores
