"""Solve: the plan that meets a budget and keeps the channels of the highest scores."""

import logging
from collections.abc import Mapping
from contextlib import suppress

import numpy as np

from fxprune.budget.budget import Bounds, Budget
from fxprune.budget.cost import Floats
from fxprune.budget.even import EvenSolver
from fxprune.budget.latency import meet_latency
from fxprune.budget.shares import settle_shares
from fxprune.budget.solver import Solver, describe_rounding, meet_limits
from fxprune.channels.analysis import Analysis
from fxprune.errors import BudgetError
from fxprune.plan import Plan

logger = logging.getLogger("fxprune")


def solve_budget(analysis: Analysis, scores: Mapping[str, Floats], budget: Budget, bounds: Bounds) -> Plan:
    """The plan that meets ``budget`` and keeps the channels of the highest scores. The log has their multiples.

    Args:
        analysis: of the model.
        scores: group -> float[channels]; groups without a score stay whole.
        budget: what may remain.
        bounds: what may be done to each group.

    Raises:
        BudgetError: the budget is out of reach, or the model already meets it.
        PlanError: nothing can be pruned, or a pattern in ``keep`` matches nothing.
    """
    solver = settle_shares(Solver(analysis, scores, bounds), budget)
    logger.info("widths are %s", describe_rounding(analysis, bounds.round_to))
    limits = budget.limits()
    if budget.latency is not None:
        return solver.plan(meet_latency(solver, budget, limits))
    if not limits:
        return solver.plan(solver.cap)
    if bounds.scope == "local" and not budget.shares:
        for rounding in (np.rint, np.ceil):
            even = EvenSolver(analysis, scores, bounds, rounding)
            with suppress(BudgetError):
                return even.plan(meet_limits(even, limits, budget.tolerance))
        logger.info("no equal share of equally wide groups meets this budget: some of them keep more than others")
    return solver.plan(meet_limits(solver, limits, budget.tolerance))
