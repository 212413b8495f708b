"""Sparse files: of a model with a seed only the weights that differ from it, bit by bit; foreign ones are refused."""

import copy
import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from laws import thinner
from models import MODELS, conv_bn, prepare
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import fxprune
from fxprune import passes
from fxprune.errors import FileError
from fxprune.files.sparse import bits_of, gaps_between, positions_after
from fxprune.files.start import start_of
from fxprune.graph.trace import TracedModule


def change(model: nn.Module, k: int, seed: int = 0) -> None:
    """Give ``k`` weights, anywhere, another value, and all buffers."""
    draw = random.Random(seed)
    parameters = dict(model.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    places = iter(sorted(draw.sample(range(total), k)))
    place, at = next(places, None), 0
    with torch.no_grad():
        for p in parameters.values():
            flat = p.view(-1)
            while place is not None and place < at + p.numel():
                flat[place - at] = draw.random()
                place = next(places, None)
            at += p.numel()
        for buffer in model.buffers():
            buffer.add_(1)


def assert_same_bits(actual: nn.Module, expected: nn.Module) -> None:
    state, expected_state = actual.state_dict(), expected.state_dict()
    assert list(state) == list(expected_state)
    for name, tensor in expected_state.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(bits_of(state[name]), bits_of(tensor)), name


def tensors_in(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["fxprune"])


# -------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("k", [0, 1, 100, 2000])
def test_k_weights_take_eight_bytes_each_or_five_and_one_for_each_255_between(k: int, tmp_path: Path) -> None:
    model = fxprune.initialize(torchvision.models.resnet18(num_classes=10), 7)
    change(model, k)
    path = tmp_path / "model.safetensors"
    fxprune.save(model, path)
    again = fxprune.load(path, torchvision.models.resnet18(num_classes=10))
    assert type(again) is type(model)
    assert_same_bits(again, model)
    assert torch.equal(again.eval()(torch.ones(1, 3, 32, 32)), model.eval()(torch.ones(1, 3, 32, 32)))
    buffers = {name for name, _ in model.named_buffers()}
    weights = {name: tensor for name, tensor in tensors_in(path).items() if name not in buffers}
    taken = sum(tensor.nbytes for tensor in weights.values())
    assert 5 * k <= taken <= min(8 * k, 5 * k + sum(weight.numel() for weight in model.parameters()) / 255)
    around = path.stat().st_size - sum(buffer.nbytes for buffer in model.buffers()) - taken
    assert 0 < around < 40_000  # names and shapes of 122 parameters and buffers
    assert start_of(again).to_json() == start_of(model).to_json()


def test_a_parameter_that_differs_everywhere_is_written_whole(tmp_path: Path) -> None:
    model = fxprune.initialize(nn.Linear(30, 20), 0)
    with torch.no_grad():
        model.weight.add_(1.0)
    fxprune.save(model, tmp_path / "model.safetensors")
    assert tensors_in(tmp_path / "model.safetensors")["weight"].shape == (20, 30)
    assert_same_bits(fxprune.load(tmp_path / "model.safetensors", nn.Linear(30, 20)), model)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 479), (torch.bfloat16, 399), (torch.float64, 533)])
def test_positions_are_written_only_where_they_save_space(dtype: torch.dtype, most: int, tmp_path: Path) -> None:
    for count, shape in ((most, (most,)), (most + 1, (20, 30))):
        model = fxprune.initialize(nn.Linear(30, 20, bias=False).to(dtype), 0)
        with torch.no_grad():
            model.weight.view(-1)[:count] += 1
        fxprune.save(model, tmp_path / "model.safetensors")
        assert tensors_in(tmp_path / "model.safetensors")["weight"].shape == shape
        assert_same_bits(fxprune.load(tmp_path / "model.safetensors", nn.Linear(30, 20, bias=False).to(dtype)), model)


