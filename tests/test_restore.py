"""Restoration: what the kept channels can stand for comes back exactly, nothing gets worse, nothing else changes."""

import copy
import importlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, prepare
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune import Analysis, ParamMap, Plan, Restoration, passes, restore
from fxprune.errors import RestoreError, VerificationError
from fxprune.graph.inputs import map_tensors

EXACT = 1e-8
least_squares = importlib.import_module("fxprune.rewrite.least_squares")  # fxprune.rewrite is the function


def cut(model: nn.Module, example: Any, group: str = "first", keep: tuple[int, ...] = (0, 1, 2)) -> tuple[Any, ...]:
    """The graph, the compact model and the map, when ``group`` keeps the channels ``keep``."""
    graph = fxprune.trace(model.eval(), example)
    analysis = fxprune.analyze(graph, example)
    return graph, *fxprune.rewrite(graph, analysis, Plan({group: keep}, analysis.sizes, analysis.options))


def gap(graph: nn.Module, compact: nn.Module, x: Any) -> float:
    """The largest difference of what two models give, relative to the largest value."""
    with torch.no_grad():
        expected, actual = graph(x), compact(x)
    return float((expected - actual).abs().max() / expected.abs().max())


def doubles(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double()


# ------------------------------------------------------------------------------------------ exact


class Chain(nn.Module):
    """Channel 3 of ``first`` is made of the others; ``layer`` reads it; ``last`` gives the output."""

    def __init__(self, first: nn.Module, layer: nn.Module, last: nn.Module, between: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.between, self.layer, self.last = first, between or nn.Identity(), layer, last

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.layer(self.between(self.first(x))))
        return out


def images(*size: int) -> Tensor:
    return torch.randn(40, 3, *size, dtype=torch.float64)


CHAINS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (Chain(nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(6, 2)), torch.randn(60, 5).double()),
    "linear on tokens": lambda: (
        Chain(nn.Linear(5, 4), nn.Linear(4, 6, bias=False), nn.Linear(6, 2)), torch.randn(30, 3, 5).double()
    ),
    "conv1d": lambda: (Chain(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 5, 3, padding="same"), nn.Conv1d(5, 2, 1)), images(12)),
    "conv2d": lambda: (
        Chain(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 5, 3, 2, 1), nn.Conv2d(5, 2, 1)), images(7, 8)
    ),
    "conv2d without a bias": lambda: (
        Chain(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 5, 3, bias=False), nn.Conv2d(5, 2, 1)), images(7, 8)
    ),
    "conv3d": lambda: (
        Chain(nn.Conv3d(3, 4, 1), nn.Conv3d(4, 5, (1, 2, 3)), nn.Conv3d(5, 2, 1)), images(4, 5, 6)
    ),
    "dilated": lambda: (Chain(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, dilation=2), nn.Conv2d(5, 2, 1)), images(8, 8)),
    "reflected": lambda: (
        Chain(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, 1, 1, padding_mode="reflect"), nn.Conv2d(5, 2, 1)), images(8, 8)
    ),
    "transposed": lambda: (
        Chain(nn.Conv2d(3, 4, 1, bias=False), nn.ConvTranspose2d(4, 5, 3, 2, 1, 1), nn.Conv2d(5, 2, 1)), images(5, 6)
    ),
    "transposed 1d": lambda: (
        Chain(nn.Conv1d(3, 4, 1, bias=False), nn.ConvTranspose1d(4, 5, 4, 3, 5), nn.Conv1d(5, 2, 1)), images(9)
    ),
    "depthwise": lambda: (
        Chain(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 2, 1)), images(6, 6)
    ),
    "behind a norm": lambda: (
        Chain(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, bias=False), nn.Sequential(nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1))),
        images(6, 6),
    ),
}  # fmt: skip


