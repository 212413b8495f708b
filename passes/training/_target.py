"""A budget that a training pass meets by a certain epoch, in cuts that each save the same share."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np

from fxprune.budget.budget import Bounds, Budget, is_fraction
from fxprune.budget.cost import Channels, Floats, cost_of
from fxprune.budget.solve import solve_budget
from fxprune.channels.analysis import Analysis
from fxprune.errors import BudgetError, PlanError
from fxprune.options import Rule, allow_count, allow_number, check_options, is_integer
from fxprune.plan import Plan
from fxprune.training.run import Run


def restore_budget(budget: Any) -> Any:
    """``budget``; as it was where it comes from a checkpoint, which has its fields in a dict."""
    return Budget(**budget) if isinstance(budget, Mapping) else budget


def check_target(owner: Any) -> None:
    """Raise PlanError unless ``budget`` and ``by`` of a pass can be what they are."""
    if owner.budget is not None and not isinstance(owner.budget, Budget):
        raise PlanError(f"budget={owner.budget!r:.80} must be a fxprune.Budget, such as Budget(flops=0.5)")
    if owner.budget is not None and owner.budget.latency is not None:
        raise PlanError("a training pass is not steered by latency, which one run measures: give flops or memory")
    if owner.budget is not None and (owner.budget.shares or owner.budget.layers is not None):
        raise PlanError(
            f"budget={owner.budget}: a training pass comes near its budget step by step, and takes no shares of groups "
            "and no layers: give a limit on the whole model"
        )
    share, epoch = allow_number(above=0, most=1), allow_count(least=2)
    by = Rule(
        lambda value: epoch.holds(value) if is_integer(value) else share.holds(value),
        "must be the share of the run by which the budget is met, above 0 and at most 1, or an epoch of at least 2",
    )
    check_options(owner, PlanError, by=by)


def find_deadline(run: Run, by: float, owner: str) -> int:
    """The number of the epoch, from 1, by whose end the budget is met.

    Raises:
        PlanError: the length of the run is not known, or the first epoch, which measures, would be the only one.
    """
    if is_integer(by):
        return int(by)
    if run.epochs is None:
        raise PlanError(
            f"{owner} is to meet its budget by {by:g} of the run, whose length it does not know: give "
            f"Session(epochs=...), or {owner}(by=) the number of an epoch"
        )
    deadline = int(by * run.epochs + 0.5)
    if deadline < 2:
        raise PlanError(
            f"{owner} has {deadline} epochs to meet its budget, {by:g} of {run.epochs}, and needs 2: the first one "
            "measures. Train longer, or raise by="
        )
    return deadline


def measure_costs(analysis: Analysis, budget: Budget) -> dict[str, float]:
    """What the model costs now, by each kind that ``budget`` limits."""
    return measure_plan(analysis, Plan({}, analysis.sizes), budget)


def measure_plan(analysis: Analysis, plan: Plan, budget: Budget) -> dict[str, float]:
    """What the model costs after ``plan``."""
    channels = Channels.of(analysis)
    rows = [np.isin(range(size), plan.keep.get(name, range(size))) for name, size in analysis.sizes.items()]
    kept = np.concatenate([*rows, np.zeros(0, dtype=bool)])
    return {kind: float(cost_of(analysis, kind, channels)(kept)) for kind, _ in budget.limits()}


def budget_on_the_way(budget: Budget, dense: Mapping[str, float], share: float) -> Budget:
    """What may remain after ``share`` of the way from ``dense`` to ``budget``; each cut takes the same factor."""
    limits: dict[str, float | timedelta] = {}
    for kind, limit in budget.limits():
        goal = limit * dense[kind] if is_fraction(limit) else float(limit)
        limits[kind] = int(dense[kind] ** (1 - share) * min(goal, dense[kind]) ** share)
    return Budget(tolerance=budget.tolerance, **limits)  # type: ignore[arg-type]


def is_met(costs: Mapping[str, float], budget: Budget) -> bool:
    """Whether all limits of ``budget``, absolute ones, hold for ``costs``."""
    return all(costs[kind] <= limit for kind, limit in budget.limits())


def solve_near(analysis: Analysis, scores: Mapping[str, Floats], budget: Budget, bounds: Bounds) -> Plan:
    """The plan that meets ``budget``; where no widths come as near as its tolerance, the nearest below it.

    Raises:
        BudgetError: the budget is out of reach.
    """
    try:
        return solve_budget(analysis, scores, budget, bounds)
    except BudgetError:
        return solve_budget(analysis, scores, replace(budget, tolerance=0.99), bounds)
