"""Shares: groups that a pattern names keep a share of their channels, whatever the rest of a budget asks for."""

from collections.abc import Mapping

import numpy as np

from fxprune.budget.budget import Budget, is_fraction
from fxprune.budget.solver import Solver, UnreachableError, matches_pattern
from fxprune.channels.analysis import Analysis
from fxprune.channels.names import Bools, Ints
from fxprune.errors import BudgetError


def settle_shares(solver: Solver, budget: Budget) -> Solver:
    """``solver`` with the widths of all groups that ``budget.channels`` names.

    Raises:
        BudgetError: a pattern names no group, two name the same, or a share can't be met.
    """
    for pattern, named in groups_of_patterns(solver.analysis, budget.shares).items():
        alone = solver.settle(~named, solver.sizes)
        solver = solver.settle(named, meet_share(alone, named, pattern, budget))
    return solver


def groups_of_patterns(analysis: Analysis, shares: Mapping[str, float]) -> dict[str, Bools]:
    """bool[groups] for each pattern: the groups that are called after it, or after a layer in it."""
    result: dict[str, Bools] = {}
    for pattern in shares:
        named = np.array([matches_pattern(name.partition(":")[0], pattern) for name in analysis.groups], dtype=bool)
        named |= np.array([name == pattern for name in analysis.groups], dtype=bool)
        if not named.any():
            raise BudgetError(f"channels={{{pattern!r}: {shares[pattern]:g}}} {why_nothing(analysis, pattern)}")
        for other, taken in result.items():
            if (both := named & taken).any():
                raise BudgetError(
                    f"channels= names group {list(analysis.groups)[both.argmax()]!r} twice, by {other!r} and by "
                    f"{pattern!r}: of two shares, which? Make one of the patterns narrower."
                )
        result[pattern] = named
    return result


def why_nothing(analysis: Analysis, pattern: str) -> str:
    """Why a pattern names no group, and what to name in its place."""
    through = [
        name
        for name, group in analysis.groups.items()
        if any(matches_pattern(member.parameter, pattern) for member in group.members)
    ]
    if through:
        return (
            f"names layers, but no group is called after one of them: their channels go together with others, in "
            f"{' and '.join(map(repr, through[:3]))}. Name that group."
        )
    return "names no group of this model. print(analysis) has their names; * stands for anything."


def meet_share(solver: Solver, named: Bools, pattern: str, budget: Budget) -> Ints:
    """The widths of the groups ``named``, which are all that ``solver`` may cut."""
    total, share = int(solver.sizes[named].sum()), budget.shares[pattern]
    allowed = share * total if is_fraction(share) else share
    what = f"channels={{{pattern!r}: {share:g}}}"
    if allowed > total:
        raise BudgetError(f"{what} asks for more than there is: these groups have {total} channels.")
    try:
        # A count of channels can't be met closer than to the whole channel below it.
        return solver.meet(lambda widths: widths[named].sum() / allowed, max(budget.tolerance, 1 / allowed))
    except UnreachableError as miss:
        bound = "minimum=" if miss.above else "maximum="
        raise BudgetError(
            f"{what} can't be met: {allowed:g} of {total} channels may stay, and the nearest is "
            f"{int(miss.widths[named].sum())}. Of {int(named.sum())} groups {int((named & solver.fixed).sum())} are "
            f"kept whole, and {bound} holds the others."
        ) from None