def redundant(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = CHAINS[name]()
    first = doubles(model).get_submodule("first")
    with torch.no_grad():
        mix = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
        for parameter in first.parameters():
            parameter[3] = torch.einsum("c,c...->...", mix, parameter[:3])
        if name == "depthwise":  # whose channels can't stand for one another, but those behind them can
            layer = model.get_submodule("layer")
            weight, bias = (layer.get_parameter(leaf) for leaf in ("weight", "bias"))
            weight[:] = weight[:1].clone()
            bias[3] = mix @ bias[:3]
    return model, x


@pytest.mark.parametrize("name", CHAINS)
def test_what_the_others_can_stand_for_comes_back(name: str) -> None:
    model, x = redundant(name)
    graph, compact, param_map = cut(model, x[:2])
    assert gap(graph, compact, x) > 0.01
    before = copy.deepcopy(graph.state_dict())
    report = restore(graph, compact, param_map, x)
    assert gap(graph, compact, torch.randn_like(x)) < EXACT, report
    assert all(torch.equal(tensor, before[key]) for key, tensor in graph.state_dict().items())


def test_a_norm_takes_the_intercept_of_a_layer_without_a_bias() -> None:
    """The channel that goes is constant: only an intercept can stand for it."""
    model, x = redundant("behind a norm")
    with torch.no_grad():
        model.get_submodule("first").get_parameter("weight")[3] = 0
    graph, compact, param_map = cut(model, x[:2])
    restore(graph, compact, param_map, x)
    assert gap(graph, compact, torch.randn_like(x)) < EXACT
    assert not torch.equal(compact.get_buffer("last.0.running_mean"), graph.get_buffer("last.0.running_mean"))


def test_groups_of_a_convolution_stand_for_their_own_channels() -> None:
    model = doubles(Chain(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 2, 1)))
    weight, bias = (model.get_submodule("first").get_parameter(name) for name in ("weight", "bias"))
    with torch.no_grad():
        for of, parts in ((3, (0, 1)), (7, (4, 6))):
            for tensor in (weight, bias):
                tensor[of] = tensor[parts[0]] - 2 * tensor[parts[1]]
    x = images(6, 6)
    graph = fxprune.trace(model.eval(), x[:2])
    analysis = fxprune.analyze(graph, x[:2], groups="within")
    name = next(group.name for group in analysis.groups.values() if group.name.startswith("first"))
    keep = {name: [c for c in range(analysis.sizes[name]) if c != 3]}
    compact, param_map = fxprune.rewrite(graph, analysis, Plan(keep, analysis.sizes, analysis.options))
    assert compact.get_submodule("layer").get_parameter("weight").shape[1] == 3
    restore(graph, compact, param_map, x)
    assert gap(graph, compact, torch.randn_like(x)) < EXACT


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, kdim=4, vdim=4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.last(self.attention(x, x, x, need_weights=False)[0])
        return out


def test_the_projections_of_attention_are_restored() -> None:
    model = doubles(Attends())
    with torch.no_grad():
        for parameter in model.get_submodule("first").parameters():
            parameter[3] = parameter[0] - parameter[1]
    x = torch.randn(30, 5, 3).double()
    graph, compact, param_map = cut(model, x[:2])
    report = restore(graph, compact, param_map, x)
    assert "attention.in_proj_weight" in [layer.name for layer in report.layers]
    assert gap(graph, compact, torch.randn_like(x)) < EXACT


