"""WhenItPays: its arithmetic, what it learns from the log, and what it writes there."""

import copy
import math
from typing import Any

import pytest
import torch
from laws import thinner
from runs import Thin, begin, traced, train
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune import Plan, Session, WhenItPays
from fxprune.errors import SessionError
from fxprune.training.log import Epoch, Log
from fxprune.training.when import observed_cost, observed_efficiency, remaining_flops


def session_at(epoch: int = 4, log: Log | None = None) -> tuple[Session, Plan]:
    session, _ = begin(steps=0)
    session.epoch = epoch
    session.log = log or Log()
    return session, thinner(session.analysis, 0, 0.5)


def record(
    step_time: float,
    flops: float = 1e6,
    removed: int = 0,
    cut_time: float = 0.0,
    first_step: float = 0.0,
    samples: int = 8,
) -> Epoch:
    return Epoch(
        1, 10, step_time, samples, flops, 100, 1e6, {"a": 4}, 0.1, first_step, removed=removed, cut_time=cut_time
    )


def test_the_share_of_the_flops_that_stays() -> None:
    session, plan = session_at()
    counts = []
    for model in (session.graph, fxprune.rewrite(session.graph, session.analysis, plan)[0]):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            copy.deepcopy(model)(*traced("residual")[1])
        counts.append(counter.get_total_flops())
    assert remaining_flops(session, plan) == pytest.approx(counts[1] / counts[0], rel=1e-9)
    assert remaining_flops(session, Plan({}, plan.sizes)) == 1.0


def test_the_prediction() -> None:
    session, plan = session_at(epoch=4)
    gone = 1 - remaining_flops(session, plan)
    assert 0.3 < gone < 0.9
    saved = 0.5 * gone * 0.2 * 5 * 100  # efficiency, FLOPs, seconds a step, epochs that remain, steps
    decision = WhenItPays(10, efficiency=0.5, cost=1.0)(session, plan, 0.2, 100)
    assert decision.go
    assert decision.step_time == pytest.approx(0.2 * (1 - 0.5 * gone))
    assert decision.why == (
        f"cut: {gone:.1%} of the FLOPs would go, {saved:.1f} s saved over 500 steps are expected, "
        "against 1.0 s for the cut"
    )
    for cost, margin, go in (
        (0.99 * saved, 1.0, True),
        (1.01 * saved, 1.0, False),
        (0.49 * saved, 2.0, True),
        (0.51 * saved, 2.0, False),
        (1.9 * saved, 0.5, True),
    ):
        decision = WhenItPays(10, margin, 0.5, cost)(session, plan, 0.2, 100)
        assert decision.go is go
        assert decision.why.startswith("cut: " if go else "no cut: ")


def test_without_a_cost_a_cut_takes_two_steps() -> None:
    session, plan = session_at(epoch=8)
    gone = 1 - remaining_flops(session, plan)
    enough = math.ceil(2 / (0.7 * gone))
    assert WhenItPays(10)(session, plan, 0.2, enough + 1).go
    assert not WhenItPays(10)(session, plan, 0.2, enough - 1).go


def test_the_last_epoch_is_too_late() -> None:
    session, plan = session_at(epoch=9)
    assert not WhenItPays(10, cost=0.0)(session, plan, 0.2, 10**6).go
    session, plan = session_at(epoch=30)
    assert not WhenItPays(10, cost=0.0)(session, plan, 0.2, 10**6).go
    session, plan = session_at(epoch=8)
    assert WhenItPays(10, cost=0.0)(session, plan, 0.2, 1).go
    assert not WhenItPays(10, cost=0.0)(session, plan, 0.0, 0).go, "an epoch without steps"
    assert not WhenItPays(10, cost=0.0)(session, Plan({}, plan.sizes), 0.2, 100).go, "nothing to gain"


def test_efficiency_is_learnt() -> None:
    cut = [record(0.1), record(0.1, removed=3), record(0.08, flops=0.5e6)]  # 20 % of the time for 50 % of the FLOPs
    assert observed_efficiency(Log(cut[:2]), 0.7) == 0.7
    assert observed_efficiency(Log(cut), 0.7) == pytest.approx(0.4)
    second = [record(0.08, 0.5e6, removed=2), record(0.04, 0.25e6)]  # 50 % for 50 %
    third = [record(0.04, 0.25e6, removed=2), record(0.032, 0.2e6)]  # 20 % for 20 %
    assert observed_efficiency(Log([*cut, *second[1:]]), 0.7) == pytest.approx(0.4), "no cut between the last two"
    assert observed_efficiency(Log([*cut, *second, *third]), 0.7) == pytest.approx(1.0)  # of 0.4, 1 and 1
    slower = [record(0.1, removed=3), record(0.12, flops=0.5e6)]
    assert observed_efficiency(Log(slower), 0.7) == 0.0
    grown = [record(0.1, removed=3), record(0.1, flops=0.5e6, samples=16)]
    assert observed_efficiency(Log(grown), 0.7) == 0.7, "a step of other samples says nothing"
    tiny = [record(0.1, removed=1), record(0.09, flops=0.995e6)]
    assert observed_efficiency(Log(tiny), 0.7) == 0.7, "nor does a cut of next to nothing"


