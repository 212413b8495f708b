"""What a newcomer gives first: dicts, loaders' batches, too little; each works, or is refused in one sentence."""

from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune import Budget, passes
from fxprune.errors import ExportError, PlanError, RestoreError, RewriteError, SessionError, TraceError

HALF = Budget(channels=0.5)


class Two(nn.Module):
    """Two inputs and labels, of which it makes a loss, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(
        self, a: Tensor, b: Tensor, scale: float = 1.0, labels: Tensor | None = None, **unused: Any
    ) -> dict[str, Tensor]:
        logits = self.out((self.a(a) + scale * self.b(b)).relu())
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Steered(Two):
    """Its Python looks at values."""

    def forward(self, a: Tensor, *more: Tensor, **named: Any) -> dict[str, Tensor]:  # type: ignore[override]
        if a.sum() > 1e9:
            raise ValueError
        return super().forward(a, *more, **named)


class Cache:
    """What decoders return besides: no tensor."""


class KeyCache(Cache):
    """Likewise."""


class Decoder(nn.Module):
    """A decoder of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor, use_cache: bool = True) -> tuple[Any, ...]:
        return (self.mlp(x), KeyCache()) if use_cache else (self.mlp(x),)


A, B = (torch.randn(6, 16, 4).double() for _ in range(2))
Y = torch.randint(3, (6, 16))
ROWS = list(zip(A, B, Y, strict=True))

FORMS: dict[str, Callable[[], Any]] = {
    "tuples": lambda: ROWS,
    "a loader": lambda: DataLoader(TensorDataset(A.flatten(0, 1), B.flatten(0, 1), Y.flatten()), 16),
    "dicts": lambda: [{"a": a, "b": b, "labels": y} for a, b, y in ROWS],
    "dicts with more": lambda: [{"a": a, "index": y + 1, "b": b, "labels": y} for a, b, y in ROWS],
    "mappings": lambda: [UserDict({"a": a, "b": b, "y": y}) for a, b, y in ROWS],
    "pairs of dict and labels": lambda: [({"a": a, "b": b}, y) for a, b, y in ROWS],
    "pairs of arguments and labels": lambda: [((a, b), y) for a, b, y in ROWS],
    "pairs of a list and labels": lambda: [[[a, b], y] for a, b, y in ROWS],
    "calls and labels": lambda: [(((a,), {"b": b}), y) for a, b, y in ROWS],
    "a generator": lambda: (row for row in ROWS),
}


