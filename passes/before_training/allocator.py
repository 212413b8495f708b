"""Allocator: widths from a formula, without data; which channels stay is another's question."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fxprune.budget.cost import Floats
from fxprune.channels.analysis import Analysis
from fxprune.errors import PlanError

from ..base import Criterion
from .base import BeforeTraining


@dataclass(frozen=True, kw_only=True)
class Allocator(BeforeTraining):
    """Says how many channels of each group stay; ``by`` says which.

    Attributes:
        by: a criterion that ranks the channels within each group, the highest score first; without one the first
            channels stay, as good as any where nothing is trained yet.
    """

    scores_layers: ClassVar[bool] = False
    by: Criterion | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by is not None and not isinstance(self.by, Criterion):
            raise PlanError(f"by={self.by!r:.80} can't rank channels: give a criterion such as passes.Magnitude()")
        if self.scope != type(self).scope:
            raise PlanError(f"scope={self.scope!r} leaves {type(self).__name__} nothing to say: that is passes.Uniform")

    @abstractmethod
    def worth(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group, descending: what keeping a first, a second ... channel is worth."""

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group: the worth of its place in the ranking of its group."""
        worth = self.worth(analysis)
        if self.by is None:
            return worth
        scores = {}
        for name, ranking in self.by.score(analysis).items():
            best_first = np.argsort(-ranking, kind="stable")
            scores[name] = np.empty(len(ranking))
            scores[name][best_first] = worth[name]
        return scores


def spread_evenly(size: int, share: float = 1.0) -> Floats:
    """The worth of ``size`` channels that go one by one, ``share`` times as late as those of a group of share 1."""
    return -np.arange(size) / (size * share)
