"""GateChannels: each convolution uses only its own channels, and the model is the one with the others set to zero."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import GRAPHS, MODELS, args_kwargs, prepare, randomize
from test_prunetrain import Concat, Plus, chain, mobile, resnet20
from torch import Tensor, nn

import fxprune
from fxprune import Pipeline, TracedModule
from fxprune.errors import FileError, PassError, PlanError
from fxprune.passes import GateChannels

TAU = 1e-4


def with_dead_slices(model: nn.Module, seed: int = 0, least: int = 1) -> nn.Module:
    """A quarter of the input and of the output channels of every convolution below the threshold, each its own."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for conv in model.modules():
            if isinstance(conv, nn.modules.conv._ConvNd):
                for axis in (0, 1):
                    size = conv.weight.shape[axis]
                    dead = torch.randperm(size, generator=draw)[: min(-(-size // 4), size - least)]
                    conv.weight.index_fill_(axis, dead, (-0.9 if axis else 0.9) * TAU)
    return model


def gated(make: Callable[[], nn.Module], size: int = 8) -> tuple[TracedModule, TracedModule, Tensor]:
    """The model with dead slices, traced, and what the pass makes of it, in float64."""
    model = with_dead_slices(randomize(make(), 0)).double().train()
    inputs = torch.randn(3, 3, size, size, dtype=torch.float64)
    graph = fxprune.trace(model, inputs)
    compact = Pipeline([GateChannels()], inputs)(graph).graph_module
    assert isinstance(compact, TracedModule)
    return graph, compact, inputs


def used(weight: Tensor, axis: int) -> list[int]:
    return [c for c in range(weight.shape[axis]) if weight.select(axis, c).abs().max() >= TAU]


# For each network: the convolutions whose outputs are gated too, with their norms.
WRITERS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "chain": (chain, {}),
    "concat": (Concat, {}),
    "mobile": (mobile, {}),
    "plus": (Plus, {}),
    "resnet20": (
        resnet20,
        {f"{at}.conv2": f"{at}.bn2" for at in range(1, 10)} | {f"{at}.short.0": f"{at}.short.1" for at in (4, 7)},
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_it_is_the_model_with_the_other_slices_at_zero(name: str) -> None:
    make, writers = WRITERS[name]
    graph, compact, inputs = gated(make)
    masked = copy.deepcopy(graph)
    kept: dict[str, list[Any]] = {}  # of each parameter that is cut: what is kept on each axis
    convs = {p: m for p, m in masked.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1}
    for path, conv in convs.items():
        kept[f"{path}.weight"] = [None, used(conv.weight, 1)]
        if path in writers:
            written = kept[f"{path}.weight"][0] = used(conv.weight, 0)
            kept |= {f"{writers[path]}.{leaf}": [written] for leaf in ("weight", "bias", "running_mean", "running_var")}
    state = masked.state_dict()
    with torch.no_grad():
        for key, axes in kept.items():
            for axis, positions in enumerate(axes):
                if positions is not None and "running" not in key:
                    gone = sorted(set(range(state[key].shape[axis])) - set(positions))
                    assert gone or axis == 1 or len(axes) == 1
                    state[key].index_fill_(axis, torch.tensor(gone, dtype=torch.int64), 0.0)

    def slice_of(key: str, tensor: Tensor) -> Tensor:
        for axis, positions in enumerate(kept.get(key, ())):
            tensor = tensor if positions is None else tensor.index_select(axis, torch.tensor(positions))
        return tensor

    assert list(compact.state_dict()) == list(graph.state_dict())
    for mode in (False, True):
        actual, expected = compact.train(mode)(inputs), masked.train(mode)(inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        for model, output in ((compact, actual), (masked, expected)):
            model.zero_grad()
            output.square().sum().backward()
        largest = max(p.grad.abs().max().item() for p in masked.parameters())
        for key, parameter in masked.named_parameters():
            small = compact.get_parameter(key)
            torch.testing.assert_close(
                small.grad, slice_of(key, parameter.grad), rtol=1e-9, atol=1e-10 * largest, msg=key
            )
            assert torch.equal(small, slice_of(key, parameter)), key
        for key, buffer in masked.named_buffers():
            torch.testing.assert_close(compact.get_buffer(key), slice_of(key, buffer), rtol=1e-9, atol=1e-9, msg=key)
    assert "index_select" in compact.code
    assert compact.code.count(".position") == len(writers)
    assert fxprune.cost.flops(compact, inputs) < fxprune.cost.flops(graph, inputs)
    assert graph.state_dict()[next(iter(kept))].shape != compact.state_dict()[next(iter(kept))].shape


@pytest.mark.parametrize("name", GRAPHS)
def test_every_model_is_gated_or_left_alone(name: str) -> None:
    model, inputs = prepare(MODELS[name])
    graph = fxprune.trace(with_dead_slices(model), inputs)
    pipeline = Pipeline([GateChannels(), GateChannels()], inputs)
    if MODELS[name].random:  # what train mode draws has the shape of the channels
        GateChannels().call(copy.deepcopy(graph))
        return
    compact = pipeline(graph).graph_module
    plain = [m for m in graph.modules() if type(m) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and m.groups == 1]
    assert not pipeline.steps[1].modified, "once is enough"
    if not plain:
        assert not pipeline.steps[0].modified
    args, kwargs = args_kwargs(inputs)
    copy.deepcopy(compact).train()(*args, **kwargs)


def test_small_weights_in_a_channel_that_is_used_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)).double()
    with torch.no_grad():
        model[1].weight.fill_(0.5 * TAU)[0, [1, 3]] = torch.tensor([[[TAU]], [[-TAU]]], dtype=torch.float64)
    inputs = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    compact = Pipeline([GateChannels()], inputs)(fxprune.trace(model, inputs)).graph_module
    weight = compact.get_parameter("1.weight")
    assert torch.equal(weight, model[1].weight[:, [1, 3]])
    assert compact.get_buffer("1.reads").tolist() == [1, 3]
    assert compact.get_parameter("0.weight").shape == (4, 3, 1, 1)
    assert not Pipeline([GateChannels(threshold=1e-5)], inputs)(fxprune.trace(model, inputs)).modified


def test_one_channel_is_kept_where_all_are_dead() -> None:
    graph, _, inputs = gated(resnet20)
    with torch.no_grad():
        graph.get_parameter("2.conv2.weight").zero_()
        graph.get_parameter("3.conv1.weight").fill_(1e-9)
    compact = Pipeline([GateChannels()], inputs)(graph).graph_module
    assert compact.get_parameter("2.conv2.weight").shape == (1, 1, 3, 3)
    assert compact.get_parameter("3.conv1.weight").shape == (8, 1, 3, 3)
    compact(inputs).sum().backward()


def test_what_is_all_used_is_left_alone() -> None:
    model = randomize(resnet20(), 0).double()
    inputs = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = Pipeline([GateChannels()], inputs)(fxprune.trace(model, inputs))
    assert not result.modified


class Sums(nn.Module):
    """Norms that must not be gated: used twice, called twice, without a scale, or not in a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4, affine=at != 2) for at in range(4))
        self.stem = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        twice = self.norms[0](self.convs[0](x))
        x = x + twice
        x = x * twice
        x = x + self.norms[1](self.convs[1](x))
        x = x + self.norms[1](self.convs[4](x))
        x = x + self.norms[2](self.convs[2](x))
        return x * self.norms[3](self.convs[3](x))


def test_norms_that_others_use_stay_whole() -> None:
    graph, compact, _ = gated(Sums)
    for at in range(5):
        assert compact.get_parameter(f"convs.{at}.weight").shape[0] == 4
        assert compact.get_parameter(f"convs.{at}.weight").shape[1] == 3
    assert "position" not in compact.code
    assert graph.code != compact.code


def test_the_original_is_not_changed() -> None:
    model = with_dead_slices(randomize(resnet20(), 0))
    before = copy.deepcopy(model.state_dict())
    inputs = torch.randn(2, 3, 8, 8)
    graph = fxprune.trace(model, inputs)
    result = GateChannels()(graph)  # alone, in place on the traced module
    assert result is not None
    assert result.modified
    assert result.graph_module is graph
    assert "index_select" in graph.code
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    model(inputs)


def test_it_exports(tmp_path: Path) -> None:
    _, compact, inputs = gated(resnet20)
    exported = fxprune.export_onnx(compact.float(), inputs.float(), tmp_path / "gated.onnx")
    assert exported.difference < 1e-4
    assert len(set(exported.batches)) == 2


def test_it_copies_and_moves(tmp_path: Path) -> None:
    _, compact, inputs = gated(resnet20)
    compact.eval()
    again = copy.deepcopy(compact)
    torch.save(compact, tmp_path / "gated.pt")
    for copied in (again, torch.load(tmp_path / "gated.pt", weights_only=False)):
        assert torch.equal(copied(inputs), compact(inputs))
    assert {b.device.type for b in compact.to("meta").buffers()} == {"meta"}


def test_after_the_union_is_cut(tmp_path: Path) -> None:
    model = with_dead_slices(randomize(resnet20(), 0)).double()
    inputs = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = fxprune.trace(model, inputs)
    analysis = fxprune.analyze(graph, inputs)
    plan = fxprune.Plan({"0.0": [0, 2, 3, 5, 7], "1.conv1": [1, 2, 3]}, analysis.sizes, analysis.options)
    compact, _ = fxprune.rewrite(graph, analysis, plan)
    fxprune.save(compact, tmp_path / "union.safetensors")
    result = Pipeline([GateChannels()], inputs)(compact)
    with pytest.raises(FileError, match="has no plan"):
        fxprune.save(result.graph_module, tmp_path / "gated.safetensors")
    again = fxprune.load(tmp_path / "union.safetensors", resnet20().double())
    torch.testing.assert_close(
        Pipeline([GateChannels()], inputs)(again).graph_module(inputs), result.graph_module(inputs)
    )


def test_a_pass_is_held_to_its_reference() -> None:
    class Wrong(GateChannels):
        def reference(self, graph_module: Any) -> Any:
            return graph_module

    model = with_dead_slices(randomize(resnet20(), 0))
    inputs = torch.randn(2, 3, 8, 8)
    with pytest.raises(PassError, match=r"pass Wrong \(the first\) changed the outputs in eval mode by"):
        Pipeline([Wrong()], inputs)(fxprune.trace(model, inputs))


@pytest.mark.parametrize("threshold", [-1.0, "small", True])
def test_a_threshold_that_is_none(threshold: Any) -> None:
    with pytest.raises(PlanError, match=f"threshold={threshold!r} must be a number at least 0"):
        GateChannels(threshold)
