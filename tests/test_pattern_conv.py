"""PatternConv: equal to the masked convolution, gradients included; what is rewritten, what stays, and why."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import OPTIMIZERS, pruning_composes, random_plan, slice_commutes_with_a_step, slice_is_zero
from models import MODELS, Residual, conv_bn, head, image_net, prepare, randomize
from test_rewrites import BOTH
from torch import Tensor, nn
from torch.optim import SGD

import fxprune
from fxprune import Pipeline, passes
from fxprune.errors import PassError, PlanError
from fxprune.passes import PatternConv
from fxprune.passes.rewrites._boxes import SPEEDUP, Choice, Form

ALL = PatternConv(measure=None)
FORMS = ("input_channel", "filter")


@torch.no_grad()
def thin(conv: nn.Conv2d, share: str, size: tuple[int, int] = (2, 2), seed: int = 0) -> nn.Conv2d:
    """``conv`` with zeros outside a box of this size, in another place for each input channel or filter."""
    out, inner = conv.weight.shape[:2]
    channels = out if share == "filter" else conv.in_channels
    numbers = torch.Generator().manual_seed(seed)
    rows, columns = (
        torch.randint(0, k - s + 1, (channels,), generator=numbers) for k, s in zip(conv.kernel_size, size, strict=True)
    )
    for o, i in itertools.product(range(out), range(inner)):
        channel = o if share == "filter" else o // (out // conv.groups) * inner + i
        kept = torch.zeros(conv.kernel_size)
        kept[rows[channel] : rows[channel] + size[0], columns[channel] : columns[channel] + size[1]] = 1
        conv.weight[o, i] *= kept
    return conv


def both(conv: nn.Conv2d, x: Tensor) -> tuple[nn.Module, nn.Module]:
    """A network of one convolution, and it rewritten."""
    model = fxprune.trace(nn.Sequential(conv), x)
    return model, Pipeline([ALL], x)(model).graph_module


# ------------------------------------------------------------------------------------------- it is the same function


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("share", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {},
        {"padding": 2, "bias": False},
        {"padding": (0, 1)},
        {"padding": "same"},
        {"padding": "valid"},
        {"padding": 1, "stride": 2},
        {"padding": 1, "stride": (1, 2)},
        {"padding": 2, "dilation": 2},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "groups": 2},
        {"padding": 3, "stride": 2, "dilation": (1, 2), "groups": 2},
    ],
    ids=str,
)
def test_equal_with_gradients(options: dict[str, Any], share: str, layout: torch.memory_format, dtype: Any) -> None:
    torch.manual_seed(0)
    conv = thin(nn.Conv2d(8, 12, 3, **options), share).to(dtype).to(memory_format=layout)
    for size in (9, 10):
        x = torch.randn(2, 8, size, size + 2, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        dense, small = both(conv, x)
        if share == "filter" and conv.stride != (1, 1):
            assert small.get_submodule("0").kernel_size == (3, 3), "not with a stride"
            continue
        tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
        actual, expected = small(x), dense(x)
        torch.testing.assert_close(actual, expected, **tolerance)
        direction = torch.randn_like(expected)
        gradients = torch.autograd.grad(actual, [x, *small.parameters()], direction)
        expected_gradients = torch.autograd.grad(expected, [x, *dense.parameters()], direction)
        torch.testing.assert_close(gradients[0], expected_gradients[0], **tolerance)
        torch.testing.assert_close(gradients[2:], expected_gradients[2:], **tolerance)
        weight = small.get_parameter("0.weight")
        assert weight.shape[2:] == (2, 2)
        # Of the kernels' gradients what the zeros do not have: their sum over the taps of each kernel.
        kept = (expected_gradients[1] * (conv.weight != 0)).sum((2, 3))
        loose = {key: 100 * limit for key, limit in tolerance.items()}
        torch.testing.assert_close(gradients[1].sum((2, 3)), kept, **loose)


@pytest.mark.parametrize("share", FORMS)
@pytest.mark.parametrize(
    ("kernel", "size"), [((3, 3), (1, 2)), ((3, 3), (3, 1)), ((5, 5), (2, 3)), ((1, 7), (1, 3)), ((3, 3), (1, 1))]
)
def test_boxes_of_any_size(kernel: tuple[int, int], size: tuple[int, int], share: str) -> None:
    torch.manual_seed(0)
    conv = thin(nn.Conv2d(6, 5, kernel, padding=1), share, size).double()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    dense, small = both(conv, x)
    torch.testing.assert_close(small(x), dense(x), rtol=1e-10, atol=1e-10)
    layer: Any = small.get_submodule("0")
    assert layer.kernel_size == size
    assert layer.pack.shape[2:] == tuple(k - s + 1 for k, s in zip(kernel, size, strict=True))


def test_channels_with_few_weights_fit_their_box() -> None:
    conv = thin(nn.Conv2d(6, 5, 3, padding=1), "input_channel").double()
    with torch.no_grad():
        conv.weight[:, [0, 5]] = 0
        conv.weight[2] = 0
        conv.weight[:, 1] = 0
        conv.weight[:, 1, 2, 2] = 1  # the last tap alone
        conv.weight[:, 2] = 0
        conv.weight[:, 2, 0, 2] = 1
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    dense, small = both(conv, x)
    torch.testing.assert_close(small(x), dense(x), rtol=1e-10, atol=1e-10)


def patterned(share: str = "input_channel") -> tuple[nn.Module, Any]:
    """A residual network of which all but the first convolution are thin."""
    model, inputs = prepare(MODELS["residual_projection"])
    for number, layer in enumerate(module for module in model.modules() if isinstance(module, nn.Conv2d)):
        if layer.kernel_size == (3, 3) and number:
            thin(layer, share, seed=number)
    return model, inputs


@pytest.mark.parametrize("share", FORMS)
def test_networks_obey_the_laws(share: str) -> None:
    model, inputs = patterned(share)
    graph = fxprune.trace(model, inputs)
    small = Pipeline([ALL], inputs)(graph).graph_module
    assert {m.kernel_size for m in small.modules() if isinstance(m, nn.Conv2d)} >= {(2, 2)}
    for mode in BOTH:
        torch.testing.assert_close(small.train(mode)(*inputs), graph.train(mode)(*inputs), rtol=1e-10, atol=1e-10)
    analysis = fxprune.analyze(small, inputs)
    assert not analysis.unknown
    assert analysis.sizes == fxprune.analyze(graph, inputs).sizes, "the same channels can go"
    slice_is_zero(small, inputs, analysis, random_plan(analysis, 1))
    pruning_composes(small, inputs, analysis, random_plan(analysis, 2, least=2), 3)
    slice_commutes_with_a_step(small, inputs, analysis, random_plan(analysis, 4), OPTIMIZERS["momentum"])


def test_it_trains_copies_and_exports(tmp_path: Path) -> None:
    model, inputs = patterned()
    model, inputs = model.float(), tuple(x.float() for x in inputs)
    small = copy.deepcopy(Pipeline([ALL], inputs)(fxprune.trace(model, inputs)).graph_module).train()
    optimizer = SGD(small.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    pack: Any = small.get_buffer("1.conv1.0.pack")
    before, losses = pack.clone(), []
    for _ in range(5):
        loss = (small(*inputs) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(pack, before)
    fxprune.export_onnx(small.eval(), inputs, tmp_path / "small.onnx")  # compares with onnxruntime
    import onnx

    kinds = {node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node}
    assert kinds <= {"Conv", "Relu", "Add", "GlobalAveragePool", "ReduceMean", "Flatten", "Reshape", "Gemm"}


def test_after_click_train(tmp_path: Path) -> None:
    """The whole way: train, save, load, lower."""
    for share in FORMS:
        model = randomize(image_net(Residual(8, 8)), 0).double()
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        optimizer = SGD(model.parameters(), 0.01, momentum=0.9)
        pruner = passes.ClickTrain(select=0, hard=1, kernels=0.3, share=share)
        with fxprune.Session(model, x, optimizer, [pruner], progress=False) as session:
            for _ in range(2):
                task = session.model(x).square().mean()
                (task + session.penalty(task)).backward()
                optimizer.step()
                optimizer.zero_grad()
                session.epoch_end()
            fxprune.save(session.graph, tmp_path / "run.safetensors")
        graph = fxprune.load(tmp_path / "run.safetensors", image_net(Residual(8, 8)).double()).eval()
        lowered = Pipeline([ALL], x)(graph).graph_module
        torch.testing.assert_close(lowered(x), graph(x), rtol=1e-10, atol=1e-10)
        became = [layer for layer in lowered.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (2, 2)]
        assert len(became) == 3


# ------------------------------------------------------------------------------------------------- what is chosen


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_what_stays_and_why() -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.full, self.good = nn.Conv2d(3, 8, 3, padding=1), thin(nn.Conv2d(8, 8, 3, padding=1), "filter")
            self.depthwise = thin(nn.Conv2d(8, 8, 3, padding=1, groups=8), "filter")
            self.mirror = thin(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "filter")
            self.uneven = thin(nn.Conv2d(8, 8, (4, 3), padding="same"), "filter")
            self.empty, self.hooked = nn.Conv2d(8, 8, 3), thin(nn.Conv2d(8, 8, 3), "filter")
            nn.init.zeros_(self.empty.weight)
            self.hooked.register_forward_hook(lambda *_: None)

        def forward(self, x: Tensor) -> Tensor:
            x = self.uneven(self.mirror(self.depthwise(self.good(self.full(x)))))
            return self.hooked(x) + self.empty(x)

    x = torch.randn(2, 3, 8, 8)
    graph = fxprune.trace(Kinds(), x)
    text = [str(choice) for choice in PatternConv(None, x).choices(graph)]
    assert text == [
        "full stays: its kernels, with what they share, fill their box",
        "good becomes 2×2",
        "depthwise stays: it is depthwise",
        "mirror stays: padding_mode='reflect'",
        "uneven stays: padding='same' is not the same on both sides",
        "hooked stays: it has hooks, or is called in another way than with one tensor",
        "empty stays: all its weights are zero",
    ]


def test_a_layer_is_rewritten_where_that_was_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {8: SPEEDUP, 12: SPEEDUP - 0.01}
    asked: list[tuple[int, bool, bool]] = []

    def timed(conv: nn.Conv2d, form: Form, x: Tensor, training: bool) -> float:
        asked.append((conv.in_channels, form.before, training))
        return times[conv.in_channels]

    monkeypatch.setattr("fxprune.passes.rewrites.pattern_conv.measure_speedup", timed)
    layers = [nn.Conv2d(3, 8, 3), thin(nn.Conv2d(8, 8, 3, padding=1), "input_channel")]
    layers += [thin(nn.Conv2d(8, 12, 3, padding=1), "input_channel"), thin(nn.Conv2d(12, 8, 3), "input_channel")]
    layers += [copy.deepcopy(layers[1])]
    x = torch.randn(2, 3, 8, 8)
    pipeline = Pipeline([PatternConv("training")], x)
    small = pipeline(fxprune.trace(nn.Sequential(*layers), x)).graph_module
    assert [layer.kernel_size[0] for layer in small.children()] == [3, 2, 2, 3, 2]
    assert [call[0] for call in asked] == [8, 8, 12, 8], "layers of one kind, on one size, are timed once"
    assert all(training for *_, training in asked)
    assert pipeline.steps[0].modified


@pytest.mark.parametrize("measure", ["inference", "training"])
def test_measuring_changes_nothing(measure: str) -> None:
    model, inputs = patterned()
    graph = fxprune.trace(model, inputs).train()
    graph.get_submodule("4.1").eval()  # a batch norm whose averages stand still
    before, code = copy.deepcopy(graph.state_dict()), graph.code
    choices = PatternConv(measure, inputs).choices(graph)
    assert {choice.layer for choice in choices if choice.form} == {
        "1.conv1.0",
        "1.conv2",
        "2.conv1.0",
        "2.conv2",
        "3.conv1.0",
        "3.conv2",
        "4.0",
    }
    assert all((choice.speedup is None) == (choice.form is None) for choice in choices)
    assert all(torch.equal(before[name], tensor) for name, tensor in graph.state_dict().items())
    assert graph.code == code
    assert graph.training
    lowered = PatternConv(None, inputs)(graph).graph_module
    assert lowered.training
    assert not lowered.get_submodule("4.1").training, "each module keeps its mode"


def test_what_a_choice_says() -> None:
    form = Form.of(thin(nn.Conv2d(4, 4, 3), "filter"), False)
    assert str(Choice("conv", form, 1.5)) == "conv becomes 2×2, 1.50 times as fast"
    assert str(Choice("conv", form, 0.9)) == "conv does not become 2×2, 0.90 times as fast"
    assert not Choice("conv", form, 1.0).taken


def test_a_model_without_patterns_is_left_alone() -> None:
    model, inputs = prepare(MODELS["residual"])
    graph = fxprune.trace(model, inputs)
    result = PatternConv(None, inputs)(graph)
    assert not result.modified
    assert result.graph_module is graph


def test_what_is_refused() -> None:
    with pytest.raises(PlanError, match=r"measure='fast' is not known; use 'inference' or 'training', or None"):
        PatternConv("fast")
    with pytest.raises(PassError, match="this pass needs example inputs"):
        ALL(fxprune.trace(nn.Sequential(nn.Conv2d(3, 4, 3), conv_bn(4, 4), head(4)), torch.randn(1, 3, 8, 8)))