def loss(output: dict[str, Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(output["logits"], y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_data_of_two_inputs_in_any_form(form: str, scale: float) -> None:
    """Criteria and restoring read the same from all; what is no tensor is as in the example."""
    torch.manual_seed(0)
    model = Two().double().eval()
    example = {"a": A[0], "b": B[0], "scale": scale}
    graph = fxprune.trace(model, example)
    analysis = fxprune.analyze(graph, example)
    for make in (
        lambda data: passes.Fisher(data, loss),
        lambda data: passes.Taylor(data, loss),
        lambda data: passes.Activation(data),
        lambda data: passes.OptimalBrainSurgeon(data),
    ):
        expected, found = (make(data).score(analysis) for data in (ROWS, FORMS[form]()))
        assert expected.keys() == found.keys() == analysis.groups.keys()
        assert all(np.array_equal(expected[name], found[name]) for name in expected)
    plan = passes.Magnitude(round_to=1).plan(analysis, HALF)
    weights = []
    for data in (ROWS, FORMS[form]()):
        compact, param_map = fxprune.rewrite(graph, analysis, plan)
        assert fxprune.restore(graph, compact, param_map, data).layers
        weights.append(compact.out.weight)
    assert torch.equal(*weights)


def test_the_models_own_loss() -> None:
    """Where the example has labels, they go to the model; nothing is left for the loss."""
    data = [{"a": a, "b": b, "labels": y} for a, b, y in ROWS]
    analysis = fxprune.analyze(Two().double(), data[0])
    assert passes.Fisher(data, lambda output, y: output["loss"]).score(analysis)


def test_data_where_python_steers() -> None:
    """Of a model that is no single graph, the arguments of the example are known too."""
    model = Steered().double().eval()
    model.out = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    expected = None
    for example, form in (
        ((A[0], B[0]), "tuples"),
        ({"a": A[0], "b": B[0]}, "dicts with more"),
        ((A[0], B[0]), "a loader"),
        (((A[0],), {"b": B[0]}), "mappings"),
    ):
        analysis = fxprune.analyze(model, example)
        assert not isinstance(analysis.graph, fxprune.TracedModule)
        scores = passes.Taylor(FORMS[form](), loss).score(analysis)
        expected = expected or scores
        assert scores.keys() == expected.keys() != set()
        assert all(np.array_equal(scores[name], expected[name]) for name in scores)


def test_an_example_is_a_dict_or_a_batch_of_a_loader(tmp_path: Path) -> None:
    """In each call that takes one."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    loader = DataLoader(TensorDataset(A.float().flatten(0, 1), Y.flatten()), 16)
    batch = next(iter(loader))
    compact = fxprune.prune(model, batch, passes.Fisher(loader, F.cross_entropy), budget=HALF, data=loader)
    again = fxprune.prune(model, {"input": batch[0]}, passes.Fisher(loader, F.cross_entropy), budget=HALF, data=loader)
    assert all(map(torch.equal, compact.parameters(), again.parameters()))
    assert fxprune.cost.flops(compact, batch) == fxprune.cost.flops(compact, batch[0]) > 0
    assert isinstance(fxprune.slim(model, compact, batch), nn.Sequential)
    assert fxprune.export_onnx(compact, batch, tmp_path / "model.onnx").path.exists()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = fxprune.Session(model, batch, optimizer, [passes.PruneTrain()], epochs=1, verify=True)
    session.model(batch[0]).sum().backward()
    optimizer.step()
    session.epoch_end()
    session.close()


MODEL = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
X = torch.randn(2, 4)
WRONG: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "no example": (
        PlanError,
        r"example_inputs are missing: prune\(model, example_inputs, criterion, budget=...\) got Magnitude",
        lambda: fxprune.prune(MODEL, passes.Magnitude(), budget=HALF),
    ),
    "no criterion": (PlanError, "the criterion is missing: prune", lambda: fxprune.prune(MODEL, X, budget=HALF)),
    "no example for a session": (
        SessionError,
        "example_inputs are missing: .* got the optimizer SGD in their place",
        lambda: fxprune.Session(MODEL, torch.optim.SGD(MODEL.parameters(), 0.1), passes=[passes.PruneTrain()]),
    ),
    "no optimizer": (SessionError, "optimizer must be a Optimizer, but it is None", lambda: fxprune.Session(MODEL, X)),
    "another name": (
        TraceError,
        r"do not fit Sequential.forward\(input\): .* a dict of arguments by name",
        lambda: fxprune.trace(MODEL, {"image": X}),
    ),
    "a tuple with labels": (
        TraceError,
        r"too many positional arguments. .* of a batch \(x, y\) with labels give x",
        lambda: fxprune.trace(MODEL, (X, X)),
    ),
    "None for no arguments": (
        TraceError,
        r"do not fit Sequential.forward\(input\): .* such as \(\(\), {...}\)",
        lambda: fxprune.trace(MODEL, (None, {"input": X})),
    ),
    "no labels": (
        PlanError,
        "data must have labels: .* got a Tensor in it",
        lambda: fxprune.prune(MODEL, X, passes.Fisher([X, X, X], F.cross_entropy), budget=HALF),
    ),
    "no batches": (
        RestoreError,
        "data must be a batch or an iterable of batches, such as a DataLoader; got 3",
        lambda: fxprune.prune(MODEL, X, passes.Magnitude(), budget=HALF, data=3),
    ),
    "nothing to score on": (
        PlanError,
        "data must be a batch or an iterable of batches, such as a DataLoader; got 3",
        lambda: fxprune.prune(MODEL, X, passes.Fisher(3, F.cross_entropy), budget=HALF),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_forgotten_is_named(case: str) -> None:
    error, message, call = WRONG[case]
    with pytest.raises(error, match=message):
        call()


def test_an_export_of_wrong_channels_ends_before_torch_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: pytest.fail("it began"))
    with pytest.raises(
        ExportError, match=r"does not run on these example_inputs, of shapes \[\[2, 5\]\]: RuntimeError"
    ):
        fxprune.export_onnx(MODEL, torch.randn(2, 5), tmp_path / "model.onnx")


def test_a_decoder_with_a_cache_says_how_it_becomes_one_graph(caplog: pytest.LogCaptureFixture) -> None:
    """In the analysis, in the log of prune, and where slim refuses."""
    cure = "returns no cache when it is called with use_cache=False"
    assert cure in str(fxprune.analyze(Decoder(), X))
    compact = fxprune.prune(Decoder(), X, passes.Magnitude(), budget=HALF)
    assert "Decoder is no single graph, its parts are: mlp." in caplog.text
    assert cure in caplog.text
    with pytest.raises(RewriteError, match=f"no single graph: it is a Decoder, .* It is so because .*{cure}.*: mlp"):
        fxprune.slim(Decoder(), compact, X)
    whole = {"x": X, "use_cache": False}
    compact = fxprune.prune(Decoder(), whole, passes.Magnitude(), budget=HALF)
    assert isinstance(fxprune.slim(Decoder(), compact, whole), Decoder)


def test_an_analysis_is_short() -> None:
    """Layers that differ in numbers are one line, and channels of several positions are called so."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(3))
            self.out = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x, x, x, need_weights=False)[0]
            return self.out(x)

    text = str(fxprune.analyze(Attention(), torch.randn(2, 5, 16)))
    assert "layers.*.out_proj.weight[0] (3 times)" in text
    assert "4 channels of 4 positions each (such as attention heads)" in text
