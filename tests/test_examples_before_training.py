"""examples/before_training.py, cut short: every network trains, the table and the picture are there."""

import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = ["dense", "3SP 50%", "Uniform 50%", "3SP 25%", "Uniform 25%", "3SP 10%", "Uniform 10%"]


def test_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("quickstart", "before_training"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import before_training

    digits = before_training.digits()
    few = [(x[:192], y[:192]) for x, y in digits]
    monkeypatch.setattr(before_training, "digits", lambda: few)
    monkeypatch.setattr(before_training, "EPOCHS", 1)
    losses: dict[str, list[float]] = {}
    step = before_training.Run.step

    def watched(run: before_training.Run, *batch: torch.Tensor) -> None:
        before = run.model.fc.weight.detach().clone()
        step(run, *batch)
        losses.setdefault(run.name, []).append((run.model.fc.weight - before).abs().sum().item())

    monkeypatch.setattr(before_training.Run, "step", watched)
    monkeypatch.setattr(before_training.console, "width", 120)
    before_training.main()
    assert {name: len(moves) for name, moves in losses.items()} == dict.fromkeys(NAMES, 2)
    assert all(move > 0 for moves in losses.values() for move in moves)
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == NAMES
    flops = [int(row[1].replace(",", "")) for row in rows]
    assert [round(each / flops[0], 2) for each in flops] == [1, 0.5, 0.5, 0.25, 0.25, 0.1, 0.1]
    assert (tmp_path / "out" / "before_training" / "accuracy.png").stat().st_size > 10_000
