"""Checkpoints of format 1, which older code wrote: tests/data holds one of a session and one of a trainer.

Both are of one run over three epochs of two steps, with every training pass and a cut after the second epoch. That code
went on from there for two epochs more, with the losses in ``LOSSES``, and cut four channels after the first.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import Session, passes
from fxprune.errors import FileError, SessionError
from fxprune.training.trainers.shared import parse_progress, put_session, read_progress, resume_run, run_progress

DATA = Path(__file__).parent / "data"
LOSSES = [1.5179202556610107, 1.5135109424591064, 1.430553674697876, 1.4201143980026245]
PASSES = [
    passes.PruneTrain(ratio=0.5, interval=2, threshold=0.1),
    passes.ActivationDensity(saturation=1.0, patience=1, cooldown=1),
    passes.GrowBatch(granularity=8),
    passes.ClickTrain(select=0, hard=1, kernels=0.25),
    passes.DropBack(budget=40, start_decay=0.99, tracked_state=True),
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """PruneTrain says that the rate is high for its lambda, ActivationDensity that a group stays whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def network() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    body = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).train()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    fxprune.initialize(network(), 7)
    return torch.randn(8, 3, 6, 6), torch.arange(8) % 4


def test_a_checkpoint_of_a_session_goes_on() -> None:
    x, y = batch()
    model = network()
    session = Session.load(DATA / "session-1.pt", model, x, optimizer := sgd(model), progress=False)
    assert session.passes == tuple(PASSES)
    assert (session.epoch, session.step, session.batch_size) == (3, 6, 16)
    assert [record.removed for record in session.log] == [0, 8, 0]
    lasso, densities, room, kernels, tracking = session.memories
    assert lasso.groups == 2
    assert lasso.lambda_ == session.log[-1].values["lambda"]
    assert (densities.cuts, densities.since) == (1, 1)
    assert room.memory > 0
    assert set(kernels.removed) == {"3.weight"}
    assert int(sum(len(values["momentum_buffer"]) for values in tracking.state.values())) == tracking.budget == 40
    losses, removed = [], []
    for _ in range(2):
        for _ in range(2):
            optimizer.zero_grad()
            task = nn.functional.cross_entropy(session.model(x), y)
            (task + session.penalty(task)).backward()
            optimizer.step()
            losses.append(task.item())
        removed.append(session.epoch_end().removed)
    assert removed == [4, 0]
    assert losses == pytest.approx(LOSSES, rel=1e-5)


def test_a_checkpoint_of_a_trainer_goes_on(tmp_path: Path) -> None:
    (tmp_path / "fxprune.pt").write_bytes((DATA / "progress-1.pt").read_bytes())
    state = read_progress(tmp_path)
    x, _ = batch()
    owner = nn.Module()
    owner.net = fxprune.initialize(network(), 7)
    graph = put_session(owner, "net", x, state.plan)
    session = Session(graph, x, sgd(graph), PASSES, progress=False, batch_size=8)
    resume_run(session, state)
    assert (session.epoch, session.step, [record.removed for record in session.log]) == (3, 6, [0, 8, 0])
    assert sum(session.analysis.sizes.values()) == 8
    assert parse_progress(run_progress(session), "a copy").to_plain().keys() == state.to_plain().keys()
    assert session.memories[0].lambda_ == session.log[-1].values["lambda"]


def old(**changes: Any) -> dict[str, Any]:
    return torch.load(DATA / "progress-1.pt", weights_only=True) | changes


DAMAGED: dict[str, tuple[Any, str]] = {
    "another format": (old(format="fxprune progress 3"), "here does not hold what a session wrote"),
    "no epoch": ({key: value for key, value in old().items() if key != "epoch"}, "damaged: 'epoch'"),
    "a step that is text": (old(step="six"), "damaged: its step is 'six'"),
    "fewer memories": (old(saved=[{}]), "damaged: zip"),
    "a memory that is none": (old(saved=[3] * 5), "what a pass remembers is no dictionary"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_state_is_refused(damage: str) -> None:
    data, message = DAMAGED[damage]
    with pytest.raises(FileError, match=message):
        parse_progress(data, "here")


def test_what_a_pass_has_no_field_for_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    data = torch.load(DATA / "session-1.pt", weights_only=True)
    data["passes"][0]["saved"]["mu"] = 0.5
    torch.save(data, tmp_path / "run.pt")
    x, _ = batch()
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = sgd(model)
    with pytest.raises(
        FileError, match=r"run\.pt does not fit the passes: it remembers mu, for which Lasso has no field"
    ):
        Session.load(tmp_path / "run.pt", model, x, optimizer, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    Session(model, x, optimizer, progress=False).close()  # the optimizer is free


def test_other_passes_are_refused() -> None:
    x, _ = batch()
    model = network()
    session = Session(model, x, sgd(model), PASSES[:1], progress=False)
    with pytest.raises(SessionError, match=r"passes \['PruneTrain', .*'DropBack'\], this one has \['PruneTrain'\]"):
        resume_run(session, parse_progress(old(), "here"))
