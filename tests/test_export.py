"""ONNX: the file computes what PyTorch computes at more than one batch size, or it is not there."""

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from models import MODELS, prepare, randomize
from torch import Tensor, nn

import fxprune
from fxprune import Budget, cost, passes
from fxprune.errors import ExportError
from fxprune.files import export


def pruned(name: str) -> tuple[nn.Module, Any]:
    model, inputs = prepare(MODELS[name], dtype=torch.float32)
    budget = Budget(channels=0.6, tolerance=0.2)
    return fxprune.prune(model, inputs, passes.Magnitude(), budget=budget), inputs


def run(path: Path, **feeds: Tensor) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})


NETS = ["residual", "shufflenet", "densenet", "unet", "attention_shape", "dict_output", "tuple_output", "two_inputs"]


@pytest.mark.parametrize("name", [*NETS, "keyword_input", "auxiliary_head", "dropout", "prelu"])
def test_compact_models_export(name: str, tmp_path: Path) -> None:
    compact, inputs = pruned(name)
    exported = fxprune.export_onnx(compact, inputs, tmp_path / "model.onnx")
    assert exported.path == tmp_path / "model.onnx"
    assert exported.batches == (2, 3)
    assert 0 <= exported.difference <= 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_the_batch_is_dynamic_unless_told(tmp_path: Path) -> None:
    compact, (x,) = pruned("residual")
    compact.eval()
    fxprune.export_onnx(compact, x[:1], tmp_path / "any.onnx")
    name = onnx.load(tmp_path / "any.onnx").graph.input[0].name
    for size in (1, 7):
        several = torch.randn(size, *x.shape[1:])
        np.testing.assert_allclose(
            run(tmp_path / "any.onnx", **{name: several})[0], compact(several).detach(), atol=1e-5
        )
    fixed = fxprune.export_onnx(compact, x, tmp_path / "fixed.onnx", dynamic_batch=False)
    assert fixed.batches == (2,)
    assert onnx.load(tmp_path / "fixed.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


def test_a_dict_is_an_input(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            return self.b(self.a(inputs["image"]).relu()) + inputs["bias"]

    inputs = ({"image": torch.randn(2, 3, 8, 8), "bias": torch.randn(2, 4, 1, 1)},)
    compact = fxprune.prune(Net(), inputs, passes.Magnitude(), budget=fxprune.Budget(channels=0.5))
    assert fxprune.export_onnx(compact, inputs, tmp_path / "net.onnx").difference < 1e-5


def test_a_weight_that_a_hook_made_in_a_training_step(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), nn.Conv2d(16, 4, 1))
    compact = fxprune.prune(model, x, passes.Magnitude(), budget=fxprune.Budget(channels=0.5)).train()
    compact(x).sum().backward()
    assert fxprune.export_onnx(compact, x, tmp_path / "net.onnx").difference < 1e-5


def test_keyword_inputs_keep_their_places(tmp_path: Path) -> None:
    """The keywords are given in another order than forward has them."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return self.out(torch.relu(self.fc(x)) * scale + shift)

    inputs = ((torch.randn(2, 4),), {"shift": torch.randn(2, 1), "scale": torch.randn(2, 1)})
    compact = fxprune.prune(Gated(), inputs, passes.Random(), budget=Budget(channels=0.5))
    for model, file in ((compact, "compact.onnx"), (Gated(), "dense.onnx")):
        assert fxprune.export_onnx(model, inputs, tmp_path / file).difference < 1e-5


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    compact, inputs = pruned("dropout")
    for training in (True, False):
        compact.train(training)
        before, numbers = copy.deepcopy(compact.state_dict()), torch.get_rng_state()
        fxprune.export_onnx(compact, inputs, tmp_path / "model.onnx")
        assert compact.training == training
        assert all(module.training == training for module in compact.modules())
        assert all(torch.equal(tensor, before[name]) for name, tensor in compact.state_dict().items())
        assert torch.equal(torch.get_rng_state(), numbers)


def test_the_difference_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compact, inputs = pruned("chain")
    with caplog.at_level(logging.INFO, logger="fxprune"):
        exported = fxprune.export_onnx(compact, inputs, tmp_path / "model.onnx")
    assert str(exported) in caplog.text
    assert f"onnxruntime == PyTorch to {exported.difference:.1e} at batch size 2 and 3" in str(exported)


def test_outputs_that_are_all_zero_are_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    inputs = torch.randn(2, 3, 4, 4)
    assert not fxprune.export_onnx(model, inputs, tmp_path / "model.onnx").flat
    for parameter in model[2].parameters():
        nn.init.zeros_(parameter)
    exported = fxprune.export_onnx(model, inputs, tmp_path / "zero.onnx")
    assert exported.flat
    assert "; all outputs were zero, so this says little: load trained weights" in str(exported)


class Scales(nn.Module):
    """Takes a number beside its tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.last(self.first(x * scale))


def test_numbers_among_the_inputs_are_written_into_the_file(tmp_path: Path) -> None:
    inputs = (), {"x": torch.randn(2, 3, 8, 8), "scale": 0.5}
    exported = fxprune.export_onnx(randomize(Scales()), inputs, tmp_path / "model.onnx")
    assert exported.batches == (2, 3)
    assert [given.name for given in onnx.load(tmp_path / "model.onnx").graph.input] == ["x"]


class MovesAnAverage(nn.Module):
    """Counts in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        with torch.no_grad():
            self.mean.lerp_(y.abs().mean(), 0.1)
        return y / (1 + self.mean)


def test_a_file_starts_each_run_from_the_same_buffers(tmp_path: Path) -> None:
    exported = fxprune.export_onnx(randomize(MovesAnAverage()), torch.randn(2, 3, 8, 8), tmp_path / "model.onnx")
    assert exported.moving == ("mean",)
    assert "; the model writes into mean, the file starts each run from what is there now" in str(exported)


def test_integers_and_booleans_come_out_too(tmp_path: Path) -> None:
    class Predictor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.b(self.a(x))
            return y, y.argmax(1), y > 0

    compact = fxprune.prune(Predictor(), torch.randn(2, 4), passes.Random(), budget=Budget(channels=0.5))
    fxprune.export_onnx(compact, torch.randn(2, 4), tmp_path / "model.onnx")


# ---------------------------------------------------------------------------------------------- failures


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"can't write .*nowhere/model.onnx: there is no folder .*nowhere"):
        fxprune.export_onnx(nn.Linear(2, 2), torch.randn(1, 2), tmp_path / "nowhere" / "model.onnx")


@pytest.mark.parametrize("gap", [0.25, float("nan")])
def test_a_mismatch_raises_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gap: float
) -> None:
    compact, inputs = pruned("chain")
    path = tmp_path / "model.onnx"
    path.write_text("the last good one")
    monkeypatch.setattr(export, "compare_onnx", lambda *_: (gap, False))
    with pytest.raises(
        ExportError, match=rf"differs from PyTorch by {gap:.2e} of the largest output, allowed is 1e-04"
    ):
        fxprune.export_onnx(compact, inputs, path)
    assert path.read_text() == "the last good one"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_a_mismatch_of_what_python_steers_names_equal_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "compare_onnx", lambda *_: (0.25, False))
    with pytest.raises(ExportError, match="Boxes chosen by scores that are all alike may differ: try trained weights"):
        fxprune.export_onnx(nn.Linear(2, 2), torch.randn(1, 2), tmp_path / "model.onnx", dynamic_batch=False)
    with pytest.raises(ExportError, match=r"model\.onnx. Please report"):
        fxprune.export_onnx(*pruned("chain"), tmp_path / "model.onnx", dynamic_batch=False)


class Outputs(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (lambda x: x + 1, None),
        (lambda x: x / 0, None),
        (lambda x: x[:1], r"returns tensors of shapes \[\(2, 3\)\], PyTorch \[\(1, 3\)\]"),
        (lambda x: (x, x), r"shapes \[\(2, 3\)\], PyTorch \[\(2, 3\), \(2, 3\)\]"),
    ],
)
def test_the_comparison_sees(tmp_path: Path, results: Any, message: str | None) -> None:
    inputs = (torch.randn(2, 3).abs(),), {}
    path = tmp_path / "model.onnx"
    fxprune.export_onnx(Outputs(lambda x: 2 * x), inputs, path)
    if message is None:
        assert not export.compare_onnx(Outputs(results), [inputs, inputs], path)[0] <= 0.01
    else:
        with pytest.raises(ExportError, match=message):
            export.compare_onnx(Outputs(results), [inputs], path)


def test_what_torch_can_not_export(tmp_path: Path) -> None:
    @torch.library.custom_op("fxprune_tests::not_in_onnx", mutates_args=())
    def strange(x: Tensor) -> Tensor:
        return x.clone()

    strange.register_fake(lambda x: torch.empty_like(x))
    with pytest.raises(
        ExportError, match=r"torch.onnx can't export this model: \w+: .*not_in_onnx.*dynamic_batch=False"
    ):
        fxprune.export_onnx(Outputs(lambda x: strange(x)), torch.randn(2, 3), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_onnxruntime_can_not_run(tmp_path: Path) -> None:
    model, inputs = prepare(MODELS["chain"], dtype=torch.bfloat16)
    with pytest.raises(ExportError, match=r"onnxruntime can't run this model: \w+: .*[bB][fF]loat16"):
        fxprune.export_onnx(model, inputs, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_example_inputs_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"do not fit forward\(input\): too many positional arguments"):
        fxprune.export_onnx(nn.Linear(2, 2), (torch.randn(1, 2), torch.randn(1, 2)), tmp_path / "model.onnx")


def test_weights_too_large_for_one_file_stand_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "LARGEST", 0)
    compact, inputs = pruned("chain")
    fxprune.export_onnx(compact, inputs, tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert run(tmp_path / "model.onnx", input=inputs[0])[0].shape == (2, 4)


# ----------------------------------------------------------------------------------------------- the zoo

ZOO = ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "densenet121", "efficientnet_b0"]
ZOO += ["googlenet", "regnet_y_400mf", "convnext_tiny", "swin_t", "vit_b_32", "mnasnet0_5"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_torchvision_at_half_the_flops(name: str, tmp_path: Path) -> None:
    options = {"init_weights": False} if name == "googlenet" else {}
    model = randomize(torchvision.models.get_model(name, weights=None, **options), 0).eval()
    x = torch.randn(2, 3, *((224, 224) if name == "vit_b_32" else (64, 64)))
    compact = fxprune.prune(model, x, passes.Magnitude(), budget=Budget(flops=0.5), verify=False)
    assert 0.49 <= cost.flops(compact, x) / cost.flops(model, x) <= 0.5
    exported = fxprune.export_onnx(compact, x, tmp_path / "model.onnx")
    assert exported.difference <= 1e-4
