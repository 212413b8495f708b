"""Plans that meet a measured latency, with widths that stand on the staircase of each group.

The time of a layer rises with its width in steps, and sometimes falls: kernels work on blocks of channels, and another
width may have a better kernel. So before the search the groups are timed at several widths, and a width is left out
where a larger one takes hardly longer. Each candidate of the search is then built and timed beside the dense model.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from fxprune.budget.budget import Budget, is_fraction
from fxprune.budget.cost import Floats
from fxprune.budget.solver import Solver, meet_limits
from fxprune.budget.timing import LAYERS, by_module, in_turns, make_forward, stand_in
from fxprune.channels.groups import layers_of
from fxprune.channels.names import Ints
from fxprune.errors import BudgetError
from fxprune.graph.inputs import bind_inputs, map_tensors
from fxprune.graph.traced import device_of, in_eval
from fxprune.rewrite.rewrite import rewrite

LEVELS = 16  # widths of each group that are timed
WORTH = 0.5  # of the share of channels that a width saves over the next larger one: that share of time at least
ROUNDS = 10  # candidates that are timed
CLOSE = 0.03  # of the limit: what may be left unused
AIM = 1 - CLOSE / 2  # of the limit: the middle of what is close enough, so that noise on either side does no harm
INSIDE = 0.15  # of the range: so far from its ends stays each guess, for time is no straight line between them
SECONDS = 1.0  # that a candidate is run for
AGAIN = 3.0  # times as long is a candidate run that came close


def meet_latency(solver: Solver, budget: Budget, limits: Sequence[tuple[str, float]]) -> Ints:
    """The largest widths, in the order of the scores, whose model runs within ``budget.latency`` in eval mode.

    Times are taken on the device of the weights, in turns with the dense model, so that a machine that slows down slows
    both. ``limits``, on counted costs, hold as well.
    """
    graph = solver.analysis.graph
    device, _ = device_of(graph)
    if device.type == "meta":
        raise BudgetError("latency can't be measured on the meta device: load the weights, or give flops= instead")
    inputs = map_tensors(lambda tensor: stand_in(tensor, device), solver.analysis.example_inputs)
    with in_eval(graph):
        return Search(solver, inputs, budget, limits).widths()


class Tried(NamedTuple):
    """A candidate: the channels removed, and its time over that of the dense model."""

    removed: int
    time: float


def guess_between(slow: Tried, fast: Tried, aim: float) -> int:
    """How many channels to remove for a time of ``aim``, if time falls in a line: regula falsi, kept off the ends.

    A guess at an end would leave the range as wide as it was.
    """
    share = (slow.time - aim) / max(slow.time - fast.time, 1e-9)  # both may have taken the same time
    return slow.removed + round(float(np.clip(share, INSIDE, 1 - INSIDE)) * (fast.removed - slow.removed))


class Search:
    """Looks for the number of channels, the worst first, that must go."""

    def __init__(self, solver: Solver, inputs: Any, budget: Budget, limits: Sequence[tuple[str, float]]) -> None:
        self.solver, self.inputs = solver, inputs
        times = seconds_of({"dense": solver.analysis.graph}, inputs, SECONDS)["dense"]
        self.dense = float(np.median(times))
        limit = in_seconds(budget.latency, self.dense)
        if self.dense <= limit and not limits and not solver.settled.any():
            raise BudgetError(f"the model already runs in {self.dense:.3g} s, within {limit:.3g} s: nothing to remove.")
        self.limit = limit / self.dense
        self.known = dict[bytes, list[float]]()  # widths -> times over those of the dense model in the same rounds
        self.first = self.within(limits, budget.tolerance)
        self.stairs = measure_staircases(solver, inputs)

    def within(self, limits: Sequence[tuple[str, float]], tolerance: float) -> Ints:
        """The largest widths that meet the counted limits; the largest of all where there are none."""
        if not limits:
            return self.solver.cap
        return meet_limits(self.solver, limits, tolerance)

    def widths(self) -> Ints:
        """The widths that are looked for."""
        count = len(self.solver.worst_first)
        if (self.first < self.solver.sizes).any() and self.time(self.first) <= self.limit:
            return self.first
        slow, fast = Tried(0, self.time(self.first)), Tried(count, self.time(self.at(count)))
        if fast.time > self.limit:
            raise BudgetError(
                f"a latency of {self.limit * self.dense:.3g} s can't be met: the model takes {self.dense:.3g} s, the "
                f"smallest plan {fast.time * self.dense:.3g} s. Ask for more than that, lower minimum=, or keep fewer "
                "layers."
            )
        for _ in range(ROUNDS):
            if fast.time >= (1 - CLOSE) * self.limit or fast.removed - slow.removed <= 1:
                break
            removed = guess_between(slow, fast, AIM * self.limit)
            tried = Tried(removed, self.time(self.at(removed)))
            slow, fast = (slow, tried) if tried.time <= self.limit else (tried, fast)
        return self.filled(self.at(fast.removed))

    def at(self, removed: int) -> Ints:
        """The widths without the ``removed`` worst channels, each rounded up to one that stands on the staircase."""
        widths = self.solver.widths(removed, np.ones_like(self.solver.multiple))
        rounded = [stairs.round_up(width) for stairs, width in zip(self.stairs, widths.tolist(), strict=True)]
        return np.minimum(np.array(rounded, dtype=np.int64), self.first)

    def filled(self, widths: Ints) -> Ints:
        """Give groups back steps of their staircases until the limit is used up."""
        best, time, trust = widths, self.time(widths), 1.0
        for _ in range(ROUNDS):
            if time >= (1 - CLOSE) * self.limit:
                break
            grown = self.grown(best, trust * (AIM * self.limit - time))
            if (grown == best).all():
                break
            grown_time = self.time(grown)
            if grown_time <= self.limit:
                best, time = grown, grown_time
            else:  # beside wide neighbours a step takes longer than it took when all groups shrank together
                trust /= 2
        return best

    def grown(self, widths: Ints, room: float) -> Ints:
        """The widths with a step more for groups, those cut deepest first, whose layers take ``room`` for that at most.

        ``room`` is a share of the time of the dense model.
        """
        grown = widths.copy()
        for number in np.argsort(widths / self.solver.sizes, kind="stable"):
            stairs, width = self.stairs[number], int(widths[number])
            more = min(stairs.round_up(width + 1), int(self.first[number]))
            taken = (stairs.seconds(more) - stairs.seconds(width)) / self.dense
            if more > width and 0 < taken <= room:
                grown[number], room = more, room - taken
        return grown

    def time(self, widths: Ints, *, again: bool = False) -> float:
        """The time of the model with these widths over that of the dense model.

        A candidate that comes close to the limit is run ``again``, for longer, and only that counts: of several that
        were run once, those come closest that had luck.
        """
        known = self.known.setdefault(widths.tobytes(), [])
        if not known or again:
            graph = self.solver.analysis.graph
            compact, _ = rewrite(graph, self.solver.analysis, self.solver.plan(widths))
            seconds = AGAIN * SECONDS if again else SECONDS
            times = seconds_of({"dense": graph, "compact": compact.eval()}, self.inputs, seconds)
            known[:] = (np.array(times["compact"]) / np.array(times["dense"])).tolist()
            if not again and abs(np.median(known) / self.limit - 1) <= CLOSE:
                return self.time(widths, again=True)
        return float(np.median(known))


class Stairs:
    """The widths of one group that are worth their time, ascending, and the time of its layers at each."""

    def __init__(self, widths: Sequence[int], times: Sequence[float]) -> None:
        """``widths``: ascending; the last is always worth it."""
        kept: list[tuple[int, float]] = []
        for width, taken in sorted(zip(widths, times, strict=True), reverse=True):
            if not kept or 1 - taken / kept[-1][1] >= WORTH * (1 - width / kept[-1][0]):
                kept.append((width, taken))
        kept.reverse()
        self.widths, self.times = [width for width, _ in kept], [taken for _, taken in kept]

    def round_up(self, width: int) -> int:
        """The next of the widths, or the last."""
        return self.widths[min(int(np.searchsorted(self.widths, width)), len(self.widths) - 1)]

    def seconds(self, width: int) -> float:
        """The time at a width, or at the next."""
        return self.times[min(int(np.searchsorted(self.widths, width)), len(self.widths) - 1)]


def measure_staircases(solver: Solver, inputs: Any) -> list[Stairs]:
    """The staircase of each group. All groups shrink together from level to level, as they do in a plan."""
    models: dict[str, nn.Module] = {}
    levels: list[Ints] = []
    for level in range(LEVELS, 0, -1):
        rounded = -(-(solver.sizes * level // LEVELS) // solver.multiple) * solver.multiple
        levels.append(np.clip(rounded, solver.floor, solver.cap))
        compact, _ = rewrite(solver.analysis.graph, solver.analysis, solver.plan(levels[-1]))
        models[str(level)] = compact.eval()
    timings = list(by_module(models, bind_inputs(inputs), LAYERS * SECONDS).values())
    staircases = []
    for number, group in enumerate(solver.analysis.groups.values()):
        paths = layers_of(group)
        times: dict[int, list[float]] = {}
        for widths, seconds in zip(levels, timings, strict=True):
            times.setdefault(int(widths[number]), []).append(sum(seconds.get(path, 0.0) for path in paths))
        ascending = sorted(times)
        means: Floats = np.array([np.mean(times[width]) for width in ascending])
        known = means.any()  # plain Python may call no module of a group
        staircases.append(Stairs(ascending, means.tolist() if known else [float(width) for width in ascending]))
    return staircases


def seconds_of(models: dict[str, nn.Module], inputs: Any, seconds: float) -> dict[str, list[float]]:
    """Seconds of a forward pass of each model, in turns."""
    return in_turns({name: make_forward(model, inputs) for name, model in models.items()}, seconds=seconds)


def in_seconds(limit: float | timedelta | None, dense: float) -> float:
    """The limit in seconds."""
    assert limit is not None
    if isinstance(limit, timedelta):
        return limit.total_seconds()
    return limit * dense if is_fraction(limit) else float(limit)
