"""Gradual budgets: the cubic of Zhu and Gupta, each met in its turn, in a loop of cuts and in a session."""

import datetime
from typing import Any

import pytest
import torch
from models import MODELS, prepare
from torch import nn

import fxprune
from fxprune import Budget, cost, passes
from fxprune.errors import BudgetError

MODEL = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 5))
X = torch.randn(4, 8)


def test_the_schedule_is_cubic() -> None:
    """Equation 1 of the paper, of what is left: 0.2 + 0.8 (1 - t / 4)^3."""
    analysis = fxprune.analyze(MODEL, X)
    whole = cost.params(MODEL)
    found = [budget.params for budget in fxprune.gradual_budgets(analysis, Budget(params=0.2), 4)]
    expected = [0.2 + 0.8 * share for share in (27 / 64, 8 / 64, 1 / 64, 0.0)]
    assert found == pytest.approx([share * whole for share in expected], abs=1)
    both = fxprune.gradual_budgets(analysis, Budget(params=int(0.2 * whole), flops=0.5, tolerance=0.02), 4)
    assert [budget.params for budget in both] == found
    assert both[-1].flops == int(0.5 * cost.flops(MODEL, X))
    assert {budget.tolerance for budget in both} == {0.02}


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_each_budget_is_met_in_its_turn(steps: int) -> None:
    """None is met already by the cut before, however many there are."""
    model, inputs = prepare(MODELS["residual_projection"])
    goal = Budget(flops=0.4, tolerance=0.1)
    budgets = fxprune.gradual_budgets(fxprune.analyze(model, inputs), goal, steps)
    assert 1 <= len(budgets) <= steps
    whole: Any = cost.flops(model, inputs)
    compact = model
    for budget in budgets:
        compact = fxprune.prune(compact, inputs, passes.Magnitude(round_to=1), budget=budget)
    assert 0.36 * whole <= cost.flops(compact, inputs) <= 0.4 * whole


def test_in_a_session() -> None:
    model = nn.Sequential(*[nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 5)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with fxprune.Session(model, X, optimizer, verify=True) as session:
        budgets = fxprune.gradual_budgets(session.analysis, Budget(channels=0.25), 3)
        for budget in budgets:
            session.model(X).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            session.epoch_end()
            session.reconfigure(passes.Magnitude(round_to=1).plan(session.analysis, budget))
        assert session.graph.get_submodule("0").out_features == 16


WRONG: dict[str, tuple[Any, str]] = {
    "time": ((Budget(latency=0.5), 3), r"latency=0.5 can't be spread over cuts: it is measured"),
    "a time": ((Budget(latency=datetime.timedelta(seconds=1)), 3), r"latency=0:00:01 can't be spread"),
    "no steps": ((Budget(flops=0.5), 0), "steps=0 must be a positive integer"),
    "no budget": ((0.5, 3), "budget must be a Budget, but it is 0.5"),
    "met": ((Budget(flops=10**9), 3), r"the model already meets flops=1000000000"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use(case: str) -> None:
    (budget, steps), message = WRONG[case]
    with pytest.raises(BudgetError, match=message):
        fxprune.gradual_budgets(fxprune.analyze(MODEL, X), budget, steps)
    with pytest.raises(BudgetError, match="analysis must be a Analysis, but it is Sequential"):
        fxprune.gradual_budgets(MODEL, budget, steps)  # type: ignore[arg-type]
