"""Plans that meet a measured latency: the counted cost is searched, and each candidate is built and timed."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from fxprune.budget import Budget, is_fraction
from fxprune.channels.names import Ints
from fxprune.cost import device_of, latency
from fxprune.errors import BudgetError
from fxprune.inputs import map_tensors
from fxprune.rewrite import rewrite
from fxprune.solver import Solver, meet_limits
from fxprune.timing import stand_in

ROUNDS = 8
CLOSE = 0.03


def meet_latency(solver: Solver, budget: Budget, limits: Sequence[tuple[str, float]]) -> Ints:
    """The widths of the largest plan, by FLOPs, whose model runs within ``budget.latency`` seconds in eval mode.

    Each of a few candidates is rewritten and timed on the device of the weights, next to the dense model, so that a
    machine that slows down slows both. The limits on counted costs hold as well.
    """
    analysis = solver.analysis
    graph = analysis.graph
    device, _ = device_of(graph)
    if device.type == "meta":
        raise BudgetError("latency can't be measured on the meta device: load the weights, or give flops= instead")
    inputs = map_tensors(lambda tensor: stand_in(tensor, device), analysis.example_inputs)
    was_training = graph.training
    graph.eval()
    try:
        dense = latency(graph, inputs, seconds=0.5)
        limit = seconds_of(budget.latency, dense)
        if dense <= limit and not limits:
            raise BudgetError(f"the model already runs in {dense:.3g} s, within {limit:.3g} s: nothing to remove.")
        best = solver.widths(len(solver.worst_first), np.ones_like(solver.multiple))
        fastest = measured(solver, best, inputs) * dense
        if fastest > limit:
            raise BudgetError(
                f"a latency of {limit:.3g} s can't be met: the model takes {dense:.3g} s, the smallest plan "
                f"{fastest:.3g} s. Ask for more than that, lower minimum=, or keep fewer layers."
            )
        low, high = 0.0, 1.0
        for _ in range(ROUNDS):
            fraction = (low + high) / 2
            try:
                widths = meet_limits(solver, [*limits, ("flops", fraction)], budget.tolerance)
            except BudgetError:  # smaller than the smallest plan
                low = fraction
                continue
            seconds = measured(solver, widths, inputs) * dense
            if seconds > limit:
                high = fraction
                continue
            best, low = widths, fraction
            if seconds >= (1 - CLOSE) * limit:
                break
    finally:
        graph.train(was_training)
    return best


def measured(solver: Solver, widths: Ints, inputs: Any) -> float:
    """Seconds of the compact model over seconds of the dense one, timed in turns."""
    graph = solver.analysis.graph
    compact, _ = rewrite(graph, solver.analysis, solver.plan(widths))
    compact.eval()
    ratios = sorted(latency(compact, inputs, seconds=0.2) / latency(graph, inputs, seconds=0.2) for _ in range(3))
    return ratios[1]


def seconds_of(limit: float | timedelta | None, dense: float) -> float:
    """The limit in seconds."""
    assert limit is not None
    if isinstance(limit, timedelta):
        return limit.total_seconds()
    return limit * dense if is_fraction(limit) else float(limit)
