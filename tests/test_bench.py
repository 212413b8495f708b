"""Bench: models take turns, ratios are of the same round, and what saves FLOPs but no time is named."""

import itertools
import json
import time
from typing import Any

import pytest
import torch
from models import MODELS, prepare
from torch import nn

import fxprune
from fxprune import Budget, passes
from fxprune.budget.timing import Spread, by_module, in_turns, ratio_of_times
from fxprune.errors import BenchError
from fxprune.report.backends import BACKENDS
from fxprune.report.bench import Bench, Measured

X = torch.randn(1, 3, 8, 8)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)).train()


def halved(model: nn.Module, inputs: Any = X) -> nn.Module:
    budget = Budget(channels=0.5, tolerance=0.3)
    compact: nn.Module = fxprune.prune(model, inputs, passes.Magnitude(round_to=1), budget=budget, verify=False)
    return compact


def spin(seconds: float) -> None:
    """Keep the thread at work; on one thread only that is timed."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_runs_take_turns() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: (calls.append(name), spin(0.03)) for name in "ab"}
    times = in_turns(runs, seconds=0.1)
    assert len(times["a"]) == len(times["b"]) >= 5
    assert all(0.03 <= seconds < 0.3 for turns in times.values() for seconds in turns)
    switches = sum(a != b for a, b in itertools.pairwise(calls))
    assert switches >= len(times["a"]), "no run has all its turns at once"


def test_short_runs_are_repeated_in_a_turn() -> None:
    calls: list[int] = []
    times = in_turns({"": lambda: calls.append(1)}, seconds=0.0)
    assert len(calls) > 100 * len(times[""])


def test_a_ratio_is_of_the_same_round() -> None:
    assert ratio_of_times([1.0, 10.0, 2.0], [3.0, 5.0, 1.0]) == Spread(0.5, 0.5, 1.75), "that of the medians is 1.5"
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0)


def test_layers_are_timed_apart() -> None:
    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            spin(0.02)
            return x

    model = nn.Sequential(nn.ReLU(), Slow(), nn.Sequential(nn.ReLU()))
    times = by_module({"": model}, ((X,), {}), 0.0)[""]
    assert list(times) == ["0", "1", "2.0"]
    assert times["1"] >= 0.02 > 10 * times["0"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bench() -> None:
    dense = net()
    compact = halved(dense)
    modes = [[module.training for module in model.modules()] for model in (dense, compact)]
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    result = fxprune.bench(dense, compact, X, batches=(1, 2), backends=("eager",), seconds=0.0)
    assert [(row.backend, row.batch) for row in result.rows] == [("eager", 1), ("eager", 2)]
    before, after = result.flops
    assert (before, after) == (fxprune.cost.flops(dense.eval(), X), fxprune.cost.flops(compact.eval(), X))
    for row in result.rows:
        assert row.before is not None
        assert row.ratio is not None
        assert row.before.low <= row.before.median <= row.before.high
        assert row.efficiency == pytest.approx(after / before / row.ratio.median)
    assert result.layer_flops["0"][1] < result.layer_flops["0"][0]
    assert all(seconds > 0 for seconds in result.layers["0"])
    assert [[module.training for module in dense.train().modules()]] == modes[:1]
    assert all(torch.equal(tensor, state[name]) for name, tensor in dense.state_dict().items())
    table = str(result)
    assert "eager" in table
    assert "efficiency" in table
    assert json.loads(json.dumps(result.to_json()))["rows"][0]["backend"] == "eager"


def test_modes_come_back() -> None:
    dense = net()
    compact = halved(dense).train()
    fxprune.bench(dense, compact, X, batches=(1,), backends=("eager",), seconds=0.0)
    assert dense.training
    assert compact.training


def test_a_model_with_plain_python() -> None:
    model, inputs = prepare(next(case for case in MODELS.values() if case.steered))
    result = fxprune.bench(model, halved(model, inputs), inputs, backends=("eager",), seconds=0.0)
    assert len(result.rows) == 1, "only the example's own batch"


def test_a_backend_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("no compiler here\nat all")

    monkeypatch.setitem(BACKENDS, "compile", fail)
    result = fxprune.bench(net(), net(), X, batches=(1,), backends=("compile", "eager"), seconds=0.0)
    assert result.rows[0].problem == "RuntimeError: no compiler here"
    assert result.rows[1].before is not None
    assert "RuntimeError: no compiler here" in str(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backends": ("tpu",)}, "no backend is called 'tpu'; there are eager, compile"),
        ({"batches": ()}, r"batches=\(\) must be positive integers"),
        ({"batches": (1, 0)}, r"batches=\(1, 0\) must be positive integers"),
        ({"compact": 7}, "model must be a Module, but it is 7"),
        (
            {"compact": nn.Conv2d(5, 3, 1), "backends": ("eager",), "batches": (1,)},
            "Conv2d does not run on example_inputs: .*to have 5 channels, but got 3",
        ),
    ],
)
def test_wrong_use(options: Any, message: str) -> None:
    arguments = {"compact": net(), **options}
    with pytest.raises(BenchError, match=message):
        fxprune.bench(net(), arguments.pop("compact"), X, **arguments)


def test_what_saves_flops_but_no_time_is_named() -> None:
    result = Bench(
        rows=(Measured("eager", 1, None, None, None, None),),
        flops=(300.0, 150.0),
        layers={"a": (1.0, 0.5), "b": (1.0, 0.95), "c": (1.0, 1.0), "norm": (0.1, 0.1)},
        layer_flops={"a": (100.0, 50.0), "b": (100.0, 50.0), "c": (100.0, 100.0)},
        machine="",
    )
    assert result.idle() == {"b": (0.5, 0.95)}
    assert result.idle({"first": ["a", "norm"], "both": ["a", "b"], "last": ["b", "c"]}) == {"last": (0.75, 0.975)}


@pytest.mark.slow
def test_compiled_models_are_measured() -> None:
    result = fxprune.bench(net(), halved(net()), X, batches=(1, 2), backends=("compile",), seconds=0.1)
    assert [row.problem for row in result.rows] == ["", ""]
