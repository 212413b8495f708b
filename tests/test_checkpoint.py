"""Checkpoints: a run that is killed at any moment goes on bit-equal; files that are damaged change nothing."""

import copy
import errno
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws import EVERY_OPTIMIZER, thinner
from runs import Thin, assert_equal, begin, train
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from training_run import EPOCHS, EXAMPLE, PASSES, Run, network

import fxprune
from fxprune import Plan, Session, passes
from fxprune.errors import FileError, SessionError
from fxprune.training.memory import derived_field
from fxprune.training.run import TrainingPass

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:PruneTrain. with lambda:UserWarning")


def noted(run: Run, epochs: int = EPOCHS) -> dict[str, str]:
    """What a run writes down until so many epochs have ended."""
    records: dict[str, str] = {}
    run.train(epochs, records.__setitem__)
    return records


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run writes down that nothing disturbs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return noted(Run(tmp_path_factory.mktemp("run") / "run.pt"))


# ---------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(("epochs", "cuts"), [(1, 0), (3, 1), (6, 3)])
def test_a_run_goes_on_bit_equal(epochs: int, cuts: int, tmp_path: Path, uninterrupted: dict[str, str]) -> None:
    first = Run(tmp_path / "run.pt")
    records = noted(first, epochs)
    assert sum(bool(epoch.removed) for epoch in first.session.log) == cuts
    for disturb in (random.seed, np.random.seed, torch.manual_seed):
        disturb(99)
    second = Run(tmp_path / "run.pt")
    assert (second.session.epoch, second.session.step) == (first.session.epoch, first.session.step)
    assert second.session.log.to_json() == first.session.log.to_json()
    assert second.session.analysis.sizes == first.session.analysis.sizes
    assert second.session.passes == first.session.passes == tuple(PASSES)
    assert_equal("model", dict(second.session.graph.state_dict()), dict(first.session.graph.state_dict()))
    assert str(second.session.graph) == str(first.session.graph)
    assert records | noted(second) == uninterrupted


def test_a_run_goes_on_after_every_epoch(tmp_path: Path, uninterrupted: dict[str, str]) -> None:
    records: dict[str, str] = {}
    for epoch in range(1, EPOCHS + 1):
        records |= noted(Run(tmp_path / "run.pt"), epoch)
    assert records == uninterrupted


@pytest.mark.parametrize("optimizer", ["adamw amsgrad", "sgd fused", "adam foreach", "asgd", "rprop", "lion"])
def test_optimizers_go_on_bit_equal(optimizer: str, tmp_path: Path) -> None:
    def make(parameters: Any) -> Optimizer:
        return EVERY_OPTIMIZER[optimizer](parameters)

    uninterrupted, inputs = begin("residual", make)
    uninterrupted.reconfigure(thinner(uninterrupted.analysis, 0))
    train(uninterrupted, inputs)
    uninterrupted.save(tmp_path / "run.pt")
    fresh, _ = begin("residual", make, steps=0)
    fresh.close()
    resumed = Session.load(tmp_path / "run.pt", *reborn(make), progress=False)
    assert_equal("optimizer", resumed.optimizer.state_dict(), uninterrupted.optimizer.state_dict())
    for cut in (1, 2):
        assert train(resumed, inputs, 2) == train(uninterrupted, inputs, 2)
        for session in (uninterrupted, resumed):
            session.reconfigure(thinner(session.analysis, cut))
    assert_equal("model", dict(resumed.graph.state_dict()), dict(uninterrupted.graph.state_dict()))


def reborn(make: Callable[[Any], Optimizer] = EVERY_OPTIMIZER["momentum"]) -> tuple[nn.Module, Any, Optimizer]:
    """The model, inputs and optimizer that ``begin`` makes, with other weights."""
    session, inputs = begin("residual", make, steps=0)
    session.close()
    with torch.no_grad():
        for parameter in session.graph.parameters():
            parameter.fill_(0.5)
    return session.graph, inputs, session.optimizer


