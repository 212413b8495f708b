"""BatchNormScale: what batch norm scales down matters little."""

from collections.abc import Mapping
from dataclasses import dataclass

from fxprune.channels.analysis import Analysis
from fxprune.cost import Floats

from .base import Criterion, Sums, detached, weights_of


@dataclass(frozen=True)
class BatchNormScale(Criterion):
    """The mean absolute scale |gamma| of the batch norms that a channel goes through.

    Groups without a batch norm stay whole. Scores are compared across groups as they are. After Liu et al., "Learning
    Efficient Convolutional Networks through Network Slimming" (2017), on whole groups.
    """

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group with a batch norm."""
        scores = {}
        for name, group in analysis.groups.items():
            weights = weights_of(analysis, group)
            scales = {key: detached(w).abs() for key, w in weights.items() if key in analysis.batch_norm_scales}
            if scales:
                scores[name] = Sums(analysis, scales)(group) / len(scales)
        return scores
