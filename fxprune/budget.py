"""Budget: what a compact model may cost, and the solver that finds the plan that meets it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from fnmatch import fnmatchcase

import numpy as np

from fxprune.channels.analysis import Analysis
from fxprune.channels.names import Bools, Ints
from fxprune.cost import Channels, Cost, Floats, cost_of, device_of
from fxprune.errors import BudgetError, PlanError
from fxprune.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may remain. Several limits can stand together; all are met, and the tightest is used up.

    A float in (0, 1] is a fraction of what the model costs now; any other number is absolute.

    Attributes:
        flops: FLOPs of a forward pass on the example inputs (a multiply and an add are 2).
        macs: multiply-accumulates, half the FLOPs.
        params: the number of parameters.
        channels: the number of channels of all groups.
        memory: bytes of weights and of all values that a forward pass computes.
        latency: of a forward pass, measured; a fraction, seconds above 1, or a ``timedelta``.
        tolerance: how much of a limit may be left unused, as a fraction of it.
    """

    flops: float | None = None
    macs: float | None = None
    params: float | None = None
    channels: float | None = None
    memory: float | None = None
    latency: float | timedelta | None = None
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        limits = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tolerance"}
        given = {name: value for name, value in limits.items() if value is not None}
        if not given:
            raise BudgetError(f"an empty budget: give at least one of {', '.join(limits)}")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float, timedelta)):
                raise BudgetError(f"{name}={value!r} is not a number")
            if not (value.total_seconds() if isinstance(value, timedelta) else value) > 0:
                raise BudgetError(f"{name}={value!r} must be positive")
        if not 0 < self.tolerance < 1:
            raise BudgetError(f"tolerance={self.tolerance!r} must lie between 0 and 1")

    def limits(self) -> dict[str, float]:
        """The limits that are counted, by cost: MACs as FLOPs."""
        limits = {name: getattr(self, name) for name in ("flops", "params", "channels", "memory")}
        if self.macs is not None:
            flops = self.macs if is_fraction(self.macs) else 2 * self.macs
            if self.flops is not None:
                raise BudgetError("give flops or macs, not both: 1 MAC is 2 FLOPs")
            limits["flops"] = flops
        return {name: value for name, value in limits.items() if value is not None}