def test_a_branch_that_went_is_gone_after_loading(tmp_path: Path) -> None:
    uninterrupted, inputs = begin()
    sizes, options = uninterrupted.analysis.sizes, uninterrupted.analysis.options
    uninterrupted.reconfigure(Plan({"1.conv1.0": (), "2.conv1.0": ()}, sizes, options, ["1.conv1.0"]))
    train(uninterrupted, inputs)
    uninterrupted.save(tmp_path / "run.pt")
    resumed = Session.load(tmp_path / "run.pt", *reborn(), progress=False)
    assert_equal("optimizer", resumed.optimizer.state_dict(), uninterrupted.optimizer.state_dict())
    assert "1.conv1.0.weight" not in resumed.graph.state_dict()
    assert train(resumed, inputs, 3) == train(uninterrupted, inputs, 3)


def test_a_checkpoint_of_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    noted(Run(tmp_path / "run.pt"), 4)
    resumed = Run(tmp_path / "run.pt")
    resumed.session.save(tmp_path / "again.pt")
    first, again = (torch.load(tmp_path / name, weights_only=True) for name in ("run.pt", "again.pt"))
    assert_equal("file", again, first)


def test_what_is_registered_late_gets_its_state_then(tmp_path: Path) -> None:
    run = Run(tmp_path / "run.pt")
    noted(run, 4)
    model = network()
    session = Session.load(tmp_path / "run.pt", model, EXAMPLE, SGD(model.parameters(), lr=1.0), progress=False)
    wrong = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="module"):
        session.register(ema=wrong)
    assert "ema" not in session.registered
    right = torch.optim.swa_utils.AveragedModel(session.model)
    session.register(ema=right)
    assert_equal("ema", dict(right.state_dict()), dict(run.ema.state_dict()))


def test_passes_can_be_given_and_options_changed(tmp_path: Path) -> None:
    noted(Run(tmp_path / "run.pt"), 2)
    model = network()
    changed = [passes.PruneTrain(ratio=0.2, interval=1), Thin(7)]
    session = Session.load(
        tmp_path / "run.pt", model, EXAMPLE, SGD(model.parameters(), lr=1.0), changed, batch_size=3, progress=False
    )
    assert session.passes == tuple(changed)
    assert session.batch_size == 8  # what the run had


# ----------------------------------------------------------------------------------- what can't be read