def test_the_cost_is_learnt() -> None:
    usual = [record(0.1, first_step=9.0), record(0.1, first_step=0.3), record(0.1, first_step=0.5)]
    assert observed_cost(Log(usual), 0.2) == 0.2
    cut = [record(0.1, removed=3, cut_time=1.5, first_step=0.4), record(0.1, first_step=2.4)]
    assert observed_cost(Log([*usual, *cut]), 0.2) == pytest.approx(
        1.5 + 2.4 - 0.4
    )  # recompilation is in the first step
    assert observed_cost(Log(cut), 0.2) == 1.5
    cheap = [record(0.1, removed=3, cut_time=1.5, first_step=0.4), record(0.1, first_step=0.1)]
    assert observed_cost(Log([*usual, *cheap]), 0.2) == 1.5


def test_what_is_learnt_decides() -> None:
    session, plan = session_at(epoch=4)
    policy = WhenItPays(10, efficiency=0.7, cost=0.1)
    assert policy(session, plan, 0.1, 10).go
    no_gain = [record(0.1, removed=3, cut_time=0.1), record(0.1, flops=0.5e6)]
    session.log = Log(no_gain)
    decision = policy(session, plan, 0.1, 10)
    assert (decision.go, decision.step_time) == (False, 0.1)
    dear = [record(0.1, removed=3, cut_time=60.0), record(0.05, flops=0.5e6)]
    session.log = Log(dear)
    decision = policy(session, plan, 0.1, 10)
    assert not decision.go
    assert decision.why.endswith("against 60.0 s for the cut")


def test_a_decision_is_a_function_of_what_it_is_given() -> None:
    session, plan = session_at(log=Log([record(0.1, removed=3, cut_time=0.5), record(0.08, flops=0.5e6)]))
    before = (session.log.to_json(), session.analysis.sizes, torch.get_rng_state())
    policy = WhenItPays(20)
    decisions = {policy(session, plan, 0.1, 50) for _ in range(3)} | {copy.deepcopy(policy)(session, plan, 0.1, 50)}
    assert len(decisions) == 1
    assert (session.log.to_json(), session.analysis.sizes) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_the_log_has_prediction_and_outcome() -> None:
    session, inputs = begin(steps=0, passes=[Thin(part=0.4)], when=WhenItPays(4, cost=0.0))
    for _ in range(4):
        train(session, inputs, 3)
        session.epoch_end()
    first, second, *_, last = session.log
    assert first.removed > 0
    assert first.notes[0].startswith("cut: ")
    assert 0 < first.predicted < first.step_time
    assert f"to take {first.predicted * 1e3:.1f} ms, it takes {second.step_time * 1e3:.1f} ms" in second.notes[0]
    assert "the last cut: a step was expected" in str(session.log)
    assert (last.removed, last.predicted) == (0, None), "no steps remain"
    assert last.notes[-1].startswith("no cut: ")
    never, inputs = begin(steps=0, passes=[Thin()], when=WhenItPays(100, cost=1e9))
    train(never, inputs, 3)
    assert (never.epoch_end().removed, never.log[0].predicted) == (0, None)
    assert never.log[0].notes[0].endswith("against 1000000000.0 s for the cut")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0 must be a positive integer: the epochs of the run"),
        ({"epochs": 2.5}, r"epochs=2\.5 must be a positive integer"),
        ({"epochs": True}, "epochs=True must be a positive integer"),
        ({"epochs": 9, "margin": 0}, "margin=0 must be a number above 0"),
        ({"epochs": 9, "margin": "1"}, "margin='1' must be a number above 0"),
        ({"epochs": 9, "efficiency": -0.5}, r"efficiency=-0\.5 must be a number above 0"),
        ({"epochs": 9, "efficiency": math.nan}, "efficiency=nan must be a number above 0"),
        ({"epochs": 9, "cost": -1.0}, r"cost=-1\.0 must be a number at least 0, or None"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SessionError, match=message):
        WhenItPays(**options)
