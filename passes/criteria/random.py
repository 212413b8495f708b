"""Random: the baseline that any criterion should beat."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fxprune.budget.cost import Floats
from fxprune.channels.analysis import Analysis
from fxprune.errors import PlanError, require_type

from ..base import Criterion


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform random scores: a pure function of the seed and the group's name.

    Attributes:
        seed: any integer.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_type(self.seed, int, "seed", PlanError)

    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] in [0, 1) for each group."""
        return {
            name: np.random.default_rng([self.seed & 0xFFFFFFFF, zlib.crc32(name.encode())]).random(group.size)
            for name, group in analysis.groups.items()
        }