@contextmanager
def nothing_happens(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """The block changes neither model nor optimizer nor random numbers, and hooks onto nothing."""

    def all_of_it() -> Any:
        state = dict(model.state_dict()), optimizer.state_dict(), torch.get_rng_state(), random.getstate()
        hooks = [len(getattr(optimizer, f"_optimizer_step_{when}_hooks")) for when in ("pre", "post")]
        numbers = np.random.get_state(legacy=True)[1].tolist()
        return copy.deepcopy((*state, numbers, hooks, [module.training for module in model.modules()]))

    held, before = list(model.parameters()), all_of_it()
    yield
    assert_equal("all", all_of_it(), before)
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with cuts."""
    path = tmp_path_factory.mktemp("checkpoint") / "run.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        noted(Run(path), 4)
    return path


def refused(path: Path, message: str, model: nn.Module | None = None, **arguments: Any) -> None:
    """Loading ``path`` gives one FileError that says ``message``, and changes nothing."""
    model = model or network()
    optimizer = arguments.pop("optimizer", None) or SGD(model.parameters(), lr=0.05, momentum=0.9)
    with nothing_happens(model, optimizer), pytest.raises(FileError, match=message):
        Session.load(path, model, EXAMPLE, optimizer, progress=False, **arguments)


def test_truncated_files_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    data = checkpoint.read_bytes()
    lengths = {0, 1, 3, 4, 10, 100, len(data) - 1, len(data) - 22, len(data) - 23}
    lengths |= {len(data) * part // 30 for part in range(30)}
    for length in sorted(lengths):
        (tmp_path / "run.pt").write_bytes(data[:length])
        refused(tmp_path / "run.pt", r"can't read a checkpoint from .*run\.pt: .*truncated, or another kind of file")


def foreign(folder: Path) -> dict[str, tuple[Callable[[Path], Any], str]]:
    compact, _ = begin("residual", steps=0)
    compact.reconfigure(thinner(compact.analysis, 0))
    cannot = r"can't read a checkpoint from .*file: "
    return {
        "text": (lambda p: p.write_text("epoch 1"), cannot),
        "nothing there": (lambda p: None, "there is no file"),
        "a folder": (lambda p: p.mkdir(), "there is no file"),
        "a picture": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200)), cannot),
        "weights": (
            lambda p: torch.save(network().state_dict(), p),
            r"file is not a checkpoint that Session\.save wrote",
        ),
        "a list": (lambda p: torch.save([1, 2], p), "is not a checkpoint"),
        "a model": (lambda p: torch.save(network(), p), cannot + "UnpicklingError"),
        "a compact model": (lambda p: fxprune.save(compact.graph, p), cannot),
        "a plan": (lambda p: p.write_text(json.dumps(Plan({}, {"a": 1}).to_json())), cannot),
        "another format": (lambda p: torch.save({"format": "fxprune session 0"}, p), r"\('fxprune session 1'\)"),
        "only the format": (lambda p: torch.save({"format": "fxprune session 1"}, p), "KeyError: 'plan'"),
    }


FOREIGN = [
    "text",
    "nothing there",
    "a folder",
    "a picture",
    "weights",
    "a list",
    "a model",
    "a compact model",
    "a plan",
    "another format",
    "only the format",
]


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_refused(kind: str, tmp_path: Path) -> None:
    make, message = foreign(tmp_path)[kind]
    make(tmp_path / "file")
    refused(tmp_path / "file", message)


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("form", ["zip", "old", "pickle", "in the log"])
def test_hostile_files_run_nothing(form: str, checkpoint: Path, tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "run.pt"
    data = torch.load(checkpoint, weights_only=True)
    if form == "in the log":
        data["log"][0]["notes"] = [Hostile(trap)]
        torch.save(data, path)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(data | {"extra": Hostile(trap)}))
    else:
        torch.save(data | {"extra": Hostile(trap)}, path, _use_new_zipfile_serialization=form == "zip")
    refused(path, r"can't read a checkpoint from .*: UnpicklingError")
    assert not trap.exists()


def test_the_trap_works(tmp_path: Path) -> None:
    """The object above does run code where files are not read safely."""
    torch.save(Hostile(tmp_path / "trap"), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "trap").exists()


def wider() -> nn.Module:
    model = network()
    model[0][0] = nn.Conv2d(3, 10, 3, padding=1, bias=False)
    model[0][1] = nn.BatchNorm2d(10)
    model[1] = nn.Conv2d(10, 8, 1)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wider, r"does not fit this Sequential and its optimizer: this plan was made for another model"),
        (
            lambda: network().double(),
            r"does not run on example_inputs: .*Input type",
        ),
        (lambda: network()[:3], "group '[^']+' is in one but not in the other|does not fit"),
    ],
)
def test_other_models_are_refused(make: Callable[[], nn.Module], message: str, checkpoint: Path) -> None:
    refused(checkpoint, message, make())


def test_other_optimizers_are_refused(checkpoint: Path) -> None:
    model = network()
    first, *remaining = model.parameters()
    groups = SGD([{"params": [first]}, {"params": remaining}], lr=1.0)
    refused(
        checkpoint, r"the optimizer has \[1, \d+\] parameters in its groups, the file \[\d+\]", model, optimizer=groups
    )
    refused(checkpoint, r"has \[\d+\] parameters in its groups", model, optimizer=SGD(remaining, lr=1.0))
    refused(checkpoint, "the optimizer is Adam, the file's SGD", model, optimizer=Adam(model.parameters()))
    stranger = SGD(network().parameters(), lr=1.0)
    refused(checkpoint, r"a parameter of shape \(8, 3, 3, 3\) that is not in the model", model, optimizer=stranger)


def test_unknown_passes_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    data = torch.load(checkpoint, weights_only=True)
    asked = [Thin(4)]
    refused(checkpoint, r"it has the passes \['PruneTrain', 'Thin'\], not those that were given", passes=asked)
    for name, message in {
        "Unheard": "it has a pass 'Unheard', which is not known here: import it first, or give passes=",
        "PruneTrain": "unexpected keyword argument 'part'",
    }.items():
        damaged = copy.deepcopy(data)
        damaged["passes"][1]["name"] = name
        torch.save(damaged, tmp_path / "run.pt")
        refused(tmp_path / "run.pt", message)
    damaged = copy.deepcopy(data)
    damaged["passes"][0]["options"]["ratio"] = 2.0
    torch.save(damaged, tmp_path / "run.pt")
    refused(tmp_path / "run.pt", r"ratio=2\.0 must be a number above 0 and below 1")


FIELDS = ["plan", "model", "aliases", "start", "optimizer", "passes", "registered", "epoch", "step", "batch_size"]
FIELDS += ["log", "random"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("how", ["lacking", "text", "torn"])
def test_damaged_fields_are_refused(field: str, how: str, checkpoint: Path, tmp_path: Path) -> None:
    data = torch.load(checkpoint, weights_only=True)
    assert set(FIELDS) == data.keys() - {"format", "epochs"}  # which older files lack
    if how == "lacking":
        del data[field]
    elif how == "text":
        data[field] = "nonsense"
    elif isinstance(data[field], dict) and data[field]:
        data[field] = {key: 3 for key in data[field]}
    elif isinstance(data[field], list):
        data[field] = [{key: 3 for key in entry} for entry in data[field]]
    else:
        data[field] = [1.5]
    torch.save(data, tmp_path / "run.pt")
    refused(tmp_path / "run.pt", r"run\.pt does not fit this Sequential and its optimizer: .")


# --------------------------------------------------------------------------------- what can't be written


def test_a_checkpoint_that_can_not_be_written_leaves_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "run.pt")
    noted(run, 1)
    before = (tmp_path / "run.pt").read_bytes()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FileError, match=r"can't write a checkpoint to .*run\.pt: .*No space left on device"):
            run.session.save(tmp_path / "run.pt")
    memory = run.session.memories[0]
    coefficient, memory.lambda_ = memory.lambda_, Hostile(tmp_path)
    with pytest.raises(FileError, match="something in it is not plain data and would not load again"):
        run.session.save(tmp_path / "run.pt")
    memory.lambda_ = coefficient
    with pytest.raises(FileError, match=r"can't write a checkpoint to .*nowhere"):
        run.session.save(tmp_path / "nowhere" / "run.pt")
    with pytest.raises(FileError, match=r"path must be a str or Path, but it is 3 \(int\)"):
        run.session.save(3)  # type: ignore[arg-type]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.pt"]
    assert (tmp_path / "run.pt").read_bytes() == before
    run.session.save(str(tmp_path / "run.pt"))


def test_a_pass_without_fields_can_not_be_saved(tmp_path: Path) -> None:
    class Loose(TrainingPass):
        pass

    session, _ = begin(passes=[Loose()])
    with pytest.raises(FileError, match="Loose is no dataclass, so its options can't be saved"):
        session.save(tmp_path / "run.pt")


@dataclass
class Total:
    count: int = 0
    sum: Any = None
    seen: list[int] = derived_field(list)


@dataclass(frozen=True)
class Counts(TrainingPass[Total]):
    by: int = 2

    def begin(self, run: Session) -> Total:
        return Total()

    def after_step(self, run: Session, memory: Total) -> None:
        memory.count += self.by
        memory.sum = (torch.zeros(2) if memory.sum is None else memory.sum) + 1
        memory.seen.append(memory.count)


@pytest.mark.parametrize("value", [lambda: None, object()])
def test_what_is_not_plain_data_can_not_be_saved(value: Any, tmp_path: Path) -> None:
    session, _ = begin(passes=[Counts()])
    session.memories[0].sum = value
    with pytest.raises(FileError, match="can't write a checkpoint to"):
        session.save(tmp_path / "run.pt")
    assert not list(tmp_path.iterdir())


def test_what_a_pass_keeps_beside_its_fields_can_not_be_saved(tmp_path: Path) -> None:
    session, _ = begin(passes=[Counts()])
    session.memories[0].average = 0.5
    with pytest.raises(FileError, match=r"Total\.average is no field of what the pass remembers"):
        session.save(tmp_path / "run.pt")
    assert not list(tmp_path.iterdir())


def test_what_a_pass_remembers_comes_back(tmp_path: Path) -> None:
    session, inputs = begin(passes=[Counts(3)])
    session.save(tmp_path / "run.pt")
    resumed = Session.load(tmp_path / "run.pt", *reborn(), progress=False)
    train(resumed, inputs)
    assert resumed.memories[0].count == 9
    assert resumed.memories[0].sum.tolist() == [3, 3]
    assert resumed.memories[0].seen == [9], "what is derived is not saved"
    assert resumed.passes == (Counts(3),)


def test_a_closed_session_is_not_saved(tmp_path: Path) -> None:
    session, _ = begin()
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session.save(tmp_path / "run.pt")


# ------------------------------------------------------------------------------------------------ kill


class Server:
    """Training processes, forked by one that has made the imports."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "training_run.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, folder: Path) -> int:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> int:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def written(folder: Path) -> Iterator[tuple[str, str]]:
    """What all the runs in a folder wrote down; a line that the kill cut short is left out."""
    for path in folder.glob("*.txt"):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                key, _, value = line.strip().partition(" ")
                yield key, value


