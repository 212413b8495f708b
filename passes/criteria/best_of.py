"""Several criteria are tried at the budget, and the one after which the model answers most like before is kept."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxprune.budget.budget import Budget
from fxprune.channels.analysis import Analysis
from fxprune.errors import BudgetError, FxpruneError, PlanError, require_type
from fxprune.graph.inputs import Bound, tensors_in
from fxprune.graph.traced import Model, in_eval
from fxprune.plan import Plan
from fxprune.rewrite.restore import hold_out, read_arguments, restore
from fxprune.rewrite.rewrite import rewrite
from fxprune.tables import make_table, render_text
from fxprune.training import distributed

from ..base import Criterion
from .magnitude import Magnitude
from .optimal_brain_surgeon import OptimalBrainSurgeon

logger = logging.getLogger("fxprune")


@dataclass(frozen=True)
class _Trial:
    """What came of one criterion.

    Attributes:
        criterion: its name.
        plan: of it, None where it made none.
        difference: |y - y'| / |y| of the restored model's outputs y' from the original's y, on data held out.
        problem: why there is no plan.
    """

    criterion: str
    plan: Plan | None = None
    difference: float = math.inf
    problem: FxpruneError | None = None


@dataclass(frozen=True)
class BestOf:
    """Tries criteria at the budget, and keeps the plan after which the model answers most like before.

    An eighth of the data is held out. Each cut model is restored on the rest, and its outputs on the held-out part are
    compared with the original's. No labels are looked at, but by a criterion that asks for them. The table of what was
    tried goes to the log "fxprune".

    Attributes:
        data: batches as ``restore`` takes them.
        criteria: what is tried; default, ``Magnitude()`` and ``OptimalBrainSurgeon`` on the data.
    """

    data: Any
    criteria: Sequence[Criterion] = ()

    def plan(self, analysis: Analysis, budget: Budget, *, keep: Sequence[str] = ()) -> Plan:
        """The best plan that meets ``budget``.

        Args:
            analysis: of the model.
            budget: what may remain.
            keep: patterns of what stays whole, besides those of the criteria.

        Raises:
            BudgetError, PlanError: that of the first criterion, where none makes a plan.
            RestoreError: there is no data, or the model does not run on it.
        """
        trials = self.try_criteria(analysis, budget, keep=keep)
        logger.info("criteria tried\n%s", self.describe_trials(trials))
        return self.choose_plan(trials)

    def try_criteria(self, analysis: Analysis, budget: Budget, *, keep: Sequence[str] = ()) -> list[_Trial]:
        """One trial for each criterion; arguments and errors are those of ``plan``."""
        require_type(analysis, Analysis, "analysis", PlanError)
        require_type(budget, Budget, "budget", BudgetError)
        fitted, judged = hold_out(read_arguments(self.data, analysis.graph))
        wanted = run_batches(analysis.graph, judged)
        trials = []
        for criterion in self.criteria or (Magnitude(), OptimalBrainSurgeon(fitted)):
            name = type(criterion).__name__
            try:
                plan = criterion.plan(analysis, budget, keep=keep)
            except (BudgetError, PlanError) as error:
                trials.append(_Trial(name, problem=error))
                continue
            compact, param_map = rewrite(analysis.graph, analysis, plan)
            restore(analysis.graph, compact, param_map, fitted)
            trials.append(_Trial(name, plan, compare_outputs(wanted, run_batches(compact, judged))))
        return trials

    @staticmethod
    def choose_plan(trials: Sequence[_Trial]) -> Plan:
        """The plan of the best trial; errors are those of ``BestOf.plan``."""
        best = min(trials, key=lambda trial: trial.difference)
        if best.plan is not None and math.isfinite(best.difference):
            return best.plan
        raise trials[0].problem or PlanError(
            "the outputs on this data are not finite, before the cut or after it: no criterion can be chosen by them"
        )

    @staticmethod
    def describe_trials(trials: Sequence[_Trial]) -> str:
        """A table, the best first."""
        rows = [
            (
                trial.criterion,
                str(trial.problem or "").partition(";")[0],
                f"{trial.difference:.2%}" if trial.plan else "",
            )
            for trial in sorted(trials, key=lambda trial: trial.difference)
        ]
        return render_text(make_table(("criterion", "problem"), ("outputs differ, restored",), rows))


def run_batches(model: Model, batches: Sequence[Bound]) -> list[Tensor]:
    """The floating-point outputs of ``model`` in eval mode, of all batches."""
    with in_eval(model), torch.no_grad():
        outputs = [tensors_in(model(*args, **kwargs)) for args, kwargs in batches]
    return [tensor for tensors in outputs for tensor in tensors if tensor.is_floating_point()]


def compare_outputs(wanted: Sequence[Tensor], given: Sequence[Tensor]) -> float:
    """|given - wanted| / |wanted|, over all outputs together; infinite where it is not a number."""
    missing = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(wanted, given, strict=True))
    size = sum(float(tensor.double().square().sum()) for tensor in wanted)
    squares = distributed.mean_over_ranks(torch.tensor([missing, size], dtype=torch.float64))
    difference = math.sqrt(squares[0] / (squares[1] or 1.0))
    return difference if math.isfinite(difference) else math.inf