def test_negative_zeros_and_what_is_not_a_number_come_back(tmp_path: Path) -> None:
    model = fxprune.initialize(nn.Linear(30, 20), 0, {"bias": ("constant", 0)})
    with torch.no_grad():
        model.bias[3] = -0.0
        model.weight[2, 2] = torch.nan
    fxprune.save(model, tmp_path / "model.safetensors")
    assert_same_bits(fxprune.load(tmp_path / "model.safetensors", nn.Linear(30, 20)), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    def large() -> nn.Module:
        return nn.Sequential(conv_bn(3, 600), conv_bn(600, 100)).to(dtype)

    model = fxprune.initialize(large(), 7)
    change(model, 50)
    fxprune.save(model, tmp_path / "model.safetensors")
    assert_same_bits(fxprune.load(tmp_path / "model.safetensors", large()), model)
    assert (tmp_path / "model.safetensors").stat().st_size < 50_000, "of half a million weights"


@pytest.mark.parametrize("name", ["residual_projection", "shufflenet", "tied_module", "tied_decoder", "float_buffer"])
def test_cut_models(name: str, tmp_path: Path) -> None:
    model, inputs = prepare(MODELS[name])
    graph = fxprune.trace(fxprune.initialize(model, 4), inputs)
    analysis = fxprune.analyze(graph, inputs)
    for seed in range(2):
        change(graph, 20, seed)
        plan = thinner(analysis, seed)
        graph, _ = fxprune.rewrite(graph, analysis, plan)
        analysis = analysis.after(plan, graph)
    fxprune.save(graph, tmp_path / "model.safetensors")
    again = fxprune.load(tmp_path / "model.safetensors", prepare(MODELS[name], seed=9)[0])
    assert isinstance(again, TracedModule)
    assert_same_bits(again, graph)
    assert start_of(again).to_json() == start_of(graph).to_json()
    fxprune.save(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    buffers = {key for key, _ in graph.named_buffers(remove_duplicate=False)}
    written = {key: tensor for key, tensor in tensors_in(tmp_path / "model.safetensors").items() if key not in buffers}
    assert sum(tensor.numel() for tensor in written.values()) <= 2 * 40


def test_start_values_that_have_decayed(tmp_path: Path) -> None:
    model = fxprune.initialize(nn.Linear(30, 20), 0)
    begin = start_of(model).decayed(0.25)
    fxprune.files.start.remember_start(model, begin)
    with torch.no_grad():
        model.weight.copy_(begin.values("weight"))
        model.bias.copy_(begin.values("bias"))
    fxprune.save(model, tmp_path / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors_in(tmp_path / "model.safetensors").values()) == 0
    assert_same_bits(fxprune.load(tmp_path / "model.safetensors", nn.Linear(30, 20)), model)


def test_a_model_that_was_not_initialised_is_written_whole_and_loads_without_a_start(tmp_path: Path) -> None:
    model, inputs = prepare(MODELS["chain"])
    compact = fxprune.prune(model, inputs, passes.Random(), budget=fxprune.Budget(channels=0.6, tolerance=0.2))
    fxprune.save(compact, tmp_path / "model.safetensors")
    again = fxprune.load(tmp_path / "model.safetensors", fxprune.initialize(prepare(MODELS["chain"])[0], 3))
    assert_same_bits(again, compact)
    assert start_of(again) is None


ZOO = torchvision.models.list_models(module=torchvision.models)
OTHERS = torchvision.models.list_models(module=torchvision.models.detection)
OTHERS += torchvision.models.list_models(module=torchvision.models.segmentation)
OTHERS += torchvision.models.list_models(module=torchvision.models.optical_flow)
SMALL = ["mobilenet_v3_small", "squeezenet1_1", "mnasnet0_5"]
HUGE = ("vit_h", "vit_l", "regnet_y_128", "swin_b", "swin_v2_b", "vgg19", "vgg13", "convnext_l", "efficientnet_v2_l")


def build(name: str) -> nn.Module:
    options = {"weights_backbone": None} if name in OTHERS and "raft" not in name else {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return torchvision.models.get_model(name, weights=None, **options)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in SMALL else pytest.mark.slow)
        for name in [*ZOO, *OTHERS]
        if not name.startswith(HUGE)
    ],
)
def test_torchvision_models(name: str, tmp_path: Path) -> None:
    model = fxprune.initialize(build(name), 1)
    change(model, 300)
    fxprune.save(model, tmp_path / "model.safetensors")
    assert_same_bits(fxprune.load(tmp_path / "model.safetensors", build(name)), model)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert (tmp_path / "model.safetensors").stat().st_size < buffers + 8 * 300 + 500 * len(model.state_dict())


