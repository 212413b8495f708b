"""One call: trace, analyze, plan, rewrite, verify, restore."""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from fxprune.budget.budget import Budget
from fxprune.channels.analysis import Analysis, analyze
from fxprune.channels.groups import fold_names
from fxprune.errors import BudgetError, PlanError, require_type
from fxprune.graph.trace import trace
from fxprune.graph.traced import TracedModule, reasons_of, regions_of
from fxprune.plan import Plan
from fxprune.report.dump import Dump
from fxprune.rewrite.restore import restore
from fxprune.rewrite.rewrite import rewrite
from fxprune.rewrite.verify import verify as check

logger = logging.getLogger("fxprune")


class Plans(Protocol):
    """Anything that plans: the criteria of ``fxprune.passes``, or your own."""

    def plan(self, analysis: Analysis, budget: Budget, *, keep: Sequence[str] = ()) -> Plan:
        """A plan that meets ``budget`` and leaves whole what ``keep`` names."""


def prune(
    model: nn.Module,
    example_inputs: Any,
    criterion: Plans | None = None,
    *,
    budget: Budget,
    keep: Sequence[str] = (),
    verify: bool = True,
    data: Any = None,
) -> Any:
    """Prune ``model`` to ``budget`` and return the compact model: a GraphModule, or what ``trace`` makes of such a one.

    ``model`` is not changed.

    Where the environment variable FXPRUNE_DUMP names a folder, graphs, groups and plan are written there.

    Args:
        model: a model that ``trace`` accepts.
        example_inputs: a tensor, a tuple or dict of arguments, (args, kwargs), or a loader's batch.
        criterion: says which channels matter, for example ``passes.Magnitude()``; default, ``passes.BestOf(data)``,
            which tries some.
        budget: what may remain.
        keep: patterns of layers whose channels all stay ("layer4.*", "conv1").
        verify: check in float64 that the compact model is the masked original, before it is restored.
        data: batches to restore the compact model on, as ``restore`` takes them; labels are not looked at. The table by
            layer goes to the log "fxprune". Default, the cut weights stay as they are.

    Raises:
        FxpruneError: a subclass for each stage that can fail; see the stages.
    """
    require_type(budget, Budget, "budget", BudgetError)
    if criterion is None:
        criterion = default_criterion(example_inputs, data)
    if isinstance(criterion, type) or not hasattr(criterion, "plan"):
        raise PlanError(f"criterion={criterion!r} can't plan: give an instance such as passes.Magnitude()")
    graph = trace(model, example_inputs)
    if not isinstance(graph, TracedModule):
        parts, reason = ", ".join(fold_names(regions_of(graph))), reasons_of(graph).get("")
        logger.warning("%s is no single graph, its parts are: %s. %s", type(graph).__name__, parts, reason)
    analysis = analyze(graph, example_inputs)
    plan = criterion.plan(analysis, budget, keep=keep)
    dump = Dump.from_environment(example_inputs)
    dump.write("plan", graph, analysis, plan)
    compact, param_map = rewrite(graph, analysis, plan)
    dump.write("compact", compact, analysis.after(plan, compact))
    if verify:
        check(graph, compact, param_map, example_inputs)
    if data is not None:
        logger.info("restored after the cut\n%s", restore(graph, compact, param_map, data))
    if finish := getattr(criterion, "finish", None):
        finish(graph, compact, param_map)
    return compact


def default_criterion(example_inputs: Any, data: Any) -> Plans:
    """What chooses where the user names no criterion."""
    from fxprune.passes import BestOf  # the passes stand on this package

    call = "prune(model, example_inputs, criterion, budget=...)"
    if hasattr(example_inputs, "plan"):
        raise PlanError(
            f"example_inputs are missing: {call} got {example_inputs!r:.60} in their place. Give a tensor first"
        )
    if data is None:
        raise PlanError(
            f"the criterion is missing: {call}. Give one, such as passes.Magnitude(), or data=, on which some are tried"
        )
    return BestOf(data)
