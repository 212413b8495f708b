"""Combined: pruning before training by several scores at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fxprune.budget.cost import Floats
from fxprune.channels.analysis import Analysis
from fxprune.errors import PlanError
from fxprune.options import Rule, allow_number, check_options

from .base import BeforeTraining
from .grasp import GraSP
from .single_shot import SingleShot
from .synflow import SynFlow


@dataclass(frozen=True)
class Combined(BeforeTraining):
    """The weighted sum of SingleShot, GraSP and SynFlow, for what goes with a channel of what the budget limits.

    Each is taken over its mean absolute value in the network first, so that they compare. The idea of Wimmer et al.,
    "COPS: Controlled Pruning Before Training Starts" (2021), of whose scores this is the simple sum.

    Attributes:
        data: one batch (x, y), or a loader, of which the first batch is used (on each rank).
        loss: a function of (output, y) that gives a scalar.
        shares: how much each counts, in this order.
    """

    per_cost: ClassVar[bool] = True
    data: Any
    loss: Callable[[Any, Any], Tensor]
    shares: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        share = allow_number(least=0)
        rule = Rule(
            lambda shares: isinstance(shares, (tuple, list)) and len(shares) == 3 and all(map(share.holds, shares)),
            "must be three numbers of at least 0, for SingleShot, GraSP and SynFlow",
        )
        check_options(self, PlanError, shares=rule)

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group."""
        parts = SingleShot(self.data, self.loss, compute_aware=False), GraSP(self.data, self.loss), SynFlow()
        scores = [over_their_mean(part.score(analysis)) for part in parts]
        return {
            name: sum((share * one[name] for share, one in zip(self.shares, scores, strict=True)), np.zeros(size))
            for name, size in analysis.sizes.items()
        }


def over_their_mean(scores: Mapping[str, Floats]) -> dict[str, Floats]:
    """Scores over the mean of their absolute values in the network; as they are where that is 0."""
    flat = np.concatenate([*scores.values(), np.zeros(0)])
    mean = np.abs(flat).mean() if len(flat) else 0.0
    return {name: values / (mean or 1.0) for name, values in scores.items()}
