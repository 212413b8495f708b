"""What a pass is.

A criterion scores channels, and plans from the scores and a budget. Passes are frozen dataclasses: their fields are
their options.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.budget.budget import Bounds, Budget, patterns_of
from fxprune.budget.cost import Floats, marginal
from fxprune.budget.depth import LAYERS, budget_of_widths, choose_layers, costs_of_layers, group_layers
from fxprune.budget.solve import solve_budget
from fxprune.channels.analysis import Analysis
from fxprune.channels.groups import Group
from fxprune.errors import BudgetError, PlanError, require_type
from fxprune.graph.layers import reads_axis
from fxprune.plan import Plan
from fxprune.rewrite.param_map import ParamMap
from fxprune.rewrite.rewrite import rewrite


@dataclass(frozen=True, kw_only=True)
class Criterion(Bounds, ABC):
    """Scores channels; ``plan`` removes those of the lowest scores. Its options are those of ``Bounds``.

    Attributes:
        per_cost: whether ``plan`` divides the score of a channel by what goes with it of what the budget limits.
        scores_layers: whether ``score`` makes sense of a channel that is a whole layer, so that it can choose branches.
    """

    per_cost: ClassVar[bool] = False
    scores_layers: ClassVar[bool] = True

    @abstractmethod
    def score(self, analysis: Analysis) -> Mapping[str, Floats]:
        """float64[channels] for each group that can be scored; the others stay whole."""

    def plan(self, analysis: Analysis, budget: Budget, *, keep: Sequence[str] = ()) -> Plan:
        """The plan that meets ``budget``.

        Args:
            analysis: of the model.
            budget: what may remain.
            keep: patterns of what stays whole, besides those of the pass.

        Raises:
            BudgetError: the budget is out of reach; names the nearest value. Or the model already meets it.
            PlanError: nothing can be pruned, or a pattern matches nothing.
        """
        require_type(analysis, Analysis, "analysis", PlanError)
        require_type(budget, Budget, "budget", BudgetError)
        bounds = Bounds(
            minimum=self.minimum,
            maximum=self.maximum,
            keep=(*patterns_of(self.keep), *patterns_of(keep)),
            round_to=self.round_to,
            scope=self.scope,
        )
        if budget.layers is None:
            plan = self.plan_widths(analysis, budget, bounds)
        else:
            plan = self.plan_layers(analysis, budget, bounds)
        return replace(plan, source={"budget": str(budget), "scope": self.scope})

    def plan_widths(self, analysis: Analysis, budget: Budget, bounds: Bounds) -> Plan:
        """The plan whose widths meet ``budget``."""
        scores = self.score(analysis)
        if self.per_cost:
            scores = divide_by_cost(analysis, scores, budget)
        return solve_budget(analysis, scores, budget, bounds)

    def plan_layers(self, analysis: Analysis, budget: Budget, bounds: Bounds) -> Plan:
        """The plan without the residual branches of the lowest scores, and with widths that meet the other limits."""
        first = choose_layers(analysis, self.score_layers(analysis, budget), budget, patterns_of(bounds.keep))
        compact, _ = rewrite(analysis.graph, analysis, first)
        shallow = analysis.after(first, compact)
        rest = budget_of_widths(analysis, shallow, budget)
        return first if rest is None else first.then(self.plan_widths(shallow, rest, bounds))

    def score_layers(self, analysis: Analysis, budget: Budget) -> dict[str, float]:
        """The score of each residual branch; of what ``budget`` limits first, for what the branch costs.

        Raises:
            PlanError: this criterion can't say what a whole branch matters.
        """
        if not analysis.layers:
            return {}
        found = self.score(group_layers(analysis)).get(LAYERS) if self.scores_layers else None
        if found is None:
            raise PlanError(
                f"layers={budget.layers}: {type(self).__name__} can't say what a whole branch of this model matters. "
                "Use passes.Taylor, passes.Fisher or passes.Magnitude."
            )
        scores = dict(zip(analysis.layers, found.tolist(), strict=True))
        limits = budget.limits()
        if not limits:
            return scores
        costs = costs_of_layers(analysis, limits[0][0])
        return {name: score / max(costs[name], 1.0) for name, score in scores.items()}

    def finish(self, graph: nn.Module, compact: nn.Module, param_map: ParamMap) -> None:
        """What a method does to ``compact`` after the cut from ``graph``: nothing, for most."""


def weights_of(analysis: Analysis) -> dict[str, Tensor]:
    """The parameters (not buffers) that some group lives on, by name, detached and in float32 at least."""
    parameters = dict(analysis.graph.named_parameters())
    members = dict.fromkeys(member.parameter for group in analysis.groups.values() for member in group.members)
    found = {name: detach_weights(parameters[name]) for name in members if name in parameters}
    if any(parameter.is_meta for parameter in found.values()):
        raise PlanError(
            "the weights are on the meta device and have no values to score. Use passes.Random, or load them."
        )
    return found


def divide_by_cost(analysis: Analysis, scores: Mapping[str, Floats], budget: Budget) -> dict[str, Floats]:
    """Scores over what goes with each channel of what ``budget`` limits first; over FLOPs where it limits time."""
    kind = next((kind for kind, _ in budget.limits()), "flops" if budget.latency is not None else "channels")
    costs = marginal(analysis, kind)
    return {name: its / np.maximum(costs[name], 1.0) for name, its in scores.items()}


def share_in_layers(analysis: Analysis, group: Group, scores: Floats) -> Floats:
    """How much of how many layers goes with each channel, float64[channels].

    That is its share of its group's scores, times the layers with weights that the group goes through: a channel of a
    residual stream is missed by all of them, one inside a block by two.
    """
    layers = sum(len(analysis.shapes[member.parameter]) > 1 for member in group.members)
    total = scores.sum()
    return max(layers, 1) * (np.full(group.size, 1 / group.size) if total == 0 else scores / total)


def normalize_scores(scores: Floats) -> Floats:
    """Scores over their mean, so that groups compare; all equal where the mean is 0."""
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


def detach_weights(tensor: Tensor) -> Tensor:
    """A tensor without its gradient history, in float32 at least."""
    value = tensor.detach()
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def input_axis(graph: nn.Module, parameter: str) -> int | None:
    """The axis along which a weight reads its layer's input, if it has one."""
    path, _, leaf = parameter.rpartition(".")
    module = graph.get_submodule(path)
    return reads_axis(module) if leaf == "weight" else None
