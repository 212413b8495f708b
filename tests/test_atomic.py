"""Files appear whole or not at all, whoever writes them."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune import Plan, passes
from fxprune.atomic import PARTIAL, replace_file
from fxprune.errors import FileError
from fxprune.training.log import Epoch, Log

X = torch.randn(2, 4)
MODEL = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
LOG = Log([Epoch(1, 1, 0.1, None, 1.0, 1, 1.0, {"a": 1}, 0.1)])


def write_session(path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    fxprune.Session(model, X, torch.optim.SGD(model.parameters(), 0.1)).save(path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "plan.json": lambda path: Plan({}, {"a": 2}).save(path),
    "model.safetensors": lambda path: fxprune.save(
        fxprune.prune(MODEL, X, passes.Random(), budget=fxprune.Budget(flops=0.5, tolerance=0.3)), path
    ),
    "model.onnx": lambda path: fxprune.export_onnx(MODEL, X, path),
    "run.pt": write_session,
    "page.html": lambda path: fxprune.analyze(fxprune.trace(MODEL, X), X).to_html(path),
    "run.png": LOG.plot,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    path.write_text("the old one")

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FileError, match=rf"can't write .* to {tmp_path}.*: No space left on device"):
            WRITERS[name](path)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert path.read_text() == "the old one"
    WRITERS[name](path)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert path.read_bytes() != b"the old one"


def test_what_fails_within_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("the old one")

    def fails() -> None:
        with replace_file(tmp_path / "a", "a file") as partial:
            partial.write_text("half of the n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert (tmp_path / "a").read_text() == "the old one"


def test_what_is_no_plain_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with replace_file(tmp_path / "pipe", "a file") as partial:
        assert partial == tmp_path / "pipe"
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(FileError, match=f"can't write a plan to {tmp_path}: Is a directory"):
        Plan({}, {}).save(tmp_path)


def test_places_that_there_are_not(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=rf"can't write a plan to {tmp_path}/no/plan.json: No such file"):
        Plan({}, {}).save(tmp_path / "no" / "plan.json")
    with pytest.raises(FileError, match=r"can't write a plan to .*: embedded null byte"):
        Plan({}, {}).save("plan\0.json")
    with pytest.raises(FileError, match=r"path must be a str or Path, but it is 3 \(int\)"):
        Plan({}, {}).save(3)  # type: ignore[arg-type]


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    """Of this machine, and of no process that lives: nobody else's."""
    writer = "import os, sys, time; from fxprune.atomic import PARTIAL, replace_file\n"
    writer += "with replace_file(sys.argv[1], 'a plan') as partial:\n"
    writer += "    partial.write_text('half'); print('ready', flush=True); time.sleep(60)"
    path = tmp_path / "plan.json"
    process = subprocess.Popen([sys.executable, "-c", writer, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    foreign = tmp_path / f"{PARTIAL}another-machine-{process.pid}-x"
    foreign.mkdir()
    held = sorted(tmp_path.iterdir())
    assert len(held) == 2
    Plan({}, {"a": 2}).save(path)
    assert sorted(tmp_path.iterdir()) == [*held, path]  # it lives
    process.kill()
    process.wait()
    process.stdout.close()
    Plan({}, {"a": 3}).save(path)
    assert sorted(tmp_path.iterdir()) == [foreign, path]
    assert Plan.load(path).sizes == {"a": 3}


@pytest.mark.parametrize("name", ["", "x", f"{socket.gethostname()}-x-y", f"{socket.gethostname()}-{10**20}-y"])
def test_what_is_named_otherwise_stays(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{PARTIAL}{name}").mkdir()
    Plan({}, {"a": 2}).save(tmp_path / "plan.json")
    assert (tmp_path / f"{PARTIAL}{name}").is_dir()