# ------------------------------------------------------------------------------------------------ refused


def written(folder: Path) -> Path:
    model = fxprune.initialize(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), 0)
    change(model, 9)
    fxprune.save(model, folder / "model.safetensors")
    return folder / "model.safetensors"


def wider() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wider, r"0.weight started with shape \(5, 6\) in the file, \(7, 6\) in the model"),
        (
            lambda: nn.Sequential(nn.Linear(6, 5)),
            r"1.weight started with shape \(4, 5\) in the file, None in the model",
        ),
        (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 4)), "2.weight is only in the model"),
        (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double(), "0.weight is float32.* in the file"),
    ],
)
def test_other_models_are_refused(make: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=message):
        fxprune.load(written(tmp_path), make())


def damage(path: Path, how: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> None:
    tensors, record = tensors_in(path), header(path)
    how(tensors, record)
    save_file(tensors, path, {"fxprune": json.dumps(record)})


def to_positions(
    tensors: dict[str, Tensor], how: Callable[[Tensor], Tensor] = lambda where: where
) -> dict[str, Tensor]:
    """The indices as files of older versions have them."""
    return {name: how(positions_after(tensor)).int() for name, tensor in tensors.items() if name.endswith(":index")}


def test_files_with_positions_can_be_read(tmp_path: Path) -> None:
    path, model = written(tmp_path), nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    expected = fxprune.load(path, copy.deepcopy(model)).state_dict()
    damage(path, lambda tensors, record: tensors.update(to_positions(tensors)))
    state = fxprune.load(path, model).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("where", [[], [0], [254], [255], [0, 1, 256, 1000], [509, 510, 1276]])
def test_gaps_are_what_lies_between(where: list[int]) -> None:
    positions = torch.tensor(where, dtype=torch.int64)
    gaps = gaps_between(positions)
    assert gaps.dtype == torch.uint8
    assert len(gaps) == len(where) + sum((b - a - 1) // 255 for a, b in pairwise([-1, *where]))
    assert torch.equal(positions_after(gaps), positions)


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], Any], str]] = {
    "generator": (lambda t, r: r["start"].update(generator="mt19937 1"), "those of generator 'mt19937 1'"),
    "seed": (lambda t, r: r["start"].update(seed=1), "its weights are not those that were saved"),
    "scale": (lambda t, r: r["start"]["origins"]["0.weight"].__setitem__(1, 2.0), "not those that were saved"),
    "kind": (lambda t, r: r["start"]["origins"]["0.weight"].__setitem__(0, "odd"), "can't start as 'odd'"),
    "value": (lambda t, r: t["0.weight"].neg_(), "its weights are not those that were saved"),
    "range": (lambda t, r: t["0.weight:index"][-1:].fill_(30), "0.weight are damaged"),
    "end": (lambda t, r: t["0.weight:index"][-1:].fill_(255), "0.weight are damaged"),
    "axes": (lambda t, r: t.update({"0.weight:index": t["0.weight:index"][None]}), "0.weight are damaged"),
    "old order": (lambda t, r: t.update(to_positions(t, lambda where: where.flip(0))), "0.weight are damaged"),
    "old below": (lambda t, r: t.update(to_positions(t, lambda where: where - 30)), "0.weight are damaged"),
    "count": (lambda t, r: t.update({"0.weight:index": t["0.weight:index"][:-1].clone()}), "0.weight are damaged"),
    "missing": (lambda t, r: t.pop("0.weight:index"), "does not belong to this Sequential: '0.weight:index'"),
    "no index": (lambda t, r: r["start"].pop("index"), "does not belong to this Sequential: 'index'"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_files_are_refused(kind: str, tmp_path: Path) -> None:
    path, (how, message) = written(tmp_path), DAMAGES[kind]
    damage(path, how)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FileError, match=message):
        fxprune.load(path, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_start_that_the_model_has_outgrown_is_no_plan(tmp_path: Path) -> None:
    model = fxprune.initialize(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), 0)
    model.append(nn.Linear(4, 4))
    with pytest.raises(FileError, match="this Sequential has no plan"):
        fxprune.save(model, tmp_path / "model.safetensors")
