"""Even: one share of all groups, exactly the same for all that are equally wide, as a model's config can say it."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from fxprune.budget.budget import Bounds
from fxprune.budget.cost import Floats
from fxprune.budget.solver import Solver
from fxprune.channels.analysis import Analysis
from fxprune.channels.groups import Group
from fxprune.channels.names import Ints


class EvenSolver(Solver):
    """Finds widths that are the same share of groups of the same width, and nearly that of the others.

    Heads of 8 channels each are as wide as a stream of 8 times as many: such sizes hang together in a config.
    ``rounding``: of shares to whole parts, ``np.rint`` or ``np.ceil``; where parts are coarse, one may meet a
    budget that the other can't.
    """

    def __init__(
        self, analysis: Analysis, scores: Mapping[str, Floats], bounds: Bounds, rounding: Callable[[float], float]
    ) -> None:
        super().__init__(analysis, scores, bounds)
        self.rounding = rounding
        wide = np.array([measure_width(analysis, group) for group in analysis.groups.values()])
        self.classes = [((wide == width) & ~self.fixed).nonzero()[0] for width in np.unique(wide[~self.fixed])]

    def widths(self, removed: int, multiple: Ints | None = None) -> Ints:
        """The widths when a share of ``removed`` of all channels goes, rounded for each class to what all of it can."""
        share = 1 - removed / len(self.worst_first)
        result: Ints = self.sizes.copy()
        for members, parts in self.parts_of(self.multiple if multiple is None else multiple):
            sizes = self.sizes[members]
            least = np.ceil(parts * (self.floor[members] / sizes).max() - 1e-9)
            most = np.floor(parts * (self.cap[members] / sizes).min() + 1e-9)
            count = max(least, min(most, self.rounding(share * parts - 1e-9)))
            result[members] = np.minimum(sizes, count * sizes // parts)
        return result

    def fill(self, widths: Ints, step: Ints, used: Callable[[Ints], float]) -> Ints:
        """Give classes back a part each, those cut deepest first, while the budget holds."""
        for members, parts in sorted(self.parts_of(step), key=lambda row: widths[row[0][0]] / self.sizes[row[0][0]]):
            grown = widths.copy()
            grown[members] += self.sizes[members] // parts
            if (grown <= self.cap).all() and used(grown) <= 1:
                widths = grown
        return widths

    def exchange(self, widths: Ints, used: Callable[[Ints], float], enough: float) -> Ints | None:
        """No group pays for another here."""
        return None

    def parts_of(self, step: Ints) -> Iterator[tuple[Ints, int]]:
        """Each class, and into how many equal parts all its groups can be cut, of ``step`` channels where they can."""
        for members in self.classes:
            sizes, steps = self.sizes[members], step[members]
            yield members, int(np.gcd.reduce(np.where(sizes % steps == 0, sizes // steps, sizes)))


def measure_width(analysis: Analysis, group: Group) -> int:
    """How many positions a group has on the narrowest axis of a weight that it goes through."""
    weights = [member for member in group.members if len(analysis.shapes[member.parameter]) > 1]
    return min((len(member.index) for member in weights or group.members), default=group.size)
