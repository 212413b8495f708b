"""Solver: scores become widths, and widths that meet limits on counted costs are found by bisection."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from fxprune.budget.budget import Bounds, is_fraction
from fxprune.budget.cost import Channels, Floats, cost_of
from fxprune.channels.analysis import Analysis
from fxprune.channels.names import Bools, Ints
from fxprune.errors import BudgetError, PlanError
from fxprune.graph.layers import writes_second_axis
from fxprune.graph.traced import device_of
from fxprune.plan import Plan

TRIES = 16  # numbers of channels, where the fewest leave too much of a budget
FEW = 16  # groups, up to which one may pay for the others: with more of them there is always a plan that fits


class Solver:
    """Finds widths for the groups, given scores: highest score stays."""

    def __init__(self, analysis: Analysis, scores: Mapping[str, Floats], bounds: Bounds) -> None:
        if not analysis.groups:
            reasons = sorted({frozen.reason.text for frozen in analysis.frozen}) or ["it has no parameters"]
            raise PlanError(f"nothing in this model can be pruned: {'; '.join(reasons[:5])}. See print(analysis).")
        self.analysis = analysis
        self.channels = Channels.of(analysis)
        self.sizes = np.array(list(analysis.sizes.values()))
        self.fixed = held_groups(analysis, bounds.keep)
        self.fixed |= np.array([name not in scores for name in analysis.groups])
        self.settled = np.zeros(len(self.sizes), dtype=bool)  # their widths are decided, as a share says
        flat = np.concatenate([scores.get(name, np.full(size, np.inf)) for name, size in analysis.sizes.items()])
        group = self.channels.group
        if (bad := np.isnan(flat)).any():
            raise PlanError(
                f"the criterion's scores of group {self.channels.names[group[bad.argmax()]]!r} are not numbers (NaN); "
                "are there NaNs or infinities in its weights or gradients?"
            )
        self.rank = rank_within(group, flat)
        place = -flat
        if bounds.scope == "local":
            place = self.rank / self.sizes[group]
        if bounds.scope == "isomorphic":
            kind = number_kinds(analysis)[group]
            place = rank_within(kind, flat) / np.bincount(kind)[kind]
        removable = ~self.fixed[group]
        worst_first = np.lexsort((-self.rank, -place))
        self.worst_first = worst_first[removable[worst_first]]
        self.multiple = round_widths(analysis, bounds.round_to)
        self.floor = np.minimum(self.sizes, np.maximum(1, np.ceil(bounds.minimum * self.sizes - 1e-9)).astype(np.int64))
        self.cap: Ints = np.maximum(self.floor, np.floor(bounds.maximum * self.sizes + 1e-9).astype(np.int64))
        self.floor[self.fixed] = self.cap[self.fixed] = self.sizes[self.fixed]

    def settle(self, held: Bools, widths: Ints) -> "Solver":
        """This solver, but that the groups ``held`` have the width that ``widths`` (int64[groups]) says."""
        result = copy.copy(self)
        result.floor, result.cap = np.where(held, widths, self.floor), np.where(held, widths, self.cap)
        result.worst_first = self.worst_first[~held[self.channels.group[self.worst_first]]]
        result.settled = self.settled | held
        return result

    def widths(self, removed: int, multiple: Ints | None = None) -> Ints:
        """The widths when the ``removed`` worst channels go, as far as minimum, maximum and rounding let them."""
        multiple = self.multiple if multiple is None else multiple
        gone = np.bincount(self.channels.group[self.worst_first[:removed]], minlength=len(self.sizes))
        rounded = -(-np.maximum(self.sizes - gone, self.floor) // multiple) * multiple
        result: Ints = np.minimum(rounded, self.cap)
        return result

    def kept(self, widths: Ints) -> Bools:
        """bool[channels]: the best of each group."""
        result: Bools = self.rank < widths[self.channels.group]
        return result

    def plan(self, widths: Ints) -> Plan:
        """The plan that keeps the best channels of each group."""
        kept = self.kept(widths)
        parts = np.split(kept, np.cumsum(self.sizes)[:-1])
        keep = {name: part.nonzero()[0].tolist() for name, part in zip(self.channels.names, parts, strict=True)}
        return Plan(keep, self.analysis.sizes, self.analysis.options)

    def meet(self, used: Callable[[Ints], float], tolerance: float) -> Ints:
        """The widths that use up at most 1, and at least ``1 - tolerance``, of what ``used`` measures.

        Where widths that are multiples use too little or too much, smaller multiples do; where single channels do too,
        some more go, for others to be given back, and in small networks one group pays for the others. Raises
        UnreachableError, with the nearest, where no widths are found.
        """
        nearest, step = None, self.multiple
        while True:
            if used(least := self.widths(len(self.worst_first), step)) <= 1:
                fewest = self.fewest(step, used)
                tries = TRIES if (step == 1).all() else 1
                for removed in range(fewest, min(fewest + tries, len(self.worst_first) + 1)):
                    widths = self.filled(self.widths(removed, step), step, used, 1 - tolerance)
                    if used(widths) >= 1 - tolerance:
                        return widths
                    if nearest is None or used(widths) > used(nearest):
                        nearest = widths
            if (step == 1).all():
                if nearest is not None and (exchanged := self.exchange(nearest, used, 1 - tolerance)) is not None:
                    return exchanged
                raise UnreachableError(least if nearest is None else nearest, above=nearest is None)
            step = np.maximum(1, step // 2)

    def fewest(self, step: Ints, used: Callable[[Ints], float]) -> int:
        """How few channels go at least, for widths that are multiples of ``step``, until the budget holds."""
        low, high = 0, len(self.worst_first)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if used(self.widths(middle, step)) <= 1 else (middle + 1, high)
        return low

    def filled(self, widths: Ints, step: Ints, used: Callable[[Ints], float], enough: float) -> Ints:
        """``widths`` with channels given back, in ever smaller steps, until ``enough`` is used or nothing fits."""
        while (now := used(widths)) < enough:
            widths = self.fill(widths, step, used)
            if (step == 1).all() and used(widths) == now:
                break
            step = np.maximum(1, step // 2)
        return widths

    def exchange(self, widths: Ints, used: Callable[[Ints], float], enough: float) -> Ints | None:
        """``widths`` in which one group has more or fewer channels, and others make up for it, to use ``enough``."""
        if len(self.sizes) > FEW:
            return None
        for number in np.argsort(-widths / self.sizes, kind="stable"):
            step = np.ones_like(widths)
            step[number] = 0
            for change in sorted(range(-TRIES, TRIES + 1), key=abs):
                new, before = widths.copy(), np.zeros_like(widths)
                new[number] = np.clip(new[number] + change, self.floor[number], self.cap[number])
                while used(new) > 1 and (new != before).any():
                    before, new = new, np.maximum(new - step, self.floor)
                before = np.zeros_like(widths)
                while (new != before).any():
                    before, new = new, self.fill(new, step, used)
                if 1 >= used(new) >= enough:
                    return new
        return None

    def fill(self, widths: Ints, step: Ints, used: Callable[[Ints], float]) -> Ints:
        """Give groups back ``step`` channels each, those cut deepest first, while the budget holds."""
        for number in np.argsort(widths / self.sizes, kind="stable"):
            grown = widths.copy()
            grown[number] = min(grown[number] + step[number], self.cap[number])
            if grown[number] > widths[number] and used(grown) <= 1:
                widths = grown
        return widths


class UnreachableError(Exception):
    """No widths use up the budget; the nearest are ``above`` it, or leave too much of it."""

    def __init__(self, widths: Ints, above: bool) -> None:
        self.widths, self.above = widths, above


def meet_limits(solver: Solver, limits: Sequence[tuple[str, float]], tolerance: float) -> Ints:
    """Widths that meet limits, (kind, value), on counted costs."""
    costs = [(kind, cost_of(solver.analysis, kind, solver.channels), limit) for kind, limit in limits]
    dense = np.ones(int(solver.sizes.sum()), dtype=bool)
    totals = [cost(dense) for _, cost, _ in costs]
    allowed = [limit * now if is_fraction(limit) else limit for (_, _, limit), now in zip(costs, totals, strict=True)]

    for (kind, _, _), now in zip(costs, totals, strict=True):
        if not now:
            raise BudgetError(f"{kind} is 0 for these example_inputs: there is nothing to save")

    # A count of channels can't be met closer than to the whole channel below it.
    counted = [limit for (kind, _, _), limit in zip(costs, allowed, strict=True) if kind == "channels"]
    tolerance = max([tolerance, *(1 / limit for limit in counted)])

    def used(widths: Ints) -> float:
        kept = solver.kept(widths)
        return max(cost(kept) / limit for (_, cost, _), limit in zip(costs, allowed, strict=True))

    def amounts(values: Iterable[float]) -> str:
        rows = zip(costs, values, totals, strict=True)
        return " and ".join(f"{kind}={round(value)} ({value / now:.1%})" for (kind, _, _), value, now in rows)

    if solver.settled.any() and used(solver.cap) <= 1:
        return solver.cap
    if used(solver.sizes) <= 1:
        raise BudgetError(
            f"the model already meets the budget {amounts(allowed)}: it has {amounts(totals)}. Give a smaller one."
        )
    try:
        return solver.meet(used, tolerance)
    except UnreachableError as miss:
        kept = solver.kept(miss.widths)
        held = f"{int(solver.fixed.sum())} of {len(solver.sizes)} groups are kept whole"
        if settled := int((solver.settled & ~solver.fixed).sum()):
            held += f", {settled} have their share of channels="
        if miss.above:
            why = f"{held}, and minimum= holds the others; lower it, or keep fewer layers"
            why += describe_frozen(solver.analysis)
        elif (miss.widths == solver.cap).all():
            why = f"{held} and maximum= holds the others; raise it, or ask for the nearest"
        else:
            why = (
                f"widths are whole channels, and no plan was found within {100 * tolerance:g} % below it; ask for "
                "the nearest, or leave more unused: tolerance="
            )
        nearest = amounts(cost(kept) for _, cost, _ in costs)
        raise BudgetError(
            f"the budget {amounts(allowed)} can't be met; the nearest that can be reached is {nearest}: {why}."
        ) from None


def rank_within(owner: Ints, scores: Floats) -> Ints:
    """int64[channels]: how many channels of the same ``owner`` have a better score; ties by position."""
    order = np.lexsort((-scores, owner))
    starts = np.cumsum(np.bincount(owner)) - np.bincount(owner)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - starts[owner[order]]
    return rank


def number_kinds(analysis: Analysis) -> Ints:
    """int64[groups]: groups of one number live on the same axes of the same kinds of layers, in the same order."""
    numbers: dict[tuple[tuple[str, str, int], ...], int] = {}
    kinds = [
        tuple((*kind_of_parameter(analysis, member.parameter), member.axis) for member in group.members)
        for group in analysis.groups.values()
    ]
    return np.array([numbers.setdefault(kind, len(numbers)) for kind in kinds], dtype=np.int64)


def kind_of_parameter(analysis: Analysis, parameter: str) -> tuple[str, str]:
    """The class of the module that a parameter or buffer belongs to, and its name there."""
    path, _, leaf = parameter.rpartition(".")
    return type(analysis.graph.get_submodule(path)).__name__, leaf


def held_groups(analysis: Analysis, patterns: Sequence[str]) -> Bools:
    """bool[groups]: which groups the ``keep`` patterns name."""
    result = np.zeros(len(analysis.groups), dtype=bool)
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        named = {key for key in analysis.axes if match_patterns(analysis, *key, pattern)}
        hits = [
            fnmatchcase(name, pattern) or any((member.parameter, member.axis) in named for member in group.members)
            for name, group in analysis.groups.items()
        ]
        if not named and not any(hits):
            raise PlanError(
                f"keep={pattern!r} matches no module, parameter or group of this model. Names are those of its "
                "state_dict; * stands for anything."
            )
        result |= np.array(hits, dtype=bool)
    return result


def match_patterns(analysis: Analysis, parameter: str, axis: int, pattern: str) -> bool:
    """Whether ``pattern``, "name" or "name[axis]", names this axis of a parameter, or of a module that it is in."""
    name, _, number = pattern.removesuffix("]").partition("[")
    if axis != (int(number) if number.isdecimal() else output_axis(analysis, parameter)):
        return False
    return matches_pattern(parameter, name)


def matches_pattern(path: str, pattern: str) -> bool:
    """Whether ``pattern`` names a module or parameter, or a module that it is in."""
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))


def output_axis(analysis: Analysis, parameter: str) -> int:
    """The axis of a parameter that its layer's output has: the first that is not of size 1."""
    module = analysis.graph.get_submodule(parameter.rpartition(".")[0])
    shape = analysis.shapes[parameter]
    if writes_second_axis(module) and len(shape) > 1:
        return 1
    return next((axis for axis, size in enumerate(shape) if size > 1), 0)