class Branches(nn.Module):
    """The stream comes through a bottleneck that is cut; the branch beside it could give what that loses."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
        self.branch = nn.Conv2d(3, 5, 1)
        self.norm = nn.BatchNorm2d(5) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        stream = self.second(self.first(x))
        return self.norm(self.branch(x)) + stream


@pytest.mark.parametrize("norm", [False, True])
def test_a_branch_makes_up_for_the_drift_of_the_stream_it_is_added_to(norm: bool) -> None:
    model = doubles(Branches(norm))
    x = images(5, 5)
    graph, compact, param_map = cut(model, x[:2], keep=(0, 2))
    report = restore(graph, compact, param_map, x)
    assert [layer.name for layer in report.layers] == ["second.weight", "branch.weight"]
    assert report.layers[0].after > 0.01  # two channels can't stand for three
    assert gap(graph, compact, torch.randn_like(x)) < EXACT


def test_a_layer_too_wide_for_its_square_is_restored_from_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "LARGE", 2)
    model, x = redundant("linear")
    graph, compact, param_map = cut(model, x[:2])
    restore(graph, compact, param_map, x)
    assert gap(graph, compact, torch.randn_like(x)) < 1e-5


@pytest.mark.parametrize("intercept", [False, True])
def test_rows_and_sums_have_the_same_minimum(intercept: bool) -> None:
    rows = [(torch.randn(2, 15, 70).double(), torch.randn(2, 15, 3).double()) for _ in range(3)]
    by_rows, by_sums = (fit(rows, intercept)[:4] for fit in (least_squares.fit_rows, least_squares.fit_sums))
    for one, two in zip(by_rows, by_sums, strict=True):
        torch.testing.assert_close(one.matrix, two.matrix, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(one.intercept, two.intercept, rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------------------------------ every model


def some_batches(inputs: tuple[Any, ...], count: int = 3) -> list[Any]:
    """Batches like ``inputs``, with other numbers."""
    generator = torch.Generator().manual_seed(1)

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    return [map_tensors(drawn, inputs) for _ in range(count)]


def halved(analysis: Analysis) -> Plan:
    """Every second channel of each group goes."""
    return Plan({name: range(0, size, 2) for name, size in analysis.sizes.items()}, analysis.sizes, analysis.options)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


GRAPHS = [name for name, case in MODELS.items() if not case.steered]


@pytest.mark.parametrize("name", GRAPHS)
def test_a_model_that_was_not_cut_stays_as_it_is(name: str) -> None:
    model, inputs = prepare(MODELS[name])
    graph = fxprune.trace(model, inputs)
    analysis = fxprune.analyze(graph, inputs)
    compact, param_map = fxprune.rewrite(graph, analysis, Plan({}, analysis.sizes, analysis.options))
    assert restore(graph, compact, param_map, some_batches(inputs)) == Restoration("least_squares")
    assert same_weights(compact, graph)


@pytest.mark.parametrize("name", [name for name in GRAPHS if MODELS[name].prunable])
def test_no_layer_gets_worse_on_what_is_held_out(name: str) -> None:
    model, inputs = prepare(MODELS[name])
    graph = fxprune.trace(model, inputs)
    analysis = fxprune.analyze(graph, inputs)
    compact, param_map = fxprune.rewrite(graph, analysis, halved(analysis))
    modes = [part.training for part in compact.modules()]
    report = restore(graph, compact, param_map, some_batches(inputs, 10))
    assert all(layer.after <= layer.before for layer in report.layers), report
    assert all((layer.after < layer.before) == (layer.outcome == "restored") for layer in report.layers), report
    assert [part.training for part in compact.modules()] == modes


# ------------------------------------------------------------------------------------------ what is given


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 16, 4),
    )  # fmt: skip
    return model.eval(), torch.randn(160, 3, 8, 8)


def cut_small() -> tuple[Any, Any, ParamMap, Tensor]:
    model, x = small()
    return *cut(model, x[:2], "0", (0, 2, 3, 6)), x


def labelled(x: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.int64)), 16)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "a list": lambda x: list(x.split(16)),
    "a loader with labels": labelled,
    "tuples of arguments": lambda x: [((part,), {}) for part in x.split(16)],
    "arguments and labels": lambda x: [((part,), torch.zeros(16)) for part in x.split(16)],
    "dicts": lambda x: [{"input": part, "label": torch.zeros(16)} for part in x.split(16)],
}


@pytest.mark.parametrize("form", FORMS)
def test_data_comes_in_any_form(form: str) -> None:
    graph, compact, param_map, x = cut_small()
    again = copy.deepcopy(compact)
    expected = restore(graph, compact, param_map, list(x.split(16)))
    assert len(expected.layers) == 2
    assert restore(graph, again, param_map, FORMS[form](x)) == expected
    assert same_weights(compact, again)


def test_one_batch_is_split_and_a_tuple_is_one_batch() -> None:
    graph, compact, param_map, x = cut_small()
    again = copy.deepcopy(compact)
    restore(graph, compact, param_map, x)
    restore(graph, again, param_map, (x, torch.zeros(160)))
    assert same_weights(compact, again)
    assert gap(graph, compact, x) < gap(graph, cut_small()[1], x)


def test_half_precision_is_restored() -> None:
    model, x = small()
    graph, compact, param_map = cut(model.bfloat16(), x[:2].bfloat16(), "0", (0, 2, 3, 6))
    with torch.autocast("cpu", torch.bfloat16):
        report = restore(graph, compact, param_map, x.bfloat16())
    assert report.layers[0].outcome == "restored"
    assert {parameter.dtype for parameter in compact.parameters()} == {torch.bfloat16}


def test_autocast_is_off() -> None:
    graph, compact, param_map, x = cut_small()
    again = copy.deepcopy(compact)
    restore(graph, compact, param_map, x)
    with torch.autocast("cpu", torch.bfloat16):
        restore(graph, again, param_map, x)
    assert same_weights(compact, again)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(5, 4), nn.Linear(4, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.last(self.shared(x) + self.shared(F.relu(x)))
        return out


def test_a_weight_that_is_used_twice_is_left() -> None:
    x = torch.randn(80, 5)
    graph, compact, param_map = cut(Twice(), x[:2])
    report = restore(graph, compact, param_map, x)
    assert [layer.outcome for layer in report.layers] == ["left as cut: its weight is used 2 times"] * 2 + ["restored"]


class Reads(nn.Module):
    """What ``layer`` reads comes through a bottleneck that is cut."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.layer = nn.Linear(5, 4), nn.Linear(4, 6), layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(self.second(self.first(x)))


