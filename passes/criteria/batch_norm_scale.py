"""BatchNormScale: what batch norm scales down matters little."""

from collections.abc import Mapping
from dataclasses import dataclass

from fxprune.budget.cost import Floats
from fxprune.budget.sums import Sums
from fxprune.channels.analysis import Analysis

from ..base import Criterion, detach_weights, normalize_scores, weights_of


@dataclass(frozen=True)
class BatchNormScale(Criterion):
    """The mean absolute scale |gamma| of the batch norms that a channel goes through.

    Groups without a batch norm stay whole. After Liu et al., "Learning Efficient Convolutional Networks through Network
    Slimming" (2017), on whole groups.

    Attributes:
        relative: divide by the mean of the group, so that groups compare. False compares the scales as they are, as the
            paper does with networks that were trained with a penalty on them; without it whole layers may go.
    """

    relative: bool = True

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group with a batch norm."""
        scales = {
            name: detach_weights(w).abs()
            for name, w in weights_of(analysis).items()
            if name in analysis.batch_norm_scales
        }
        sums = Sums(analysis, scales)
        scores = {}
        for name, group in analysis.groups.items():
            count = sum(member.parameter in scales for member in group.members)
            if count:
                scores[name] = normalize_scores(sums(group) / count) if self.relative else sums(group) / count
        return scores