def round_widths(analysis: Analysis, round_to: int | str) -> Ints:
    """int64[groups]: the multiple that the width of each group is rounded up to.

    A number holds but for a quarter of a group, "auto" but for a sixteenth: in narrow networks more costs accuracy than
    it gains time.
    """
    if round_to == "auto":
        return limit_multiples(analysis, prefer_multiple(analysis), parts=16)
    return limit_multiples(analysis, int(round_to), parts=4)


def prefer_multiple(analysis: Analysis) -> int:
    """The multiple of channels that is fast on the device and in the dtype of the model."""
    device, dtype = device_of(analysis.graph)
    return 16 if device.type != "cuda" else 8 if dtype.itemsize <= 2 else 4


def limit_multiples(analysis: Analysis, multiple: int, parts: int) -> Ints:
    """int64[groups]: ``multiple``, or the power of 2 that one of so many ``parts`` of a group holds, if it is less."""
    result = []
    for group in analysis.groups.values():
        # A channel of several positions (a head, a pixel of a flattened map) already makes wide steps.
        steps = [len(m.index) // group.size for m in group.members if len(analysis.shapes[m.parameter]) > 1]
        step = min(steps, default=1) or 1
        limit = 1 << max(0, (group.size // parts).bit_length() - 1)
        result.append(min(multiple // math.gcd(multiple, step), limit))
    return np.array(result, dtype=np.int64)


def describe_rounding(analysis: Analysis, round_to: int | str) -> str:
    """What ``round_widths`` does, in words."""
    multiples = round_widths(analysis, round_to)
    counts = [f"of {multiple} in {(multiples == multiple).sum()}" for multiple in np.unique(multiples)]
    return f"multiples {', '.join(counts)} of {len(multiples)} groups"


def describe_frozen(analysis: Analysis) -> str:
    """How many channels are frozen besides, and the commonest reasons, as the end of a sentence; "" for none."""
    counts = Counter[str]()
    for item in analysis.frozen:
        counts[item.reason.text] += len(item.index)
    if not counts:
        return ""
    reasons = ", ".join(f"{reason} ({count})" for reason, count in counts.most_common(3))
    return f". Besides, {counts.total()} channels are frozen: {reasons}; see print(analysis)"
