"""Depth: which residual branches go, and what each of them costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np

from fxprune.budget.budget import Budget, is_fraction
from fxprune.budget.cost import Channels, cost_of, latency
from fxprune.budget.solver import matches_pattern
from fxprune.channels.analysis import Analysis
from fxprune.channels.groups import Group, Member
from fxprune.errors import BudgetError, PlanError
from fxprune.graph.traced import Mode
from fxprune.plan import Plan

LAYERS = "layers"  # the name of the group whose channels are branches


def group_layers(analysis: Analysis) -> Analysis:
    """``analysis`` with a single group, a channel of which is a residual branch: all of the layer that it ends in.

    What scores channels scores branches so.
    """
    members = [
        Member(name, 0, np.arange(max(analysis.shapes[name][:1], default=1)), np.full(analysis.shapes[name][0], number))
        for number, residuals in enumerate(analysis.layers.values())
        for name in residuals[Mode.EVAL].output
        if analysis.shapes[name]
    ]
    count = len(analysis.layers)
    group = Group(LAYERS, count, tuple(members), False, np.zeros(count, dtype=np.int64))
    return replace(analysis, groups={LAYERS: group})


def choose_layers(analysis: Analysis, scores: Mapping[str, float], budget: Budget, keep: tuple[str, ...]) -> Plan:
    """The plan that takes out the residual branches of the lowest scores, and nothing else.

    Args:
        analysis: of the model.
        scores: by branch; the highest stay.
        budget: its ``layers`` say how many stay, as a share or a count.
        keep: patterns of modules; a branch whose last layer is in one of them stays.

    Raises:
        BudgetError: there are no such branches, or so many can't be taken out.
        PlanError: the scores are not numbers.
    """
    assert budget.layers is not None
    total = len(scores)
    if bad := next((name for name, score in scores.items() if math.isnan(score)), None):
        raise PlanError(f"the criterion's score of the branch of {bad!r} is not a number (NaN)")
    left = math.floor(budget.layers * total + 1e-9) if is_fraction(budget.layers) else int(budget.layers)
    held = {name for name in scores if any(matches_pattern(name, pattern) for pattern in keep)}
    asked = f"layers={budget.layers:g}: {left} of {total} residual branches may stay"
    if not total:
        raise BudgetError(f"layers={budget.layers:g}: this model has no residual branch that could go whole")
    if left >= total:
        raise BudgetError(f"{asked}, and that is all of them: nothing to remove. Give a smaller number.")
    if len(held) > left:
        raise BudgetError(f"{asked}, but keep= holds {len(held)} of them")
    worst_first = sorted(scores.keys() - held, key=lambda name: (scores[name], list(scores).index(name)))
    return plan_without(analysis, worst_first[: total - left])


def plan_without(analysis: Analysis, layers: Sequence[str]) -> Plan:
    """The plan without some residual branches, and without the groups that live in them alone."""
    gone = {name for layer in layers for name in analysis.layers[layer][Mode.EVAL].state}
    inside = [
        name for name, group in analysis.groups.items() if all(member.parameter in gone for member in group.members)
    ]
    return Plan(dict.fromkeys(inside, ()), analysis.sizes, analysis.options, layers=layers)


def costs_of_layers(analysis: Analysis, kind: str) -> dict[str, float]:
    """What the model would cost less without each single residual branch; ``kind`` as for ``cost_of``."""
    whole = cost_now(analysis, kind)
    without = {name: analysis.after(plan_without(analysis, [name])) for name in analysis.layers}
    return {name: whole - cost_now(after, kind) for name, after in without.items()}


def cost_now(analysis: Analysis, kind: str) -> float:
    """What the model of ``analysis`` costs; ``kind`` as for ``cost_of``."""
    channels = Channels.of(analysis)
    return cost_of(analysis, kind, channels)(np.ones(len(channels.group), dtype=bool))


def budget_of_widths(analysis: Analysis, shallow: Analysis, budget: Budget) -> Budget | None:
    """What ``budget`` still asks of the widths of ``shallow``, the model without some branches; None where nothing.

    Fractions are of the model of ``analysis``.
    """
    limits: dict[str, Any] = {}
    for kind, limit in budget.limits():
        allowed = limit * cost_now(analysis, kind) if is_fraction(limit) else limit
        if cost_now(shallow, kind) > allowed:
            limits[kind] = int(allowed)
    if budget.shares:
        limits["channels"] = budget.shares
    if budget.latency is not None:
        limits["latency"] = in_time(analysis, budget.latency)
    return Budget(**limits, tolerance=budget.tolerance) if limits else None


def in_time(analysis: Analysis, limit: float | timedelta) -> timedelta:
    """A limit on latency as a time; a fraction is of what the model of ``analysis`` takes now."""
    if isinstance(limit, timedelta):
        return limit
    return timedelta(seconds=limit * latency(analysis.graph, analysis.example_inputs) if is_fraction(limit) else limit)
