"""When to cut: not at fixed intervals, but when a cut is expected to save more time than it costs."""

from dataclasses import dataclass
from statistics import median

import numpy as np

from fxprune.budget.cost import Channels, cost_of
from fxprune.errors import SessionError
from fxprune.options import allow_count, allow_number, check_options
from fxprune.plan import Plan
from fxprune.training.log import Log
from fxprune.training.run import Run


@dataclass(frozen=True)
class Decision:
    """Whether to make a cut, why, and the seconds that a step is expected to take after it."""

    go: bool
    why: str
    step_time: float


@dataclass(frozen=True)
class WhenItPays:
    """Cut when the time saved over the remaining steps exceeds the cost of the cut (rewrite and recompilation).

    The share of the step time that a share of the FLOPs is worth, and the cost of a cut, are taken from the cuts that
    the log already holds; before the first they are assumed. Use it with a pass that plans often
    (``PruneTrain(interval=1)``).

    Attributes:
        epochs: of the whole run.
        margin: how many times its cost a cut must save.
        efficiency: share of the step time saved for each share of the FLOPs, until a cut has shown it.
        cost: seconds that a cut costs, until one has shown it; None for two steps.
    """

    epochs: int
    margin: float = 1.0
    efficiency: float = 0.7
    cost: float | None = None

    def __post_init__(self) -> None:
        check_options(
            self,
            SessionError,
            epochs=allow_count(why=": the epochs of the run"),
            margin=allow_number(above=0),
            efficiency=allow_number(above=0),
            cost=allow_number(least=0).or_none(),
        )

    def __call__(self, run: Run, plan: Plan, step_time: float, steps: int) -> Decision:
        """Decide on ``plan`` at the end of an epoch of ``steps`` steps of ``step_time`` seconds."""
        remaining = max(self.epochs - run.epoch - 1, 0) * steps
        gone = 1 - remaining_flops(run, plan)
        efficiency = observed_efficiency(run.log, self.efficiency)
        cost = observed_cost(run.log, 2 * step_time if self.cost is None else self.cost)
        after = step_time * max(1 - efficiency * gone, 0.0)
        saved = (step_time - after) * remaining
        go = saved > self.margin * cost
        return Decision(
            go,
            f"{'cut' if go else 'no cut'}: {gone:.1%} of the FLOPs would go, {saved:.1f} s saved over {remaining} "
            f"steps are expected, against {cost:.1f} s for the cut",
            after,
        )


def remaining_flops(run: Run, plan: Plan) -> float:
    """The share of the FLOPs that ``plan`` leaves."""
    channels = Channels.of(run.analysis)
    cost = cost_of(run.analysis, "flops", channels)
    kept = np.ones(len(channels.group), dtype=bool)
    start = 0
    for name, size in run.analysis.sizes.items():
        if name in plan.keep:
            kept[start : start + size] = np.isin(np.arange(size), plan.keep[name])
        start += size
    dense = cost(np.ones_like(kept))
    return cost(kept) / dense if dense else 1.0


def observed_efficiency(log: Log, assumed: float) -> float:
    """The median share of the step time that went for each share of the FLOPs, over the cuts in the log."""
    shares = []
    for before, after in zip(log.epochs, log.epochs[1:], strict=False):
        flops = 1 - after.flops / before.flops if before.flops else 0.0
        same = before.samples == after.samples
        if before.removed and same and flops > 0.01 and before.step_time and after.step_time:
            shares.append((1 - after.step_time / before.step_time) / flops)
    return max(median(shares), 0.0) if shares else assumed


def observed_cost(log: Log, assumed: float) -> float:
    """The median seconds that the cuts in the log cost: the rewrite, and what the first step after it took longer."""
    pairs = list(zip(log.epochs, log.epochs[1:], strict=False))
    usual = [after.first_step for before, after in pairs if not before.removed]
    costs = [
        before.cut_time + max(after.first_step - median(usual), 0.0) if usual else before.cut_time
        for before, after in pairs
        if before.removed
    ]
    return median(costs) if costs else assumed