class Packed(nn.Module):
    """Queries and keys from parts of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.packed[:4]) * F.linear(x, self.packed[4:])


class Multiplied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.shift = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix + self.shift


READERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "parts of one weight": (Packed, (5,), ["layer.packed: linear reads what is computed from layer.packed"]),
    "a product": (Multiplied, (2, 5), ["layer.matrix: there is no least squares for matmul"]),
    "reparametrised": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)),
        (5,),
        [
            "layer: its weight is computed from layer.parametrizations.weight.original0, "
            "layer.parametrizations.weight.original1"
        ],
    ),
    "recurrent": (lambda: nn.GRU(6, 3), (2, 5), ["layer: there is no least squares for GRU"]),
    "a norm": (lambda: nn.LayerNorm([2, 6]), (2, 5), []),
}


@pytest.mark.parametrize("name", READERS)
def test_layers_that_have_no_least_squares_are_named(name: str) -> None:
    torch.manual_seed(0)
    layer, size, lines = READERS[name]
    x = torch.randn(80, *size)
    graph, compact, param_map = cut(Reads(layer()), x[:2])
    report = restore(graph, compact, param_map, x)
    assert [row.outcome for row in report.layers] == ["restored"]
    notes = report.note.splitlines()
    assert all(
        note.startswith("left as cut, layer") and note.endswith(line) for note, line in zip(notes, lines, strict=True)
    )
    assert report.note in str(report)


def test_layers_that_read_what_they_read_are_not_named() -> None:
    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = Multiplied(), Chain(nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(6, 2))

        def forward(self, x: Tensor) -> Any:
            return self.after(self.before(x))

    x = torch.randn(80, 2, 6)
    graph, compact, param_map = cut(Before(), x[:2], "after.first")
    report = restore(graph, compact, param_map, x)
    assert report.layers
    assert not report.note


def test_a_weight_that_is_an_embedding_too_is_left() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 6)
            self.out.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Any:
            return self.out(self.second(self.first(self.embedding(ids))))

    ids = torch.randint(9, (80, 5), generator=torch.Generator().manual_seed(0))
    graph, compact, param_map = cut(Tied(), ids[:2])
    report = restore(graph, compact, param_map, ids)
    assert report.layers[-1].outcome == "left as cut: its weight is used 2 times"
    assert torch.equal(compact.get_parameter("embedding.weight"), graph.get_parameter("embedding.weight"))


def test_a_layer_along_another_axis_than_the_channels_is_left() -> None:
    model, inputs = prepare(MODELS["mixer"])
    graph = fxprune.trace(model, inputs)
    analysis = fxprune.analyze(graph, inputs)
    compact, param_map = fxprune.rewrite(graph, analysis, halved(analysis))
    report = restore(graph, compact, param_map, some_batches(inputs))
    names = [f"tokens.{number}.weight" for number in (0, 2)]
    assert report.note.splitlines() == [
        f"left as cut, {name}: more than the channels of what it gives went" for name in names
    ]


def test_the_table_says_what_was_done() -> None:
    graph, compact, param_map, x = cut_small()
    report = restore(graph, compact, param_map, x)
    for words in ("7.weight", "restored", f"{report.layers[0].before:.2%}", f"{report.layers[0].after:.2%}"):
        assert words in str(report)


# ------------------------------------------------------------------------------------------ averages alone


def test_batch_norm_has_the_averages_of_the_data() -> None:
    graph, compact, param_map, x = cut_small()
    weights = {name: parameter.clone() for name, parameter in compact.named_parameters()}
    report = restore(graph, compact, param_map, list(x.split(16)), method="batch_norm")
    with torch.no_grad():
        read = compact.get_submodule("0")(x)
    torch.testing.assert_close(compact.get_buffer("1.running_mean"), read.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert report == Restoration("batch_norm", note="the running averages of 2 batch norms were renewed")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in compact.named_parameters())
    assert not any(part.training for part in compact.modules())
    assert compact.get_submodule("1").momentum == 0.1


STEERED = [name for name, case in MODELS.items() if case.steered]


@pytest.mark.parametrize("name", STEERED)
def test_where_python_steers_averages_are_renewed(name: str) -> None:
    model, inputs = prepare(MODELS[name])
    graph = fxprune.trace(model, inputs)
    analysis = fxprune.analyze(graph, inputs)
    compact, param_map = fxprune.rewrite(graph, analysis, Plan({}, analysis.sizes, analysis.options))
    report = restore(graph, compact, param_map, [inputs])
    assert report.method == "batch_norm"
    assert f"plain Python steers {type(compact).__name__}" in report.note


# ------------------------------------------------------------------------------------------ in prune


def test_prune_verifies_then_restores(caplog: pytest.LogCaptureFixture) -> None:
    model, x = small()
    budget, criterion = fxprune.Budget(flops=0.5, tolerance=0.2), passes.Magnitude(round_to=1)
    plain = fxprune.prune(model, x[:2], criterion, budget=budget)
    with caplog.at_level(logging.INFO, logger="fxprune"):
        restored = fxprune.prune(model, x[:2], criterion, budget=budget, data=labelled(x))
    assert not same_weights(plain, restored)
    assert gap(model, restored, x) < gap(model, plain, x)
    assert "7.weight" in caplog.text


def test_a_restored_model_is_no_longer_the_masked_original() -> None:
    graph, compact, param_map, x = cut_small()
    fxprune.verify(graph, compact, param_map, x[:2])
    restore(graph, compact, param_map, x)
    with pytest.raises(VerificationError, match="differs from the masked original"):
        fxprune.verify(graph, compact, param_map, x[:2])


# ------------------------------------------------------------------------------------------ refusals


def refused(message: str, data: Any, **options: Any) -> None:
    graph, compact, param_map, _ = cut_small()
    before = copy.deepcopy(compact)
    with pytest.raises(RestoreError, match=message):
        restore(graph, compact, param_map, data, **options)
    assert same_weights(compact, before)


def test_bad_data_is_refused_and_nothing_changes() -> None:
    x = small()[1]
    refused("data has no batches", [])
    refused("must be a batch or an iterable of batches.*got 3", 3)
    refused("data has one sample", x[:1])
    refused("node _0 does not run on this data.*channels", [x, x[:, :2]])
    refused("on this data the layer of 0.weight gives values that are not finite", x * float("inf"))
    refused("method='magic' is not known", x, method="magic")
    refused("the compact model does not run on this data.*channels", [x, x[:, :2]], method="batch_norm")


def test_models_that_do_not_belong_together_are_refused() -> None:
    graph, compact, param_map, x = cut_small()
    with pytest.raises(RestoreError, match=r"does not lead from graph to compact: 0.weight is \[8, 3, 3, 3\] there"):
        restore(graph, graph, param_map, x)
    with pytest.raises(RestoreError, match="graph must be a TracedModule"):
        restore(nn.Linear(2, 2), compact, param_map, x)
    with torch.no_grad():
        compact.get_parameter("3.bias").add_(1)
    with pytest.raises(RestoreError, match=r"3.bias of compact is not the slice of 3.bias of graph"):
        restore(graph, compact, param_map, x)


def test_weights_without_values_are_refused() -> None:
    model, x = small()
    graph, compact, param_map = cut(model.to("meta"), x[:2].to("meta"), "0", (0, 2))
    with pytest.raises(RestoreError, match=r"0.weight is on the meta device"):
        restore(graph, compact, param_map, x)
