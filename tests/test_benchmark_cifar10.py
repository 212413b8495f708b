"""benchmarks/cifar10.py on a few random images: a run, the same run in two parts, and two processes."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLE = Path(__file__).resolve().parent.parent / "benchmarks" / "cifar10.py"
OPTIONS = ["--epochs", "2", "--batch-size", "8", "--lr", "0.05", "--threads", "1"]


@pytest.fixture
def example() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("cifar10", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    torch.set_flush_denormal(False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sixteen images of two classes to train on, eight to test with."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                image.save(folder / f"{number:04}.jpg")
    return tmp_path / "data"


def results(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return data


def test_a_run_that_was_interrupted_ends_as_the_whole_run(
    example: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted, parts = tmp_path / "whole", tmp_path / "parts"
    example.main(["--data", str(data), "--out", str(uninterrupted), *OPTIONS])
    for name in ("results.md", "prunetrain.png", "prunetrain.onnx", "dense.ckpt", "log.jsonl"):
        assert (uninterrupted / name).stat().st_size > 0

    epoch_end = example.Run.epoch_end

    def interrupted(run: Any, *sets: Any) -> None:
        if run.name == "prunetrain" and run.session.epoch == 1:
            raise KeyboardInterrupt
        epoch_end(run, *sets)

    monkeypatch.setattr(example.Run, "epoch_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        example.main(["--data", str(data), "--out", str(parts), *OPTIONS])
    monkeypatch.setattr(example.Run, "epoch_end", epoch_end)
    example.main(["--data", str(data), "--out", str(parts), *OPTIONS])

    for name in ("dense", "prunetrain"):
        weights = [torch.load(out / f"{name}.ckpt", weights_only=True)["model"] for out in (uninterrupted, parts)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert [len(epochs) for epochs in results(parts)["epochs"].values()] == [2, 2]

    with pytest.raises(SystemExit, match="other epochs"):
        example.main(["--data", str(data), "--out", str(parts), "--epochs", "3", *OPTIONS[2:]])


def test_activation_density_is_a_method_too(example: ModuleType, data: Path, tmp_path: Path) -> None:
    eager = ["--saturation", "1", "--patience", "1", "--cooldown", "1", "--no-dense"]
    example.main(["--data", str(data), "--out", str(tmp_path), "--method", "activation_density", *eager, *OPTIONS])
    epochs = results(tmp_path)["epochs"]["activation_density"]
    assert epochs[1]["removed"] > 0
    assert epochs[1]["values"]["complexity"] == 1
    assert (tmp_path / "activation_density.onnx").stat().st_size > 0


@pytest.mark.slow
def test_two_processes_share_the_batches(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    options = ["--data", str(data), "--out", str(tmp_path / "two"), "--limit", "16", "--no-dense", *OPTIONS]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shared = results(tmp_path / "two")
    assert shared["options"]["ranks"] == 2
    assert [(epoch["steps"], epoch["samples"]) for epoch in shared["epochs"]["prunetrain"]] == [(2, 4), (2, 4)]
    assert all(epoch["sent"] > 0 for epoch in shared["epochs"]["prunetrain"])
