"""Models that plain Python steers: what becomes a graph, what Python's reading and calling freezes, and why.

The laws hold these networks too: they are in ``MODELS``.
"""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import steered_models
import torch
import torchvision
from laws import assert_same_state, random_plan, slice_is_zero, thinner
from models import MODELS, cast, conv_bn, image_net, prepare, randomize
from torch import Tensor, nn

import fxprune
from fxprune import Analysis, Plan, passes
from fxprune.channels.steered import Steering
from fxprune.channels.tensor import ChannelTensor
from fxprune.errors import AnalysisError, ExportError, PassError, VerificationError
from fxprune.graph.traced import regions_of

STEERED = [name for name, case in MODELS.items() if case.steered]


def analysed(name: str) -> tuple[nn.Module, Any, Any, Analysis]:
    model, example = prepare(MODELS[name])
    graph = fxprune.trace(model, example)
    return model, example, graph, fxprune.analyze(graph, example)


def reasons(analysis: Analysis, parameter: str, axis: int = 0) -> set[str]:
    return {str(item.reason) for item in analysis.frozen if (item.parameter, item.axis) == (parameter, axis)}


# ------------------------------------------------------------------------------------------- what is a graph


def test_the_largest_parts_are_graphs_and_the_rest_is_the_model_itself() -> None:
    model, example, graph, analysis = analysed("steered_pyramid")
    assert type(graph) is steered_models.Pyramid
    assert list(regions_of(graph)) == ["backbone", "down", "head"]
    assert type(graph.logits) is nn.Conv2d
    assert fxprune.trace(graph, example) is graph
    assert "graphs: backbone, down, head. The rest of Pyramid is plain Python" in str(analysis)
    assert not any(isinstance(part, fxprune.TracedModule) for part in model.modules())


def test_python_may_ask_a_region_for_its_numbers() -> None:
    graph = analysed("steered_reads_an_attribute")[2]
    assert "cell" in regions_of(graph)
    assert copy.deepcopy(graph).cell.width == graph.cell.width == 6


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = conv_bn(3, 4)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        y = self.inner(x)
        return y + y if twice else y