def kills(count: int, folder: Path, expected: dict[str, str]) -> dict[str, int]:
    """Kill ``count`` runs: half at random moments, half while they save. Each must go on as if nothing had been.

    Returns how many died, within a save and before the first checkpoint, and how many finished before their moment.
    """
    draw = random.Random(0)
    seen = {"killed": 0, "within a save": 0, "before the first checkpoint": 0, "finished before": 0}
    server = Server()
    try:
        for number in itertools.count():
            if seen["killed"] == count:
                break
            place = folder / str(number)
            place.mkdir()
            process = server.start(place)
            if number % 2:
                saves = draw.randrange(1, EPOCHS)
                wait(lambda: within_save(place, saves))  # noqa: B023
                time.sleep(draw.random() * 0.004)
            else:
                steps = draw.randrange(-5, len(expected) - 1)
                wait(lambda: len(list(written(place))) >= steps)  # noqa: B023
                time.sleep(draw.random() * 0.02)
            os.kill(process, signal.SIGKILL)
            code = server.end()
            assert code in (-signal.SIGKILL, 0)
            seen["killed"] += code == -signal.SIGKILL
            seen["finished before"] += code == 0
            seen["within a save"] += bool(list(place.glob(".partial-*")))
            seen["before the first checkpoint"] += not (place / "run.pt").exists()
            server.start(place)
            assert server.end() == 0
            items = list(written(place))
            assert all(expected[key] == value for key, value in items)
            assert dict(items) == expected
            shutil.rmtree(place)
    finally:
        server.close()
    return seen


