"""GrowBatch: what cuts set free takes more samples a step, and the rates follow."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import thinner
from models import MODELS, prepare
from runs import Thin, begin, train
from torch import nn
from torch.optim import SGD, Optimizer, lr_scheduler

import fxprune
from fxprune import Plan, Session
from fxprune.errors import PlanError
from fxprune.passes import GrowBatch
from fxprune.training.memory import Memory
from fxprune.training.run import Run, TrainingPass


def sgd(parameters: Any) -> Optimizer:
    """Two groups of different rates."""
    first, *rest = parameters
    return SGD([{"params": [first], "lr": 0.02}, {"params": rest}], lr=0.01, momentum=0.9)


def rates(session: Session) -> list[float]:
    return [group["lr"] for group in session.optimizer.param_groups]


def growing(batch_size: int = 64, part: float = 0.5, **options: Any) -> tuple[Session, Any]:
    grow = GrowBatch(**{"granularity": 8, **options})
    return begin(make=sgd, passes=[Thin(part=part), grow], batch_size=batch_size)


@pytest.mark.parametrize(("rule", "power"), [("linear", 1.0), ("sqrt", 0.5), ("none", 0.0)])
def test_every_rate_follows_the_batch(rule: str, power: float) -> None:
    session, inputs = growing(rule=rule)
    assert rates(session) == [0.02, 0.01]
    session.epoch_end()
    factor = session.batch_size / 64
    assert factor >= 1.25
    assert session.batch_size % 8 == 0
    assert rates(session) == pytest.approx([0.02 * factor**power, 0.01 * factor**power], rel=1e-12)
    train(session, inputs)
    assert [session.log[0].samples, session.epoch_end().samples] == [64, round(64 * factor)]


def test_the_memory_that_is_free_is_used_and_no_more() -> None:
    session, inputs = growing()
    fixed, per_sample = session.memory()
    cap = session.memories[1].memory
    assert cap == fixed + 64 * per_sample, "the momentum counts"
    for _ in range(3):
        session.epoch_end()
        train(session, inputs)
        fixed, per_sample = session.memory()
        assert fixed + per_sample * session.batch_size <= cap
        assert fixed + per_sample * (session.batch_size + 8) > cap
        assert session.memories[1].memory == cap


def test_the_memory_can_be_given() -> None:
    session, _ = growing()
    fixed, per_sample = session.memory()
    session, _ = growing(memory=fixed + per_sample * 1000)
    session.epoch_end()
    after, less = session.memory()
    assert session.batch_size == int((fixed + per_sample * 1000 - after) / less) // 8 * 8 > 1000
    session, _ = growing(memory=fixed)
    session.epoch_end()
    assert session.batch_size == 64, "a batch does not shrink"
    assert rates(session) == [0.02, 0.01]


@pytest.mark.parametrize(("granularity", "maximum", "expected"), [(8, 64, 64), (8, 70, 64), (8, 80, 80), (1, 71, 71)])
def test_the_maximum(granularity: int, maximum: int, expected: int) -> None:
    session, _ = growing(granularity=granularity, maximum=maximum)
    session.epoch_end()
    assert session.batch_size == expected
    assert rates(session)[1] == pytest.approx(0.01 * expected / 64)


def test_granularity() -> None:
    sizes = {}
    for granularity in (1, 32, 1000):
        session, _ = growing(100, granularity=granularity)
        session.epoch_end()
        sizes[granularity] = session.batch_size
    assert sizes[32] == sizes[1] // 32 * 32 > 100
    assert sizes[1] % 32 != 0
    assert sizes[1000] == 100


def test_a_batch_that_would_grow_by_nothing_stays() -> None:
    session, _ = growing()
    session.reconfigure(Plan({}, session.analysis.sizes, session.analysis.options))
    assert (session.batch_size, rates(session)) == (64, [0.02, 0.01])


def test_the_highest_rate() -> None:
    session, inputs = growing(part=0.3, highest_lr=1.5, granularity=1)
    seen = []
    for _ in range(5):
        session.epoch_end()
        train(session, inputs)
        seen.append((session.batch_size, rates(session)[1]))
    assert [batch for batch, _ in seen] == sorted({batch for batch, _ in seen})
    assert seen[0][1] == pytest.approx(0.01 * seen[0][0] / 64)
    assert seen[-1][0] > 1.5 * 64
    assert seen[-1][1] == pytest.approx(0.015)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 9, eta_min=1e-3),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, eta_min=1e-3),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.2, 0.1], total_steps=12),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, [0.002, 0.001], [0.02, 0.01], step_size_up=3),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 9),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 6)], milestones=[4]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=5), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedules_are_scaled_from_there_on(kind: str) -> None:
    paths = []
    for granularity in (10**6, 8):
        session, inputs = growing(granularity=granularity)
        session.register(scheduler=SCHEDULERS[kind](session.optimizer))
        seen = []
        for epoch in range(9):
            train(session, inputs)
            session.registered["scheduler"].step()  # type: ignore[attr-defined]
            if epoch == 2:
                session.epoch_end()
            seen.append(rates(session))
        paths.append(seen)
        factor = session.batch_size / 64
    assert factor > 1
    assert paths[0][:2] == paths[1][:2]
    for dense, scaled in zip(paths[0][2:], paths[1][2:], strict=True):
        assert scaled == pytest.approx([rate * factor for rate in dense], rel=1e-9)


def test_a_plateau_has_a_lowest_rate() -> None:
    session, _ = growing()
    session.register(scheduler=(plateau := lr_scheduler.ReduceLROnPlateau(session.optimizer, min_lr=1e-3)))
    session.epoch_end()
    assert plateau.min_lrs == pytest.approx([1e-3 * session.batch_size / 64] * 2)


def test_optimizers_of_this_model_and_no_others() -> None:
    session, _ = growing()
    inner = SGD([session.graph.get_parameter("1.conv1.0.weight")], lr=0.5)
    foreign = SGD(nn.Linear(2, 2).parameters(), lr=0.5)
    schedule = lr_scheduler.StepLR(foreign, 2)
    session.register(mine=inner, others=foreign, theirs=schedule)
    session.epoch_end()
    assert inner.param_groups[0]["lr"] == pytest.approx(0.5 * session.batch_size / 64)
    assert (foreign.param_groups[0]["lr"], schedule.base_lrs) == (0.5, [0.5])


def test_a_rate_that_is_a_tensor_stays_that_tensor() -> None:
    grow = GrowBatch(granularity=8)
    rate = torch.tensor(0.01, dtype=torch.float64)
    session, _ = begin(make=lambda p: SGD(p, lr=rate), passes=[Thin(part=0.5), grow], batch_size=64)
    session.epoch_end()
    assert session.optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.01 * session.batch_size / 64)


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, Optimizer, Any]:
        model = prepare(MODELS["residual"])[0]
        optimizer = sgd(model.train().parameters())
        return model, optimizer, lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)

    TrainingPass.known["Thin"] = Thin
    model, optimizer, scheduler = start()
    inputs = prepare(MODELS["residual"])[1]
    grown = [Thin(part=0.25), GrowBatch(granularity=4, highest_lr=1.4)]
    session = Session(model, inputs, optimizer, grown, batch_size=64, progress=False)
    session.register(scheduler=scheduler)
    for epoch in range(4):
        if epoch == 2:
            session.save(tmp_path / "run.pt")
        train(session, inputs)
        session.epoch_end()
        scheduler.step()
    expected = (session.batch_size, rates(session), scheduler.base_lrs, copy.copy(session.memories[1]))

    model, optimizer, scheduler = start()
    session = Session.load(tmp_path / "run.pt", model, inputs, optimizer, progress=False)
    session.register(scheduler=scheduler)
    assert session.passes == tuple(grown)
    assert 64 < session.batch_size < expected[0]
    for _ in range(2):
        train(session, inputs)
        session.epoch_end()
        scheduler.step()
    assert (session.batch_size, rates(session), scheduler.base_lrs, copy.copy(session.memories[1])) == expected


def test_it_needs_to_know_the_batch_size() -> None:
    model, inputs = prepare(MODELS["residual"])
    with pytest.raises(PlanError, match=r"GrowBatch needs the first batch size: Session\(\.\.\., batch_size=128\)"):
        Session(model, inputs, sgd(model.parameters()), [GrowBatch()], progress=False)


class Fails(TrainingPass):
    def after_cut(self, run: Run, memory: Memory, param_map: fxprune.ParamMap) -> None:
        raise RuntimeError("no")


def test_a_cut_that_fails_later_leaves_batch_and_rates() -> None:
    session, _ = begin(make=sgd, passes=[GrowBatch(granularity=8), Fails()], batch_size=64)
    with pytest.raises(RuntimeError, match="no"):
        session.reconfigure(thinner(session.analysis, 0, 0.5))
    assert (session.batch_size, rates(session)) == (64, [0.02, 0.01])
    assert session.memories[0].scaled == 1.0


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_cut_that_fails_later_leaves_schedules_and_rates_that_are_tensors(kind: str) -> None:
    rate = torch.tensor(0.01, dtype=torch.float64)
    session, _ = begin(
        make=lambda p: SGD([{"params": (p := list(p))[:3]}, {"params": p[3:]}], lr=rate, momentum=0.9),
        passes=[GrowBatch(granularity=8), Fails()],
        batch_size=64,
    )
    scheduler = SCHEDULERS[kind](session.optimizer)
    session.register(scheduler=scheduler)
    before, value = copy.deepcopy(scheduler.state_dict()), rate.clone()
    with pytest.raises(RuntimeError, match="no"):
        session.reconfigure(thinner(session.analysis, 0, 0.5))
    assert str(scheduler.state_dict()) == str(before)
    assert torch.equal(rate, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": ["linear"]}, r"rule=\['linear'\] is not known"),
        ({"rule": "cubic"}, "rule='cubic' is not known; use 'linear', 'sqrt' or 'none'"),
        ({"memory": 0}, "memory=0 must be a number above 0: bytes, or None"),
        ({"memory": "8G"}, "memory='8G' must be a number above 0: bytes"),
        ({"memory": math.nan}, "memory=nan must be a number above 0"),
        ({"granularity": 0}, "granularity=0 must be a positive integer"),
        ({"granularity": True}, "granularity=True must be a positive integer"),
        ({"granularity": None}, "granularity=None must be a positive integer"),
        ({"maximum": 0}, "maximum=0 must be a positive integer"),
        ({"maximum": 12.5}, r"maximum=12\.5 must be a positive integer"),
        ({"highest_lr": 0.5}, r"highest_lr=0\.5 must be a number at least 1"),
        ({"highest_lr": None}, "highest_lr=None must be a number at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        GrowBatch(**options)
