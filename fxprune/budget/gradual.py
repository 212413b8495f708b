"""Gradual: a budget that is met in several cuts, between which the model learns again."""

import numpy as np

from fxprune.budget.budget import Budget, is_fraction
from fxprune.budget.cost import Channels, cost_of
from fxprune.channels.analysis import Analysis
from fxprune.errors import BudgetError, require_type
from fxprune.options import allow_count, check_options


def gradual_budgets(analysis: Analysis, budget: Budget, steps: int) -> list[Budget]:
    """The budgets of ``steps`` cuts that lead to ``budget``: much goes at first, and less and less later.

    After cut t of n the share left + (1 - left) * (1 - t / n)^3 remains, where ``left`` remains in the end. All are
    absolute, so that each can be given for the model as it is by then. Cuts that would take less than the tolerance
    of the budget are left out, so there may be fewer. After Zhu and Gupta, "To prune, or not to prune: exploring the
    efficacy of pruning for model compression" (2017), equation 1.

    Args:
        analysis: of the model before any cut.
        budget: what may remain in the end.
        steps: how many cuts there are at most.

    Raises:
        BudgetError: ``budget`` limits time, which one count does not tell, or the model already meets it.
    """
    require_type(analysis, Analysis, "analysis", BudgetError)
    require_type(budget, Budget, "budget", BudgetError)
    check_options({"steps": steps}, BudgetError, steps=allow_count())
    if budget.latency is not None:
        raise BudgetError(f"latency={budget.latency} can't be spread over cuts: it is measured. Give flops or memory")
    channels = Channels.of(analysis)
    dense = np.ones(len(channels.group), dtype=bool)
    whole = {kind: cost_of(analysis, kind, channels)(dense) for kind, _ in budget.limits()}
    goal = {kind: limit * whole[kind] if is_fraction(limit) else limit for kind, limit in budget.limits()}
    if all(goal[kind] >= whole[kind] for kind in goal):
        raise BudgetError(f"the model already meets {budget}: there is nothing to spread over cuts")
    rows = [
        {kind: goal[kind] + max(0, whole[kind] - goal[kind]) * (1 - step / steps) ** 3 for kind in goal}
        for step in range(1, steps + 1)
    ]
    kept = [rows.pop()]
    for row in reversed(rows):
        if any(kept[0][kind] < (1 - 2 * budget.tolerance) * row[kind] for kind in goal):
            kept.insert(0, row)
    return [Budget(tolerance=budget.tolerance, **{kind: int(limit) for kind, limit in row.items()}) for row in kept]