class CallsUnlike(nn.Module):
    """Python calls one part in two ways, and enters another past its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.flagged, self.entered = Flagged(), Flagged()
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            raise ValueError
        return self.last(self.flagged(x) + self.flagged(x, twice=True) + self.entered(x) + self.entered.inner(x))


def test_a_part_that_is_called_in_two_ways_is_no_graph() -> None:
    model = randomize(CallsUnlike()).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = fxprune.trace(model, x)
    assert list(regions_of(graph)) == ["flagged.inner", "entered.inner"]
    analysis = fxprune.analyze(graph, x)
    assert [group.size for group in analysis.groups.values()] == [4]
    slice_is_zero(graph, x, analysis, random_plan(analysis, 0))


# ---------------------------------------------------------------------------------------- what Python freezes


@pytest.mark.parametrize(
    ("name", "parameter", "reason"),
    [
        ("steered_reads_a_size", "backbone.1.0.weight", r"plain Python reads its size \(at .*steered_models.py:\d+\)"),
        ("steered_scaled_in_python", "left.weight", "plain Python reads its size"),
        ("steered_splits_in_python", "wide.0.weight", "plain Python calls split with sizes of its own"),
        ("steered_chunks_in_python", "wide.0.weight", "plain Python calls chunk with sizes of its own"),
        ("steered_attends", "query.weight", "plain Python calls scaled_dot_product_attention with sizes of its own"),
        ("steered_chooses", "other.0.weight", "unused"),
        ("steered_returns_an_object", "backbone.1.0.weight", "output"),
        ("steered_calls_twice", "backbone.1.0.weight", "same is called with other channels elsewhere"),
    ],
)
def test_what_plain_python_freezes(name: str, parameter: str, reason: str) -> None:
    *_, analysis = analysed(name)
    texts = reasons(analysis, parameter)
    assert any(re.match(reason, text) for text in texts), texts


def test_channels_that_python_adds_stay() -> None:
    *_, analysis = analysed("steered_pads_in_python")
    assert re.match(r"plain Python adds it \(at .*steered_models.py:\d+\)", *reasons(analysis, "wide.0.weight", 1))
    assert analysis.sizes["backbone.1.0"] == 8  # the others may go


def test_sizes_of_the_image_may_be_read() -> None:
    *_, analysis = analysed("steered_reads_other_sizes")
    assert sorted(analysis.sizes.values()) == [6, 8]


def test_coupling_crosses_python() -> None:
    *_, analysis = analysed("steered_sum_in_python")
    group = next(group for group in analysis.groups.values() if group.name == "left.0")
    places = {(member.parameter, member.axis) for member in group.members}
    assert {("left.0.weight", 0), ("right.0.weight", 0), ("last.weight", 1)} <= places


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("check", "steered_splits_in_python"),
        ("check", "steered_attends"),
        ("size", "steered_scaled_in_python"),
    ],
)
def test_without_the_watch_the_law_breaks(method: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = {"check": lambda *_: None, "size": lambda self, tensor, axis: tensor.data_.shape[axis]}
    monkeypatch.setattr(Steering, method, blind[method])
    _, example, graph, analysis = analysed(name)
    plan = Plan({group: [size - 1] for group, size in analysis.sizes.items()}, analysis.sizes, analysis.options)
    with pytest.raises((AssertionError, VerificationError, RuntimeError)):
        slice_is_zero(graph, example, analysis, plan)


class OnlyEvaluates(steered_models.Pyramid):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.training:
            raise NotImplementedError("no training here")
        return super().forward(x)


def test_a_model_that_does_not_train_on_the_example() -> None:
    model, x = randomize(OnlyEvaluates()).double().eval(), MODELS["steered_pyramid"].inputs()[0].double()
    graph = fxprune.trace(model, x)
    analysis = fxprune.analyze(graph, x)
    assert "in train mode" in analysis.not_run
    assert "not run: OnlyEvaluates does not run" in str(analysis)
    compact, param_map = fxprune.rewrite(graph, analysis, random_plan(analysis, 1))
    result = fxprune.verify(graph, compact, param_map, x)
    assert not result.trained
    assert "in eval mode only" in str(result)


class Raises(steered_models.Pyramid):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if any(isinstance(parameter, ChannelTensor) for parameter in self.parameters()):
            raise LookupError("no names here")
        return super().forward(x)


def test_python_that_fails_on_names() -> None:
    x = MODELS["steered_pyramid"].inputs()[0]
    graph = fxprune.trace(Raises().eval(), x)
    with pytest.raises(AnalysisError, match=r"Raises does not run on channel names in eval mode .*no names here"):
        fxprune.analyze(graph, x)


# ----------------------------------------------------------------------------------------- what can be done


def test_prune_save_and_load(tmp_path: Path) -> None:
    model, example = prepare(MODELS["steered_proposes"])
    compact = fxprune.prune(model, example, passes.Magnitude(), budget=fxprune.Budget(flops=0.6))
    fxprune.save(compact, tmp_path / "compact.safetensors")
    loaded = fxprune.load(tmp_path / "compact.safetensors", copy.deepcopy(model))
    assert_same_state(loaded, compact)
    for actual, expected in zip(loaded.eval()(*example), compact.eval()(*example), strict=True):
        assert torch.equal(actual, expected)


def test_export(tmp_path: Path) -> None:
    model, example = prepare(MODELS["steered_pyramid"], dtype=torch.float32)
    compact = fxprune.prune(model, example, passes.Magnitude(), budget=fxprune.Budget(flops=0.7, tolerance=0.1))
    assert fxprune.export_onnx(compact, example, tmp_path / "model.onnx").difference < 1e-4


def test_no_export_of_python_that_no_exporter_follows(tmp_path: Path) -> None:
    class Numpy(steered_models.Pyramid):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            if torch.compiler.is_exporting() or torch.jit.is_tracing():
                raise TypeError("nothing to follow")
            return super().forward(x)

    with pytest.raises(ExportError, match="can't export this model"):
        fxprune.export_onnx(Numpy(), MODELS["steered_pyramid"].inputs(), tmp_path / "model.onnx", dynamic_batch=False)


def test_a_pipeline_runs_on_regions() -> None:
    _, example, graph, _ = analysed("steered_pyramid")
    with pytest.raises(PassError, match="Pyramid is no single graph; run the pipeline on its regions: backbone, down"):
        fxprune.Pipeline([passes.FoldBatchNorm()], example)(graph)


# ------------------------------------------------------------------------------------------ custom operators


@torch.library.custom_op("fxprune_tests::scale_channels", mutates_args=())
def scale_channels(x: Tensor, scale: Tensor, mix: Tensor | None = None) -> Tensor:
    """float[B, C, H, W] * float[C], and the rows of each image mixed by float[H, H]."""
    y = x * scale[:, None, None]
    return y.clone() if mix is None else torch.einsum("bchw,hg->bcgw", y, mix)


@scale_channels.register_fake
def _(x: Tensor, scale: Tensor, mix: Tensor | None = None) -> Tensor:
    return torch.empty_like(x)


class Scales(nn.Module):
    def __init__(self, mix: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(12))
        self.mix = nn.Parameter(torch.empty(8, 8)) if mix else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.fxprune_tests.scale_channels(x, self.scale, self.mix)


@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize("mix", [False, True])
def test_a_registered_operator_prunes(mix: bool) -> None:
    model = randomize(image_net(conv_bn(8, 12), Scales(mix), cout=12)).double().eval()
    x = cast(MODELS["chain"].inputs(), torch.float64)
    graph = fxprune.trace(model, x)
    before = fxprune.analyze(graph, x)
    assert reasons(before, "1.0.weight") == {"unknown operator fxprune_tests.scale_channels (at scale_channels)"}

    letters = "b c h w, c, h g -> b c g w" if mix else "b c h w, c -> b c h w"
    fxprune.register_operator(torch.ops.fxprune_tests.scale_channels, letters)
    analysis = fxprune.analyze(graph, x)
    assert not analysis.unknown
    group = next(group for group in analysis.groups.values() if group.name == "1.0")
    assert ("2.scale", 0) in {(member.parameter, member.axis) for member in group.members}
    for seed in range(3):
        compact, param_map = fxprune.rewrite(graph, analysis, random_plan(analysis, seed))
        fxprune.verify(graph, compact, param_map, x, gradients=False)


@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize(
    ("operator", "letters", "message"),
    [
        ("nowhere::nothing", "a -> a", r"operator='nowhere::nothing' is no custom operator: give torch.ops.mylib.myop"),
        ("aten::relu", "a -> a", "operator='aten::relu' is no custom operator"),
        ("relu", "a -> a", "operator='relu' is no custom operator"),
        ("fxprune_tests::scale_channels", "b c", r"letters='b c' can't be read"),
        ("fxprune_tests::scale_channels", "b c c -> b", r"can't be read: .* no letter twice in one tensor"),
        ("fxprune_tests::scale_channels", "b chan -> b", r"each axis one letter"),
    ],
)
def test_letters_that_can_not_be_registered(operator: str, letters: str, message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        fxprune.register_operator(operator, letters)


@pytest.mark.usefixtures("own_tables")
def test_letters_that_do_not_fit_the_call() -> None:
    fxprune.register_operator("fxprune_tests::scale_channels", "b c, c -> b c")
    model = image_net(conv_bn(8, 12), Scales(False), cout=12)
    with pytest.raises(AnalysisError, match=r"letters 'b c, c -> b c', but here it takes tensors with \[4, 1\] axes"):
        fxprune.analyze(model, MODELS["chain"].inputs())


# -------------------------------------------------------------------------------------------- torchvision


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_detector_trains_in_a_session_while_it_is_cut() -> None:
    torch.manual_seed(0)
    model = torchvision.models.detection.fcos_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64, trainable_backbone_layers=5
    )
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    boxes = torch.tensor([[4.0, 4, 40, 40]])
    example = (images, [{"boxes": boxes, "labels": torch.tensor([1])} for _ in images])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    with fxprune.Session(model, example, optimizer, progress=False) as session:
        for _ in range(2):
            losses = session.model.train()(*example)
            total = sum(losses.values())
            assert torch.isfinite(total)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            plan = passes.Magnitude().plan(session.analysis, fxprune.Budget(flops=0.7))
            optimizer.zero_grad()
            session.reconfigure(plan)
    detections = session.model.eval()(images)
    assert [set(detection) for detection in detections] == [{"boxes", "scores", "labels"}] * 2


class Detects(nn.Module):
    """Plain Python that gives the layers behind it nothing, as a detector does that finds no box."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        features = self.stem(x)
        features = features[features.sum((1, 2, 3)) > 1e9]
        return self.head(features) if len(features) < 9 else features


def test_a_norm_that_is_given_nothing_goes_with_its_layer() -> None:
    model, x = Detects().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    analysis = fxprune.analyze(fxprune.trace(model, x), x)
    members = {member.parameter for member in analysis.groups["head.0"].members}
    assert {"head.0.weight", "head.1.weight", "head.1.running_mean", "head.3.weight"} <= members
    compact, _ = fxprune.rewrite(analysis.graph, analysis, thinner(analysis, 0))
    assert compact.head(x).shape == (2, 4, 4, 4)