def is_fraction(value: float) -> bool:
    """Whether a limit is a fraction of what the model costs now."""
    return isinstance(value, float) and 0 < value <= 1


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a plan may do to each group.

    Attributes:
        minimum: the fraction of a group's channels that stay at least.
        maximum: the fraction of a group's channels that stay at most.
        keep: patterns of modules or parameters whose output channels all stay ("layer4.*", "fc"); with an axis
            ("fc.weight[1]") the channels on that axis.
        round_to: widths are multiples of this; "auto" chooses from device and dtype. A group is never rounded by more
            than a quarter of its size.
        scope: "global" compares scores across groups, "local" removes the same fraction of each group.
    """

    minimum: float = 0.1
    maximum: float = 1.0
    keep: Sequence[str] = ()
    round_to: int | str = "auto"
    scope: str = "global"

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.maximum <= 1:
            raise PlanError(f"need 0 <= minimum <= maximum <= 1, got {self.minimum} and {self.maximum}")
        if self.scope not in ("global", "local"):
            raise PlanError(f"scope={self.scope!r} is not known; use 'global' or 'local'")
        if self.round_to != "auto" and not (isinstance(self.round_to, int) and self.round_to >= 1):
            raise PlanError(f"round_to={self.round_to!r} must be a positive integer or 'auto'")


class Solver:
    """Finds widths for the groups, given scores: highest score stays."""

    def __init__(self, analysis: Analysis, scores: Mapping[str, Floats], bounds: Bounds) -> None:
        if not analysis.groups:
            reasons = sorted({frozen.reason.text for frozen in analysis.frozen}) or ["it has no parameters"]
            raise PlanError(f"nothing in this model can be pruned: {'; '.join(reasons[:5])}. See print(analysis).")
        self.analysis = analysis
        self.channels = Channels.of(analysis)
        self.sizes = np.array(list(analysis.sizes.values()))
        self.fixed = held(analysis, bounds.keep)
        self.fixed |= np.array([name not in scores for name in analysis.groups])
        starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        flat = np.full(int(self.sizes.sum()), np.inf)
        for number, name in enumerate(analysis.groups):
            if name in scores:
                flat[starts[number] : starts[number] + self.sizes[number]] = scores[name]
        if np.isnan(flat).any():
            raise PlanError("a criterion gave scores that are not numbers; are there NaNs in the weights?")
        group = self.channels.group
        order = np.lexsort((-flat, group))  # by group, best first; ties by position
        self.rank = np.empty_like(order)
        self.rank[order] = np.arange(len(order)) - starts[group[order]]
        place = self.rank / self.sizes[group] if bounds.scope == "local" else -flat
        removable = ~self.fixed[group]
        self.worst_first = np.lexsort((-self.rank, -place))[np.flatnonzero(removable[np.lexsort((-self.rank, -place))])]
        self.multiple = multiples(analysis, bounds.round_to)
        self.floor = np.minimum(self.sizes, np.maximum(1, np.ceil(bounds.minimum * self.sizes - 1e-9)).astype(np.int64))
        self.cap = np.maximum(self.floor, np.floor(bounds.maximum * self.sizes + 1e-9).astype(np.int64))
        self.floor[self.fixed] = self.cap[self.fixed] = self.sizes[self.fixed]

    def widths(self, removed: int) -> Ints:
        """The widths when the ``removed`` worst channels go, as far as minimum, maximum and rounding let them."""
        gone = np.bincount(self.channels.group[self.worst_first[:removed]], minlength=len(self.sizes))
        rounded = -(-(self.sizes - gone) // self.multiple) * self.multiple
        result: Ints = np.clip(np.minimum(rounded, self.sizes), self.floor, self.cap)
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

        Raises BudgetError where none do, with the nearest.
        """
        low, high = 0, len(self.worst_first)
        if used(self.widths(high)) > 1:
            raise Unreachable(used(self.widths(high)))
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if used(self.widths(middle)) <= 1 else (middle + 1, high)
        widths = self.widths(low)
        step = self.multiple.copy()
        while (now := used(widths)) < 1 - tolerance:
            widths = self.fill(widths, step, used)
            if (step == 1).all() and used(widths) == now:
                break
            step = np.maximum(1, step // 2)
        if used(widths) < 1 - tolerance:
            raise Unreachable(used(widths))
        return widths

    def fill(self, widths: Ints, step: Ints, used: Callable[[Ints], float]) -> Ints:
        """Give groups back ``step`` channels each, those cut deepest first, while the budget holds."""
        for number in np.argsort(widths / self.sizes, kind="stable"):
            grown = widths.copy()
            grown[number] = min(grown[number] + step[number], self.cap[number])
            if grown[number] > widths[number] and used(grown) <= 1:
                widths = grown
        return widths


class Unreachable(Exception):
    """No widths use up the budget; ``nearest`` is how much of it the nearest do."""

    def __init__(self, nearest: float) -> None:
        self.nearest = nearest


def solve(analysis: Analysis, scores: Mapping[str, Floats], budget: Budget, bounds: Bounds) -> Plan:
    """The plan that meets ``budget`` and keeps the channels of the highest scores.

    Args:
        analysis: of the model.
        scores: group -> float[channels]; groups without a score stay whole.
        budget: what may remain.
        bounds: what may be done to each group.

    Raises:
        BudgetError: the budget is out of reach, or the model already meets it.
        PlanError: nothing can be pruned, or a pattern in ``keep`` matches nothing.
    """
    solver = Solver(analysis, scores, bounds)
    limits = budget.limits()
    if budget.latency is not None:
        from fxprune.latency import solve_latency

        return solve_latency(solver, budget, limits)
    return solver.plan(meet_limits(solver, limits, budget.tolerance))


def meet_limits(solver: Solver, limits: Mapping[str, float], tolerance: float) -> Ints:
    """Widths that meet limits on counted costs."""
    costs: dict[str, tuple[Cost, float, float]] = {}
    for kind, limit in limits.items():
        cost = cost_of(solver.analysis, kind, solver.channels)
        whole = cost(np.ones(int(solver.sizes.sum()), dtype=bool))
        costs[kind] = cost, whole, limit * whole if is_fraction(limit) else float(limit)

    def used(widths: Ints) -> float:
        kept = solver.kept(widths)
        return max(cost(kept) / limit for cost, _, limit in costs.values())

    if used(solver.sizes) <= 1:
        now = ", ".join(f"{kind} {whole:.4g} of {limit:.4g}" for kind, (_, whole, limit) in costs.items())
        raise BudgetError(f"the model already meets this budget ({now}): nothing to remove. Give a smaller one.")
    try:
        return solver.meet(used, tolerance)
    except Unreachable as miss:
        kind, (_, whole, limit) = next(iter(costs.items()))
        nearest = (
            " and ".join(
                f"{kind} {miss.nearest * limit:.4g} ({miss.nearest * limit / whole:.1%})"
                for kind, (_, whole, limit) in costs.items()
            )
            if len(costs) == 1
            else f"{miss.nearest:.1%} of it"
        )
        held = int(solver.fixed.sum())
        asked = ", ".join(f"{kind} <= {limit:.4g} ({limit / whole:.1%})" for kind, (_, whole, limit) in costs.items())
        why = (
            "lower minimum=, or keep fewer layers"
            if miss.nearest > 1
            else f"widths are whole channels, so this model has no plan within {tolerance:.0%} below it: ask for the "
            "nearest value, or give the Budget a larger tolerance"
        )
        raise BudgetError(
            f"the budget {asked} can't be met; the nearest that can be reached is {nearest}. "
            f"{held} of {len(solver.sizes)} groups are kept whole. To go on: {why}."
        ) from None


def held(analysis: Analysis, patterns: Sequence[str]) -> Bools:
    """bool[groups]: which groups the ``keep`` patterns name."""
    if isinstance(patterns, str):
        patterns = (patterns,)
    result = np.zeros(len(analysis.groups), dtype=bool)
    for pattern in patterns:
        named = pattern if pattern.endswith("]") else f"{pattern}[0]"
        hits = [
            any(matches(member.parameter, member.axis, named) for member in group.members) or fnmatchcase(name, pattern)
            for name, group in analysis.groups.items()
        ]
        known = any(hits) or any(matches(parameter, axis, named) for parameter, axis in analysis.axes)
        if not known:
            raise PlanError(
                f"keep={pattern!r} matches no module, parameter or group of this model. Names are those of its "
                "state_dict; * stands for anything."
            )
        result |= np.array(hits, dtype=bool)
    return result


def matches(parameter: str, axis: int, pattern: str) -> bool:
    """Whether ``pattern`` ("name[axis]") names this axis of a parameter, or of the module it belongs to."""
    module = parameter.rpartition(".")[0]
    return any(fnmatchcase(f"{name}[{axis}]", pattern.replace("[", "[[]", 1)) for name in (parameter, module))


def multiples(analysis: Analysis, round_to: int | str) -> Ints:
    """int64[groups]: the multiple that the width of each group is rounded up to."""
    if round_to == "auto":
        device, dtype = device_of(analysis.graph)
        round_to = 16 if device.type != "cuda" else 8 if dtype.itemsize <= 2 else 4
    result = []
    for group in analysis.groups.values():
        # A channel of several positions (a head, a pixel of a flattened map) already makes wide steps.
        steps = [len(m.index) // group.size for m in group.members if len(analysis.shapes[m.parameter]) > 1]
        step = min(steps, default=1) or 1
        limit = 1 << max(0, (group.size // 4).bit_length() - 1)
        multiple = int(round_to) // math.gcd(int(round_to), step)
        result.append(min(multiple, limit) if limit < multiple else multiple)
    return np.array(result, dtype=np.int64)