def wait(until: Callable[[], bool]) -> None:
    """Look every third of a millisecond, for two minutes."""
    start = time.perf_counter()
    while not until():
        time.sleep(0.0003)
        assert time.perf_counter() - start < 120, "the run has stopped"


def within_save(folder: Path, saves: int) -> bool:
    """Whether the run in ``folder`` writes its checkpoint number ``saves``, or a later one."""
    if not any(name.startswith(".partial-") for name in os.listdir(folder)):
        return (folder / "run.pt").exists() and ended(folder) > saves
    return ended(folder) >= saves


def ended(folder: Path) -> int:
    """How many epochs the runs in ``folder`` have ended."""
    return sum("." not in key for key, _ in written(folder))


def test_runs_that_are_killed_go_on_bit_equal(tmp_path: Path, uninterrupted: dict[str, str]) -> None:
    seen = kills(4, tmp_path, uninterrupted)
    assert seen["killed"] == 4, seen


@pytest.mark.slow
def test_fifty_runs_that_are_killed_go_on_bit_equal(tmp_path: Path, uninterrupted: dict[str, str]) -> None:
    seen = kills(50, tmp_path, uninterrupted)
    print(seen)
    assert seen["within a save"] >= 10, seen
    assert seen["before the first checkpoint"] >= 1, seen
