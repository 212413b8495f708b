"""cut_weights: a file of weights is cut as the model was, without the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxprune
from fxprune import Budget, passes
from fxprune.errors import FileError

HALF = Budget(channels=0.5)


class Tied(nn.Module):
    """A small decoder without attention: words in, the same words out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(self.up(self.norm(x)).relu()))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5)
    )


NETWORKS = {"convolutions": (conv_net, torch.randn(2, 3, 6, 6)), "tied": (Tied, torch.arange(6).reshape(2, 3))}


def cut_on_meta(make: Any, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any, Any]:
    with torch.device("meta"):
        model = make().to(dtype).eval()
    graph = fxprune.trace(model, x.to("meta"))
    analysis = fxprune.analyze(graph, x.to("meta"))
    plan = passes.Random().plan(analysis, HALF)
    return plan, graph, *fxprune.rewrite(graph, analysis, plan)


def rewrite_model(model: nn.Module, x: torch.Tensor, plan: fxprune.Plan) -> Any:
    graph = fxprune.trace(model, x)
    return fxprune.rewrite(graph, fxprune.analyze(graph, x), plan)


def in_two_files(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """As large models are kept: parts, and an index of them."""
    where = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(state)}
    for part in set(where.values()):
        save_file({name: tensor for name, tensor in state.items() if where[name] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_file_is_that_of_the_model_that_was_cut(network: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, x = NETWORKS[network]
    inputs = x.to(dtype) if x.is_floating_point() else x
    plan, graph, compact, param_map = cut_on_meta(make, inputs, dtype)
    torch.manual_seed(1)
    model = make().to(dtype).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}  # as tied ones are
    expected, _ = rewrite_model(model, inputs, plan)
    for source in (in_two_files(state, tmp_path), tmp_path / "one.safetensors"):
        save_file(state, tmp_path / "one.safetensors")
        fxprune.cut_weights(graph, compact, param_map, source, tmp_path / "cut.safetensors")
        found = load_file(tmp_path / "cut.safetensors")
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(found[name if name in found else "embed.weight"], tensor, rtol=0, atol=0)
        loaded = fxprune.load(tmp_path / "cut.safetensors", make().to(dtype).eval())
        torch.testing.assert_close(loaded(inputs), expected(inputs), rtol=0, atol=0)


def test_a_model_on_meta_gets_its_values_from_the_file(tmp_path: Path) -> None:
    x = NETWORKS["convolutions"][1]
    model = conv_net().eval()
    compact = fxprune.prune(model, x, passes.Magnitude(), budget=HALF)
    fxprune.save(compact, tmp_path / "cut.safetensors")
    with torch.device("meta"):
        empty = conv_net().eval()
    loaded = fxprune.load(tmp_path / "cut.safetensors", empty)
    torch.testing.assert_close(loaded(x), compact(x), rtol=0, atol=0)


class WithTable(nn.Module):
    """Its table is in no file."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)
        self.register_buffer("table", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu()) * self.table


def test_a_buffer_on_meta_that_no_file_has(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    fxprune.save(fxprune.prune(WithTable(), x, passes.Magnitude(), budget=HALF), tmp_path / "cut.safetensors")
    with torch.device("meta"):
        empty = WithTable()
    with pytest.raises(FileError, match="the buffer table is on the meta device"):
        fxprune.load(tmp_path / "cut.safetensors", empty)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def cut() -> Any:
    _, *cut = cut_on_meta(conv_net, NETWORKS["convolutions"][1])
    return cut


def refuse(cut: Any, source: Path, target: Path, match: str) -> None:
    target.write_text("before")
    with pytest.raises(FileError, match=match):
        fxprune.cut_weights(*cut, source, target)
    assert target.read_text() == "before"


def test_weights_of_another_model(cut: Any, tmp_path: Path) -> None:
    path, state = tmp_path / "weights.safetensors", conv_net().state_dict()
    cases = {
        r"lacks 0\.weight": {name: tensor for name, tensor in state.items() if name != "0.weight"},
        r"has extra besides": state | {"extra": torch.zeros(2)},
        r"3\.weight is \[8, 9, 3, 3\] in the file, \[8, 8, 3, 3\] in the model": state
        | {"3.weight": torch.zeros(8, 9, 3, 3)},
    }
    for match, tensors in cases.items():
        save_file(tensors, path)
        refuse(cut, path, tmp_path / "cut.safetensors", match)


def test_what_is_no_file_of_weights(cut: Any, tmp_path: Path) -> None:
    target, empty = tmp_path / "cut.safetensors", tmp_path / "empty"
    empty.mkdir()
    refuse(cut, tmp_path / "none.safetensors", target, "there is no file .*none.safetensors")
    refuse(cut, empty, target, "empty has neither model.safetensors nor model.safetensors.index.json")
    (tmp_path / "damaged.safetensors").write_bytes(b"1234567890")
    refuse(cut, tmp_path / "damaged.safetensors", target, "can't read weights from .*damaged.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for text in ("[", "[]", '{"weight_map": []}', "{}"):
        index.write_text(text)
        refuse(cut, index, target, "index.json is no index of files")
    index.write_text(json.dumps({"weight_map": {"a": "../weights.safetensors"}}))
    refuse(cut, tmp_path, target, r"names '\.\./weights\.safetensors', which is no file beside it")


def test_what_does_not_belong_together(cut: Any, tmp_path: Path) -> None:
    graph, compact, param_map = cut
    source, target = tmp_path / "weights.safetensors", tmp_path / "cut.safetensors"
    save_file(conv_net().state_dict(), source)
    compact.get_submodule("0").register_buffer("more", torch.zeros(2))
    refuse(cut, source, target, r"0\.more of compact is no part of a weight of graph")
    _, _, other, _ = cut_on_meta(conv_net, NETWORKS["convolutions"][1])
    other.get_submodule("0").weight = nn.Parameter(torch.zeros(7, 3, 3, 3))
    refuse(
        (graph, other, param_map), source, target, r"does not lead from graph to compact: 0\.weight is \[7, 3, 3, 3\]"
    )


class Steered(nn.Module):
    """Looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while x.norm() > 1:
            x = self.part(x) / 10
        return x


def test_a_model_that_plain_python_steers(tmp_path: Path) -> None:
    x = 10 * torch.randn(2, 4)
    graph = fxprune.trace(Steered().eval(), x)
    analysis = fxprune.analyze(graph, x)
    compact, param_map = fxprune.rewrite(graph, analysis, passes.Random().plan(analysis, HALF))
    save_file(Steered().state_dict(), tmp_path / "weights.safetensors")
    refuse((graph, compact, param_map), tmp_path / "weights.safetensors", tmp_path / "cut", "plain Python steers")
