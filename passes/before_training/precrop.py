"""PreCrop: the widths at which no layer takes more than its share of the FLOPs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fxprune.budget.cost import Channels, Floats, cost_of
from fxprune.channels.analysis import Analysis
from fxprune.errors import PlanError
from fxprune.options import allow_words, check_options

from .allocator import Allocator

STEPS = 128  # in which a group goes


@dataclass(frozen=True)
class PreCrop(Allocator):
    """Maximise the sum over layers of log(density) under a cap on the cost.

    The density of a layer is the share of its weights that stays: the product of the shares of its input and output
    channels. So with d_g the share kept of group g, and n_g the number of weight axes that it lives on, it maximises
    sum n_g * log(d_g) subject to cost(d) <= budget and d_g <= 1. At the best widths d_g * dcost/dd_g is proportional
    to n_g over all groups that are cut: those that take more than their share are cut first, until they are even. After
    Cai et al., "Structured Pruning is All You Need for Pruning CNNs at Initialization" (2022), whose objective this is;
    they solve it for layers, this for groups.

    Attributes:
        cost: what is capped: "flops", "params" or "memory".
    """

    cost: str = "flops"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, PlanError, cost=allow_words("flops", "params", "memory"))

    def worth(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group: the step at which a channel goes, the last first."""
        if not analysis.groups:
            return {}
        cost = cost_of(analysis, self.cost, Channels.of(analysis))
        widths = np.array(list(analysis.sizes.values()))
        axes = np.array([max(1, weight_axes(analysis, name)) for name in analysis.groups])
        steps = -(-widths // STEPS)
        worth = [np.full(size, np.inf) for size in widths]
        time = 0
        while (widths > 1).any():
            load = np.where(widths > 1, widths * cost.slopes(widths) / axes, -1.0)
            number = int(load.argmax())
            left = max(1, widths[number] - steps[number])
            worth[number][left : widths[number]] = time
            widths[number], time = left, time + 1
        return dict(zip(analysis.groups, worth, strict=True))


def weight_axes(analysis: Analysis, name: str) -> int:
    """On how many axes of weights a group lives."""
    members = analysis.groups[name].members
    return Counter(len(analysis.shapes[member.parameter]) > 1 for member in members)[True]
