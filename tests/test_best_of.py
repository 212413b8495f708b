"""BestOf: several criteria are tried, and the one after which the model answers most like before is taken."""

import logging

import pytest
import torch
from torch import nn

import fxprune
from fxprune import Budget, passes
from fxprune.errors import BudgetError, PlanError

HALF = Budget(channels=0.5)


def small_model() -> nn.Module:
    """Of the 8 hidden channels four matter: the others are copies of them, with larger weights that little reads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    with torch.no_grad():
        model[0].weight[4:] = 3 * model[0].weight[:4]
        model[0].bias[4:] = 3 * model[0].bias[:4]
        model[2].weight[:, 4:] *= 1e-3
    return model


def images(count: int = 64) -> torch.Tensor:
    return torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def restored_difference(model: nn.Module, criterion: passes.Criterion, data: torch.Tensor) -> float:
    """By hand: cut, restored on seven eighths, and compared on the last eighth."""
    graph = fxprune.trace(model, data[:2])
    analysis = fxprune.analyze(graph, data[:2])
    compact, param_map = fxprune.rewrite(graph, analysis, criterion.plan(analysis, HALF))
    held_out = len(data) // 8
    fxprune.restore(graph, compact, param_map, data[:-held_out])
    wanted, given = model(data[-held_out:]), compact(data[-held_out:])
    return ((given - wanted).norm() / wanted.norm()).item()


def test_each_criterion_is_judged_on_what_was_held_out():
    model, data = small_model(), images()
    criteria = [passes.Magnitude(), *(passes.Random(seed) for seed in range(3))]
    analysis = fxprune.analyze(model, data[:2])
    trials = passes.BestOf(data, criteria).try_criteria(analysis, HALF)
    expected = [restored_difference(model, criterion, data) for criterion in criteria]
    assert [trial.difference for trial in trials] == pytest.approx(expected, abs=1e-10)
    assert len({round(difference, 6) for difference in expected}) > 1
    best = criteria[expected.index(min(expected))]
    assert passes.BestOf(data, criteria).plan(analysis, HALF) == best.plan(analysis, HALF)


def test_prune_chooses_where_no_criterion_is_given(caplog):
    model, data = small_model(), images()
    with caplog.at_level(logging.INFO, "fxprune"):
        compact = fxprune.prune(model, data[:2], budget=HALF, data=data)
    chosen = fxprune.prune(model, data[:2], passes.BestOf(data), budget=HALF, data=data)
    torch.testing.assert_close(compact(data), chosen(data), rtol=0, atol=0)
    assert {"Magnitude", "OptimalBrainSurgeon"} <= set(caplog.text.split())


def test_labels_in_the_data_are_not_looked_at():
    model, data = small_model(), images()
    analysis = fxprune.analyze(model, data[:2])
    labelled = [(part, torch.zeros(16)) for part in data.split(16)]
    assert passes.BestOf(labelled).plan(analysis, HALF) == passes.BestOf(list(data.split(16))).plan(analysis, HALF)


def test_what_must_stay_stays_whatever_is_chosen():
    model, data = small_model(), images()
    analysis = fxprune.analyze(model, data[:2])
    with pytest.raises(BudgetError, match="1 of 1 groups are kept whole"):
        passes.BestOf(data).plan(analysis, HALF, keep=["*"])


def test_a_criterion_without_a_plan_is_told_and_passed_over(caplog):
    model, data = small_model(), images()
    criteria = [passes.Magnitude(minimum=0.9), passes.Magnitude()]
    analysis = fxprune.analyze(model, data[:2])
    with caplog.at_level(logging.INFO, "fxprune"):
        plan = passes.BestOf(data, criteria).plan(analysis, HALF)
    assert plan == passes.Magnitude().plan(analysis, HALF)
    assert "can't be met" in caplog.text
    with pytest.raises(BudgetError, match=r"channels=4 .* can't be met"):
        passes.BestOf(data, criteria[:1]).plan(analysis, HALF)


def test_outputs_that_are_no_numbers_are_refused():
    model, data = small_model(), images()
    analysis = fxprune.analyze(model, data[:2])
    data[-1] = torch.inf
    with pytest.raises(PlanError, match="are not finite"):
        passes.BestOf(data, [passes.Magnitude()]).plan(analysis, HALF)


def test_neither_criterion_nor_data():
    model, data = small_model(), images()
    with pytest.raises(PlanError, match=r"Give one, such as passes.Magnitude\(\), or data="):
        fxprune.prune(model, data[:2], budget=HALF)
