"""The log of a session: what an epoch costs, the seconds saved, the table, JSON, scalars and the picture."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Thin, begin, train
from torch.optim import Adam

import fxprune
from fxprune.errors import FileError
from fxprune.training.log import Epoch, Log

FIRST = Epoch(
    epoch=1,
    steps=10,
    step_time=0.5,
    samples=32,
    flops=4e6,
    params=12345,
    memory=1e6,
    widths={"a": 8, "b": 16},
    lr=0.1,
    values={"lambda": 0.25, "accuracy": 0.5},
)
SECOND = replace(
    FIRST, epoch=2, step_time=0.25, widths={"a": 8}, saved=2.5, removed=16, cut_time=0.125, notes=("why",), values={}
)


def test_the_table_has_a_row_for_each_epoch() -> None:
    head, first, second, note, *columns = str(Log([FIRST, SECOND])).splitlines()
    assert head.split()[:3] == ["epoch", "step", "ms"]
    assert {"lambda", "accuracy", "saved", "cut"} <= set(head.split())
    assert first.split()[:8] == ["1", "500.0", "32", "4.0", "12,345", "24", "0.1", "0.25"]
    assert second.split()[:7] == ["2", "250.0", "32", "4.0", "12,345", "8", "0.1"]
    assert "2.5" in second.split()
    assert "-16" in second.split()
    assert "-16" not in first.split()
    assert note == "epoch 2: why"
    assert [column.partition(":")[0] for column in columns] == ["saved s", "first s"]
    assert len(str(Log()).splitlines()) == 1
    assert "32" not in str(Log([replace(FIRST, samples=None)])).splitlines()[1].split()


def test_json_and_back() -> None:
    log = Log([FIRST, SECOND])
    again = Log.from_json(json.loads(json.dumps(log.to_json())))
    assert again.epochs == log.epochs
    assert str(again) == str(log)
    assert (len(again), again[-1], [*again]) == (2, SECOND, [FIRST, SECOND])


class Fake:
    """Keeps what it is given, as a SummaryWriter would."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        assert (tag, global_step) not in self.scalars
        self.scalars[tag, global_step] = scalar_value


def test_scalars_are_written_after_each_epoch() -> None:
    writer = Fake()
    session, inputs = begin(passes=[Thin()], writer=writer, batch_size=4)
    session.epoch_end(accuracy=0.5)
    train(session, inputs)
    session.epoch_end(accuracy=torch.tensor(0.75))  # type: ignore[arg-type]
    names = {tag for tag, _ in writer.scalars}
    expected = {"step_time", "flops", "params", "memory", "channels", "lr", "saved", "samples", "accuracy"}
    assert {f"fxprune/{name}" for name in expected} <= names
    assert [writer.scalars["fxprune/accuracy", at] for at in (1, 2)] == [0.5, 0.75]
    assert writer.scalars["fxprune/channels", 1] > writer.scalars["fxprune/channels", 2]
    assert all(type(value) is float for value in writer.scalars.values())
    assert {at for _, at in writer.scalars} == {1, 2}


def test_a_record_says_what_the_epoch_cost() -> None:
    session, inputs = begin("chain", Adam, steps=3, batch_size=2)
    model = session.graph
    record = session.epoch_end()
    assert (record.epoch, record.steps, record.samples, record.lr) == (1, 3, 2, 1e-3)
    assert record.params == sum(p.numel() for p in model.parameters())
    assert record.widths == session.analysis.sizes
    assert record.flops == fxprune.cost.flops(model, inputs) / len(inputs[0])
    assert record.step_time > 0
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    states = 3 * sum(p.numel() * p.element_size() for p in model.parameters())  # gradients and two moments
    assert held + states < record.memory < 100 * (held + states)
    assert (record.removed, record.cut_time, record.saved, record.notes) == (0, 0.0, 0.0, ())
    empty = session.epoch_end()
    assert (empty.steps, empty.step_time) == (0, 0.0)


def test_widths_flops_and_memory_fall_with_a_cut() -> None:
    session, inputs = begin(passes=[Thin(1, 0.5)], steps=2)
    first = session.epoch_end()
    train(session, inputs, 2)
    second = session.epoch_end()
    assert first.removed == sum(first.widths.values()) - sum(second.widths.values()) > 0
    assert first.cut_time > 0
    for name in ("flops", "params", "memory"):
        assert getattr(second, name) < 0.7 * getattr(first, name), name


def paced(session: Any, step_time: float, steps: int) -> Epoch:
    """An epoch in which every step took so many seconds."""
    session._meter._ends = [number * step_time for number in range(steps)]
    record: Epoch = session.epoch_end()
    return record


@pytest.mark.parametrize("batch_size", [None, 8])
def test_seconds_saved(batch_size: int | None) -> None:
    session, _ = begin(passes=[Thin(2)], steps=0, batch_size=batch_size)
    saved = [paced(session, step_time, 10).saved for step_time in (1.0, 3.0, 1.5, 0.5)]
    # Before the first cut, at the end of the second epoch, a step took 2 s (the median).
    cut = session.log[1].cut_time  # which is paid for in the epoch after
    assert saved == [0, 0, pytest.approx(10 * (2 - 1.5) - cut), pytest.approx(5 - cut + 10 * (2 - 0.5))]


def test_seconds_saved_count_samples_where_batches_grow() -> None:
    session, _ = begin(passes=[Thin(2)], steps=0, batch_size=8)
    paced(session, 2.0, 10)
    paced(session, 2.0, 10)
    session.batch_size = 16
    assert paced(session, 3.0, 5).saved == pytest.approx(5 * (2 * 2.0 - 3.0) - session.log[1].cut_time)


def test_a_run_without_cuts_saves_nothing() -> None:
    session, _ = begin(steps=0)
    assert [paced(session, step_time, 4).saved for step_time in (2.0, 1.0)] == [0, 0]


def test_the_log_of_a_run_survives_a_checkpoint(tmp_path: Path) -> None:
    session, inputs = begin(passes=[Thin()])
    session.epoch_end(accuracy=0.5)
    train(session, inputs)
    session.epoch_end()
    path = tmp_path / "log.json"
    path.write_text(json.dumps(session.log.to_json()))
    assert str(Log.from_json(json.loads(path.read_text()))) == str(session.log)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for number, log in enumerate([Log([FIRST, SECOND]), Log([replace(FIRST, values={})])]):
        log.plot(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")
    Log([FIRST, SECOND]).plot(str(tmp_path / "run.svg"))
    svg = (tmp_path / "run.svg").read_text(encoding="utf-8")
    assert "<svg" in svg
    with pytest.raises(FileError, match=r"can't write a picture to .*nowhere/run\.png: No such file"):
        Log([FIRST]).plot(tmp_path / "nowhere" / "run.png")
    with pytest.raises(FileError, match="the log is empty: there is nothing to draw"):
        Log().plot(tmp_path / "empty.png")
    with pytest.raises(FileError, match=r"can't write a picture to .*run\.unheard: .*unheard"):
        Log([FIRST]).plot(tmp_path / "run.unheard")
