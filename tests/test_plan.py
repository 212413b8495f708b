"""Plans: what they refuse, how they print, compose, travel through JSON, and run again on a fresh model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import MODELS, prepare

import fxprune
from fxprune import Plan, passes
from fxprune.channels.analysis import Analysis
from fxprune.errors import FileError, PlanError

SIZES = {"conv": 4, "fc": 8}


def half(name: str = "residual", seed: int = 0) -> tuple[Analysis, Plan, Any]:
    model, inputs = prepare(MODELS[name], seed)
    analysis = fxprune.analyze(model, inputs)
    return analysis, passes.Random().plan(analysis, fxprune.Budget(channels=0.5)), inputs


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"stem": [0]}, r"group 'stem', which the model does not have"),
        ({"conv": [0, 4]}, r"group 'conv' must be .* in \[0, 4\); got \[0, 4\]"),
        ({"conv": [-1, 2]}, r"got \[-1, 2\]"),
        ({"conv": [2, 1]}, r"sorted.* got \[2, 1\]"),
        ({"conv": [1, 1]}, r"distinct.* got \[1, 1\]"),
        ({"conv": [0.5, 2]}, r"integers.* got \[0.5, 2\]"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(keep: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan(keep, SIZES)


def test_equal_plans() -> None:
    assert Plan({"conv": [0, 2]}, SIZES) == Plan({"conv": np.array([0, 2])}, SIZES)
    assert Plan({"conv": range(4)}, SIZES) == Plan({}, SIZES)  # keeping all is not cutting
    assert Plan({"conv": [0, 2]}, SIZES) != Plan({"conv": [0, 1]}, SIZES)


def test_print_and_widths() -> None:
    plan = Plan({"conv": [0, 2]}, SIZES)
    assert plan.widths == {"conv": 2, "fc": 8}
    assert str(plan).splitlines() == [
        "plan for 2 groups, 1 of them cut",
        "  conv       4 ->      2",
        "  fc         8 ->      8",
    ]


def test_json_round_trip(tmp_path: Path) -> None:
    plan = Plan({"conv": np.array([0, 2])}, SIZES, {"heads": "within"})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_where_a_model_is_from_changes_nothing(tmp_path: Path) -> None:
    plan = Plan({"conv": [0, 2]}, SIZES, {"heads": "within"}, source={"model": "torchvision:resnet18", "input": "1,3"})
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert (again.options, again.source) == (plan.options, plan.source)
    assert again == Plan(plan.keep, SIZES, {"heads": "within"})
    assert again.then(Plan({}, again.widths)).source == plan.source
    data = plan.to_json()
    assert data["options"] == {"heads": "within", "model": "torchvision:resnet18", "input": "1,3"}, "as in older files"
    Plan.from_json(data)
    assert data == plan.to_json(), "reading changes nothing"


def test_a_plan_then_another() -> None:
    first = Plan({"conv": [0, 2, 3]}, SIZES, {"heads": "whole"})
    second = Plan({"conv": [1, 2], "fc": [5]}, first.widths)
    assert first.then(second) == Plan({"conv": [2, 3], "fc": [5]}, SIZES, {"heads": "whole"})
    with pytest.raises(PlanError, match="group 'conv' has 3 channels, the plan expects 4"):
        first.then(Plan({}, SIZES))


def test_a_plan_for_another_model() -> None:
    _, plan, _ = half("residual")
    stranger, _, _ = half("densenet")
    with pytest.raises(PlanError, match=r"made for another model: group '.+' is in one but not in the other"):
        fxprune.rewrite(stranger.graph, stranger, plan)
    with pytest.raises(PlanError, match="group 'conv' has 5 channels, the plan expects 4"):
        Plan({}, SIZES).check({"conv": 5, "fc": 8})


def test_replay_on_a_fresh_model(tmp_path: Path) -> None:
    analysis, plan, inputs = half()
    expected, _ = fxprune.rewrite(analysis.graph, analysis, plan)
    plan.save(tmp_path / "plan.json")

    again, _, _ = half()
    replayed, _ = fxprune.rewrite(again.graph, again, Plan.load(tmp_path / "plan.json"))
    assert torch.equal(replayed(*inputs), expected(*inputs))

    # Other weights of the same architecture need no analysis of their own.
    stranger = fxprune.trace(prepare(MODELS["residual"], seed=5)[0], inputs)
    compact, param_map = fxprune.rewrite(stranger, analysis, plan)
    fxprune.verify(stranger, compact, param_map, inputs)


DAMAGED = [
    (b"", "Expecting value"),
    (b'{"format": "fxprune plan 1", "keep": {"co', "Unterminated string"),
    (b"\xff\xfe\x00", "can't decode"),
    (b"[" * 100_000, "recursion"),
    (b"[]", "not a plan"),
    (b'{"format": "fxprune plan 2"}', "format 'fxprune plan 1'"),
    (b'{"format": "fxprune plan 1"}', "damaged: keep, sizes and options"),
    (b'{"format": "fxprune plan 1", "keep": {"a": [true]}, "sizes": {"a": 2}, "options": {}}', "integer lists"),
    (b'{"format": "fxprune plan 1", "keep": {"a": 1}, "sizes": {"a": 2}, "options": {}}', "integer lists"),
    (b'{"format": "fxprune plan 1", "keep": {}, "sizes": {"a": "2"}, "options": {}}', "integers"),
    (b'{"format": "fxprune plan 1", "keep": {}, "sizes": {}, "options": {"heads": [1]}}', "text"),
    (b'{"format": "fxprune plan 1", "keep": {"a": [5]}, "sizes": {"a": 2}, "options": {}}', r"group 'a' .* got \[5\]"),
]


@pytest.mark.parametrize(("content", "message"), DAMAGED)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(FileError, match=rf"(?s)can't read a plan from .*plan.json.*{message}"):
        Plan.load(tmp_path / "plan.json")


def test_no_such_file_or_folder(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"missing\.json"):
        Plan.load(tmp_path / "missing.json")
    with pytest.raises(FileError, match=r"can't write a plan to .*nowhere/plan.json: No such file"):
        Plan({}, {}).save(tmp_path / "nowhere" / "plan.json")
