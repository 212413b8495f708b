"""The command line: every verb does what its help says, and every wrong use gives one line and its exit code."""

import errno
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from torchvision.models import _api
from typer.testing import CliRunner

import fxprune
from fxprune import passes
from fxprune.budget.timing import Spread
from fxprune.cli import say
from fxprune.cli.app import app
from fxprune.cli.data import load_images, warn_of_chance
from fxprune.cli.models import ModelError, Source, timm_model
from fxprune.cli.preprocessing import MEAN, STD, Asked, Preprocessing, choose_preprocessing
from fxprune.cli.results import describe_restoration
from fxprune.report.bench import Bench, Measured
from fxprune.rewrite.restore import RestoredLayer
from fxprune.tables import make_table

FACTORY = """
import torch
from torch import nn

def net(num_classes=3):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))

class Frozen(nn.Module):
    def forward(self, x):
        return x.relu()

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 32), nn.Linear(32, 8)
    def forward(self, ids):
        return self.down(self.up(self.embed(ids)).relu())

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 2)
    def forward(self, x, y):
        return self.b(self.a(x + y).relu())

def broken():
    raise RuntimeError("no luck")

def number():
    return 7

nothing = None
"""
SHAPE = ["--input", "1,3,8,8"]
ROUNDED = ["--round-to", "1", "--tolerance", "0.3", "--no-measure"]
TINY = ["torchvision:fxprune_tiny", *SHAPE, *ROUNDED]


def tiny(num_classes: int = 3, **_: Any) -> nn.Module:
    """A model that can be looked up by name, as those of torchvision."""
    namespace: dict[str, Any] = {}
    exec(FACTORY, namespace)
    model: nn.Module = namespace["net"](num_classes)
    return model


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, with net.py; torchvision knows fxprune_tiny."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(_api.BUILTIN_MODELS, "fxprune_tiny", tiny)
    (tmp_path / "net.py").write_text(FACTORY)
    yield tmp_path
    sys.modules.pop("net", None)


def run(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result


def pruned(*more: str, out: str = "out", onnx: str = "--no-onnx") -> dict[str, Any]:
    options = [onnx, "-o", out, "--json"]
    result: dict[str, Any] = json.loads(run("prune", *TINY, "--flops", "0.5", *options, *more).stdout)
    return result


# ------------------------------------------------------------------------------------------------ verbs


def test_prune_writes_a_folder() -> None:
    report = pruned(onnx="--onnx")
    assert {entry.name for entry in Path("out").iterdir()} == {
        "plan.json",
        "model.safetensors",
        "model.onnx",
        "report.html",
        "report.json",
    }
    assert report == json.loads(Path("out/report.json").read_text())
    before, after = report["totals"]["flops"]
    assert 0.4 * before < after <= 0.5 * before
    assert "masked original == compact" in report["about"]["verified"]
    compact = fxprune.load("out/model.safetensors", tiny())
    assert {name: both[1] for name, both in report["groups"].items()} == fxprune.analyze(
        compact, torch.randn(1, 3, 8, 8)
    ).sizes
    assert sum(entry["flops"][1] for entry in report["layers"]) == after
    onnx.checker.check_model("out/model.onnx")


def test_no_file_of_another_model_stays() -> None:
    pruned(onnx="--onnx")
    Path("out/notes.txt").write_text("mine")
    result = run("prune", *TINY, "--flops", "0.6", "--no-onnx", "-o", "out")
    assert {file.name for file in Path("out").iterdir()} == {
        "plan.json",
        "model.safetensors",
        "report.html",
        "report.json",
        "notes.txt",
    }
    assert "written to out: model.safetensors, plan.json, report.html, report.json" in result.stderr
    assert len({path.stat().st_mode for path in Path("out").iterdir()}) == 1, "all can be read by whom the user lets"


def test_the_same_seed_gives_the_same_files() -> None:
    pruned(out="a")
    pruned(out="b")
    pruned("--seed", "1", out="c")
    for name in ("plan.json", "model.safetensors", "report.json"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()
    assert Path("a/model.safetensors").read_bytes() != Path("c/model.safetensors").read_bytes()


def test_prune_prints_tables() -> None:
    result = run("prune", *TINY, "--flops", "50%", "--no-onnx", "--no-verify")
    assert re.search(r"^0\s+Conv2d\s+3\s+16 → \d+", result.stdout, re.MULTILINE)
    assert re.search(r"^FLOPs\s+[\d,]+\s+[\d,]+\s+(4\d|50)%", result.stdout, re.MULTILINE)
    assert "widths: multiples of 1 in 2 of 2 groups" in result.stdout
    assert "weights of torchvision:fxprune_tiny are random" in result.stderr
    assert "written to out: model.safetensors, plan.json, report.html, report.json" in result.stderr


@pytest.mark.parametrize(
    ("options", "kind", "most"),
    [
        (["--macs", "0.5"], "flops", 0.5),
        (["--params", "50%"], "params", 0.5),
        (["--params", "1.5k"], "params", 1500),
        (["--channels", "20"], "channels", 20),
        (["--memory", "0.02MB"], "memory", 20000),
        (["--flops", "0.9", "--params", "0.5"], "params", 0.5),
    ],
)
def test_budgets(options: list[str], kind: str, most: float) -> None:
    result = run("prune", *TINY, *options, "--minimum", "0.05", "--no-onnx", "--json")
    before, after = json.loads(result.stdout)["totals"][kind]
    assert after <= (most * before if most <= 1 else most)


def test_shares_by_pattern_and_the_scope() -> None:
    report = pruned("--channels", "0=0.5", "--channels", "3*=75%", "--scope", "local")
    assert list(report["groups"].values()) == [[16, 8], [16, 12]]
    options = json.loads(Path("out/plan.json").read_text())["options"]
    assert options["budget"] == "flops=0.5, channels={'0': 0.5, '3*': 0.75}, tolerance=0.3"
    assert options["scope"] == "local"


def test_layers(folder: Path) -> None:
    Path("deep.py").write_text(
        "from torch import nn\n"
        "class Block(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return x + super().forward(x)\n"
        "def net():\n"
        "    blocks = [Block(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(4)]\n"
        "    return nn.Sequential(nn.Linear(3, 8), *blocks, nn.Linear(8, 2))\n"
    )
    result = run("prune", "deep.py:net", "--input", "1,3", "--layers", "50%", "--no-onnx", "--no-measure", "--json")
    before, after = json.loads(result.stdout)["totals"]["params"]
    assert before - after == 2 * 2 * (8 * 8 + 8)
    gone = json.loads(Path("out/plan.json").read_text())["layers"]
    assert len(gone) == 2
    run("apply", "out/plan.json", "--model", "deep.py:net", "-o", "again", "--no-onnx", "--no-measure")
    assert json.loads(Path("again/plan.json").read_text())["layers"] == gone


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        (["0.5", "3=0.5"], "--channels 0.5 beside others"),
        (["3=0.5", "3=0.6"], "--channels 3=0.6: '3' has a share already, 0.5"),
        (["3=x"], "'x' is no amount"),
        (["9=0.5"], "channels={'9': 0.5} names no group"),
    ],
)
def test_shares_that_make_no_sense(amounts: list[str], message: str) -> None:
    options = [word for amount in amounts for word in ("--channels", amount)]
    result = run("prune", *TINY, *options, code=1 if "names no" in message else 2)
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_keep_and_rounding() -> None:
    report = pruned("--keep", "0", "--flops", "0.7")
    assert report["groups"]["0"] == [16, 16]
    report = json.loads(
        run("prune", *TINY[:3], "--params", "0.7", "--round-to", "4", "--no-onnx", *ROUNDED[2:], "--json").stdout
    )
    assert any(after % 4 == 0 and after < before for before, after in report["groups"].values())


@pytest.mark.parametrize(
    "criterion",
    "magnitude batch-norm-scale geometric_median optimal-brain-surgeon taylor fisher activation single-shot random "
    "uniform erdos-renyi precrop".split(),
)
def test_every_criterion(criterion: str, folder: Path) -> None:
    data = ["--data", str(photos(folder / "photos"))]
    options = ["--channels", "0.6", "--minimum", "0", "--no-onnx"]
    report = json.loads(run("prune", *TINY, *options, *data, "--criterion", criterion, "--json").stdout)
    assert report["about"]["criterion"] == criterion
    assert report["totals"]["channels"][1] <= 0.6 * report["totals"]["channels"][0]


def test_with_data_and_no_criterion_some_are_tried(folder: Path) -> None:
    data = ["--data", str(photos(folder / "photos", varied=True))]
    result = run("prune", *TINY, "--channels", "0.6", "--minimum", "0", "--no-onnx", *data, "--json")
    assert json.loads(result.stdout)["about"]["criterion"] in ("magnitude", "optimal-brain-surgeon", "fisher")
    assert re.search(r"OptimalBrainSurgeon .*%", result.stderr)


PLAIN = Preprocessing(8, (8, 8), MEAN, STD, "a guess")


def photos(folder: Path, classes: int = 3, *, varied: bool = False) -> Path:
    generator = np.random.default_rng(0)
    for number in range(classes):
        (folder / f"class{number}").mkdir(parents=True)
        for copy in range(3):
            image = Image.new("RGB", (10, 12), (80 * number, 60 * copy, 100))
            if varied:
                image = Image.fromarray(generator.integers(256, size=(12, 10, 3), dtype=np.uint8))
            image.save(folder / f"class{number}" / f"{copy}.png")
    return folder


def restored_by_hand(graph: nn.Module, images: Any) -> tuple[nn.Module, fxprune.Restoration]:
    """What the plan in ``out`` makes of ``graph``, restored."""
    traced = fxprune.trace(graph.eval(), torch.randn(1, 3, 8, 8))
    analysis = fxprune.analyze(traced, torch.randn(1, 3, 8, 8))
    compact, param_map = fxprune.rewrite(traced, analysis, fxprune.Plan.load("out/plan.json"))
    return compact, fxprune.restore(traced, compact, param_map, images)


def test_data_restores_and_tells_the_accuracy(folder: Path) -> None:
    torch.manual_seed(7)
    model = tiny()
    torch.save(model.state_dict(), "other.pt")
    images = ["--data", str(photos(folder / "photos", varied=True))]
    report = pruned("--weights", "other.pt", "--criterion", "magnitude", *images)
    expected, restoration = restored_by_hand(model, load_images(folder / "photos", PLAIN, 512, 0))
    compact = fxprune.load("out/model.safetensors", tiny())
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(compact.state_dict()[name], tensor)
    before, after = ([getattr(layer, when) for layer in restoration.layers] for when in ("before", "after"))
    assert sum(after) < sum(before)
    count, errors = len(restoration.layers), f"{sum(before) / len(before):.1%} → {sum(after) / len(after):.1%}"
    done = sum(layer.outcome == "restored" for layer in restoration.layers)
    assert report["about"]["restored"] == f"{done} of {count} layers by least squares, mean error {errors}"
    assert all(0 <= share <= 1 for share in report["accuracy"])
    assert "restored" not in pruned(out="without")["about"]

    result = run("apply", "out/plan.json", "--weights", "other.pt", *images, "--no-onnx", "--no-measure", "-o", "again")
    assert f"restored: {report['about']['restored']}" in result.stdout
    assert re.search(rf"^3.weight +restored +{restoration.layers[0].before:.2%}", result.stdout, re.MULTILINE)
    assert Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()


LOADER = """
import torch
from torch.utils.data import DataLoader, TensorDataset

images = TensorDataset(torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3)
ready = DataLoader(images, 10)

def make():
    return ready"""


@pytest.mark.parametrize("name", ["own.py:ready", "own.py:make"])
def test_data_from_a_loader_of_ones_own(name: str) -> None:
    Path("own.py").write_text(LOADER)
    report = pruned("--data", name)
    assert report["about"]["preprocessing"] == f"as {name} does"
    assert "layers by least squares" in report["about"]["restored"]


def test_preprocessing_is_told_and_as_asked(folder: Path) -> None:
    photos(folder / "photos", varied=True)
    report = pruned("--data", "photos", "--mean", "0.5", "--std", "0.1,0.2,0.3", "--size", "8", "--resize", "9")
    assert report["about"]["preprocessing"] == (
        "shorter side to 9, middle 8 x 8, mean 0.5, 0.5, 0.5, std 0.1, 0.2, 0.3 (--mean, --std, --size, --resize; mean "
        "and std of ImageNet, a guess: say others with --mean and --std)"
    )


@pytest.mark.parametrize(("weights", "resize"), [("IMAGENET1K_V1", 256), ("IMAGENET1K_V2", 232), (None, 256)])
def test_preprocessing_is_that_of_the_weights(weights: str | None, resize: int) -> None:
    source = Source("torchvision:resnet50")
    chosen = choose_preprocessing((1, 3, 224, 224), source, weights, Asked())
    assert (chosen.resize, chosen.crop, chosen.mean) == (resize, (224, 224), MEAN)
    assert chosen.origin == f"of torchvision's weights {weights or 'IMAGENET1K_V1'}"


def test_a_model_that_guesses_is_told_loudly(folder: Path) -> None:
    """Nine images of noise in three classes, random weights; and a model that is right is not suspected."""
    photos(folder / "photos", varied=True)
    result = run("prune", *TINY, "--flops", "0.5", "--data", "photos", "--no-onnx", "--no-measure", "-o", "chance")
    assert re.search(
        r"WARNING: the model is right on \d+\.\d% of this data before the cut, and guessing on 33.3%", result.stderr
    )
    batches = [(torch.eye(3).repeat(10, 1), torch.arange(30) % 3)]
    assert warn_of_chance(1.0, nn.Identity(), batches, "") == ""
    assert "right on 40.0%" in warn_of_chance(0.4, nn.Identity(), batches, "")


def test_data_of_one_image_is_refused(folder: Path) -> None:
    photos(folder / "photos")
    result = run("prune", *TINY, "--flops", "0.5", "--data", "photos", "--samples", "1", code=2)
    assert "data has one sample: restoring needs two at least" in result.stderr
    assert not Path("out").exists()


def test_what_is_not_restored_is_told() -> None:
    row = RestoredLayer("a.weight", 0.5, 0.25, "restored")
    left = fxprune.Restoration("least_squares", (row,), "left as cut, b: there is no least squares for GRU")
    assert describe_restoration(left) == f"1 of 1 layers by least squares, mean error 50.0% → 25.0%; {left.note}"
    averages = fxprune.Restoration("batch_norm", note="the running averages of 2 batch norms were renewed")
    assert describe_restoration(averages) == averages.note
    assert describe_restoration(fxprune.Restoration("least_squares")) == "no layer reads anything else than it did"


def test_apply_puts_a_plan_on_other_weights() -> None:
    pruned("--classes", "5")
    torch.manual_seed(7)
    model = tiny(5)
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()}}, "other.pt")
    result = run("apply", "out/plan.json", "--weights", "other.pt", "--no-onnx", "--no-measure", "-o", "again")
    assert "random" not in result.stderr
    assert Path("again/plan.json").read_bytes() == Path("out/plan.json").read_bytes()
    compact = fxprune.load("again/model.safetensors", tiny(5))
    kept = fxprune.Plan.load("out/plan.json").keep["0"]
    assert torch.equal(compact.get_parameter("0.bias"), model.get_parameter("0.bias")[list(kept)])


def test_apply_cuts_a_file_of_weights_as_it_cuts_a_model() -> None:
    pruned()
    torch.manual_seed(7)
    save_file(tiny().state_dict(), "other.safetensors")
    run("apply", "out/plan.json", "--weights", "other.safetensors", "--no-onnx", "--no-measure", "-o", "again")
    result = run("apply", "out/plan.json", "--weights", "other.safetensors", "--stream", "-o", "streamed")
    assert "written to streamed: model.safetensors, plan.json" in result.stderr
    assert sorted(path.name for path in Path("streamed").iterdir()) == ["model.safetensors", "plan.json"]
    assert Path("streamed/plan.json").read_bytes() == Path("again/plan.json").read_bytes()
    whole, streamed = (fxprune.load(f"{folder}/model.safetensors", tiny()) for folder in ("again", "streamed"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), streamed.parameters(), strict=True))
    run("bench", "streamed/model.safetensors", "--backend", "eager")


def test_a_compact_model_needs_no_more_arguments(folder: Path) -> None:
    pruned()
    result = run("export", "out/model.safetensors", "again.onnx")
    assert "onnxruntime == PyTorch" in result.stdout
    before = pruned()["totals"]["flops"][1]
    again = json.loads(
        run("prune", "out/model.safetensors", "--flops", "0.6", *ROUNDED, "--no-onnx", "-o", "two", "--json").stdout
    )
    assert again["totals"]["flops"][0] == before
    plan = json.loads(Path("two/plan.json").read_text())
    assert plan["sizes"] == json.loads(Path("out/plan.json").read_text())["sizes"], "from the dense model"
    compact = fxprune.load("two/model.safetensors", tiny())
    assert fxprune.cost.flops(compact, torch.randn(1, 3, 8, 8)) == again["totals"]["flops"][1]
    assert "16" not in run("inspect", "two/model.safetensors").stdout.partition("group ")[2].splitlines()[1].split()


def test_new_weights_for_a_compact_model() -> None:
    pruned()
    compact = fxprune.load("out/model.safetensors", tiny())
    with torch.no_grad():
        compact.get_parameter("3.bias").fill_(5)
    save_file(compact.state_dict(), "tuned.safetensors")
    result = run("export", "out/model.safetensors", "tuned.onnx", "--weights", "tuned.safetensors", "--json")
    assert json.loads(result.stdout)["difference"] < 1e-4
    arrays = [onnx.numpy_helper.to_array(array) for array in onnx.load("tuned.onnx").graph.initializer]
    assert any((array == 5).all() for array in arrays if array.size > 1)


def test_inspect() -> None:
    result = run("inspect", "torchvision:fxprune_tiny", *SHAPE)
    assert "2 groups, 32 channels that can be pruned" in result.stdout
    assert "output" in result.stdout
    facts = json.loads(run("inspect", "torchvision:fxprune_tiny", *SHAPE, "--json").stdout)
    assert facts["groups"]["0"]["channels"] == 16
    assert "1.weight[0]" in facts["groups"]["0"]["members"]
    assert "output" in {entry["reason"] for entry in facts["frozen"]}
    assert "go together with" in run("inspect", "torchvision:fxprune_tiny", *SHAPE, "--explain", "3").stdout
    facts = json.loads(run("inspect", "torchvision:fxprune_tiny", *SHAPE, "--explain", "3", "--json").stdout)
    assert "go together with" in facts["explain"]["3"]
    run("inspect", "torchvision:fxprune_tiny", *SHAPE, "--html", "page.html")
    assert Path("page.html").read_text().startswith("<!doctype html>")


def test_nothing_to_prune_is_a_budget_missed() -> None:
    assert "nothing in this model can be pruned" in run("inspect", "net:Frozen", *SHAPE, code=1).stderr


def test_bench() -> None:
    pruned()
    quick = ["--batch", "1,2", "--backend", "eager", "--seconds", "0"]
    result = run("bench", "out/model.safetensors", *quick)
    assert re.search(
        r"^eager\s+1\s+[\d.]+\s+[\d.]+\s+\d+% \(\d+% – \d+%\)\s+\d+%\s+\d+\.\d\d$", result.stdout, re.MULTILINE
    )
    quick[:4] = ["--batch", "1", "--backend", "onnxruntime"]
    report = json.loads(run("bench", "net:net", "--vs", "net.py:net", *SHAPE, *quick, "--json").stdout)
    assert [(row["backend"], row["batch"]) for row in report["rows"]] == [("onnxruntime", 1)]
    assert report["flops"][0] == report["flops"][1]
    assert report["idle"] == {"groups": {}, "layers": {}}


def test_prune_measures() -> None:
    report = pruned("--measure")
    assert report["bench"]["rows"][0]["backend"] == "eager"
    assert set(report["bench"]["layers"]) == {str(number) for number in range(8)}


@pytest.mark.parametrize(("option", "limit"), [("--latency", "0.7"), ("--latency-ms", "70")])
@pytest.mark.parametrize(("left", "code"), [(0.73, 0), (0.75, 1)])
def test_a_latency_is_measured_again(
    option: str, limit: str, left: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine on which the compact model takes ``left`` of 100 ms, whatever was planned."""

    def bench(*args: Any, **options: Any) -> Bench:
        row = Measured("eager", 1, Spread(0.1, 0.1, 0.1), *[Spread(left / 10, 0, 0), Spread(left, left, left)], 1.0)
        return Bench((row,), (2.0, 1.0), {}, {}, "")

    def plan(self: Any, analysis: fxprune.Analysis, budget: fxprune.Budget, **options: Any) -> fxprune.Plan:
        assert budget.latency is not None
        return fxprune.Plan({"0": range(8)}, analysis.sizes, analysis.options)

    monkeypatch.setattr(fxprune, "bench", bench)
    monkeypatch.setattr(passes.Magnitude, "plan", plan)
    result = run("prune", *TINY[:-1], option, limit, "--threads", "1", "--no-onnx", code=code)
    assert ("measured again after the cut, a forward pass takes" in result.stderr) == bool(code)
    assert Path("out/plan.json").exists()


def test_diff() -> None:
    pruned()
    pruned("--flops", "0.7", out="more")
    for name in ("plan.json", "model.safetensors", "report.json"):
        result = run("diff", f"out/{name}", f"more/{name}")
        widths = [fxprune.Plan.load(f"{folder}/plan.json").widths["0"] for folder in ("out", "more")]
        assert re.search(rf"^0\s+{widths[0]}\s+{widths[1]}\s+\+\d+%", result.stdout, re.MULTILINE)
        assert ("FLOPs" in result.stdout) == (name == "report.json")
    difference = json.loads(run("diff", "out/plan.json", "more/report.json", "--json").stdout)
    assert difference["groups"]["0"] == widths
    assert "all 2 groups are the same" in run("diff", "out/plan.json", "out/report.json").stdout
    assert re.search(r"^0 ", run("diff", "out/plan.json", "out/plan.json", "--all").stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        ("net:net", ["1,3,8,8"]),
        ("net.py:net", ["1x3x8x8"]),
        ("net:Words", ["int64:2,5"]),
        ("net:Two", ["2,4", "2,4"]),
    ],
)
def test_factories(model: str, shapes: list[str]) -> None:
    inputs = [word for shape in shapes for word in ("--input", shape)]
    run("prune", model, *inputs, *ROUNDED, "--params", "0.6", "--no-onnx", "-o", "out")
    told = run("export", "out/model.safetensors", "model.onnx", code=2).stderr
    assert f"out/model.safetensors was made of '{model}'. Building that runs code" in told
    run("export", "out/model.safetensors", "model.onnx", "--model", model)
    run("apply", "out/plan.json", "--model", model, "--no-onnx", "--no-measure", "-o", "again")


def test_a_model_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = "timm:mobilenetv4_conv_small", ["--input", "1,3,32,32", "--classes", "4"]
    text = run("prune", model, *options, *HALF, "--no-onnx", "--no-measure", "-o", "mobile").stdout
    assert "verified: masked original == compact" in text
    run("apply", "mobile/plan.json", "--no-onnx", "--no-measure", "-o", "again")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match="timm:resnet50 needs timm: pip install timm"):
        timm_model("resnet50", {}, False)


def test_help_and_version() -> None:
    text = run("--help").stdout
    for verb in ("inspect", "prune", "apply", "bench", "export", "diff"):
        assert verb in text
        assert "Example: fxprune " + verb in " ".join(run(verb, "--help").stdout.replace("│", " ").split())
    assert run("--version").stdout.strip() == f"fxprune {fxprune.__version__}"


def test_options_stand_where_one_types_them_first() -> None:
    """As for other verbs: the model behind a plan, -o for a file, --model where files say all."""
    run("prune", "net:net", *SHAPE, *ROUNDED, *HALF, "--no-onnx")
    run("apply", PLAN, "net:net", "--no-onnx", "--no-measure", "-o", "again")
    run("export", "out/model.safetensors", "-o", "model.onnx", "--model", "net:net")
    assert Path("model.onnx").exists()
    assert "groups are the same" in run("diff", PLAN, "again/plan.json", "--model", "net:net").stdout


def test_backends_are_a_list() -> None:
    pruned()
    quick = ["--batch", "1", "--seconds", "0", "--json"]
    for more in (["--backend", "eager,onnxruntime"], ["--backend", "eager", "--backend", "onnxruntime"]):
        found = json.loads(run("bench", "out/model.safetensors", *quick, *more).stdout)
        assert [row["backend"] for row in found["rows"]] == ["eager", "onnxruntime"]


def test_a_file_imports_what_stands_beside_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is imported, and when the model is made."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder / "own").mkdir()
    code = "import beside_1\n\ndef net():\n    import beside_2\n    return beside_2.net()"
    (folder / "own" / "model.py").write_text(code)
    (folder / "own" / "beside_1.py").write_text("")
    (folder / "own" / "beside_2.py").write_text(FACTORY)
    assert "2 groups" in run("inspect", "own/model.py:net", *SHAPE).stdout


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("inspect torchvision:resnet1", "torchvision:resnet18"),
        ("inspect resnet1", "resnet18"),
        ("inspect torchv", "torchvision:"),
        ("inspect timm:resnet18.", ""),
        ("prune torchvision:resnet18 --criterion opt", "optimal-brain-surgeon"),
        ("bench torchvision:resnet18 --backend onnxruntime-c", "onnxruntime-cuda"),
        ("inspect nowhere:resnet1", ""),
    ],
)
def test_the_shell_completes_names(typed: str, found: str) -> None:
    words = f"fxprune {typed}"
    environment = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1), "_FXPRUNE_COMPLETE": "complete_bash"}
    result = CliRunner().invoke(app, [], env=environment, prog_name="fxprune")
    assert found in result.stdout.split() if found else result.stdout.strip() == ""


def test_python_runs_the_module() -> None:
    """In a process of its own, in which torch's own warnings are kept out and ours are one line."""
    code = "import sys, warnings; sys.argv = ['fxprune', '--version']; import runpy\n"
    code += "try: runpy.run_module('fxprune', run_name='__main__')\nexcept SystemExit: pass\n"
    code += "warnings.warn('ours'); warnings.warn_explicit('theirs', UserWarning, 'x.py', 1, module='torch.nn')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"fxprune {fxprune.__version__}"
    assert done.stderr.strip() == "warning: ours"


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_tables_keep_names_where_a_terminal_is_narrow(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Columns go, and it is said which; what stays is whole."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(say, "Console", partial(Console, width=width, color_system=None))
    heads = ["inputs", "outputs", "parameters", "FLOPs", "left"]
    row = ["layer1.0.downsample.0", "Conv2d", "64 → 16", "64", "36.9 k → 9216", "4.72 M → 1.18 M", "25%"]
    say.print_output(make_table(("layer", "kind"), heads, [row]))
    out, told = capsys.readouterr()
    head, *lines = out.splitlines()
    assert max(map(len, out.splitlines())) <= width
    assert lines[0].startswith("layer1.0.downsample.0")
    shown = [name for name in ("kind", *heads) if name in head.split()]
    gone = [name for name in ("kind", *heads) if name not in shown]
    assert shown[-1] == "left"
    assert (f"without {', '.join(gone)}, for which {width} columns are too few" in told) == bool(gone)
    assert bool(gone) == (width < 100)
    cells = dict(zip(["layer", "kind", *heads], row, strict=True))
    assert all(cells[name] in lines[0] for name in shown)


def test_errors_have_options_as_they_are_typed() -> None:
    said = say.speak_options("minimum=2 must be; round_to='a'; pass dynamic_batch=False; kept by keep=")
    assert said == "--minimum 2 must be; --round-to 'a'; pass --fixed-batch; kept by --keep "


# ---------------------------------------------------------------------------------------------- wrong use


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


PLAN = "out/plan.json"
HALF = ["--flops", "0.5"]
WRONG: list[tuple[list[str], int, str]] = [
    (["prune", *TINY], 2, r"an empty budget: give at least one of flops.* For example --flops 0\.5"),
    (["prune", "resnet18", *HALF], 2, "'resnet18' names no model: give torchvision:NAME"),
    (["prune", "torchvision:resnet81", *HALF], 2, "torchvision has no model 'resnet81'; did you mean resnet1[08]"),
    (["prune", "timm:resnet81", *HALF], 2, "timm has no model 'resnet81'; did you mean resnet"),
    (["prune", "no.such:factory", *SHAPE, *HALF], 2, "no.such can't be imported: ModuleNotFoundError"),
    (["prune", "no.py:factory", *SHAPE, *HALF], 2, "there is no file no.py"),
    (["prune", "net:nett", *SHAPE, *HALF], 2, "net has no class or function 'nett'; did you mean net"),
    (["prune", "net:nothing", *SHAPE, *HALF], 2, "net has no class or function 'nothing'"),
    (["prune", "net:broken", *SHAPE, *HALF], 2, "net:broken can't be built: RuntimeError: no luck"),
    (["prune", "net:number", *SHAPE, *HALF], 2, "net:number gives a int, but must give a torch.nn.Module"),
    (["prune", "net:Words", "--classes", "4", *SHAPE, *HALF], 2, "net:Words can't be built: TypeError.*num_classes"),
    (["prune", "net:net", *HALF], 2, "what does net:net take.*--input 1,3,224,224"),
    (["prune", "net:net", "--input", "3,a", *HALF], 2, "'3,a' is no shape; give sizes such as 1,3,224,224"),
    (["prune", "net:net", "--input", "1,0", *HALF], 2, "'1,0' is no shape"),
    (["prune", "net:net", "--input", "int7:1,2", *HALF], 2, "'int7:1,2' is no shape.*int64"),
    (
        ["prune", "net:net", "--input", "1,4,8,8", *HALF],
        2,
        "net:net does not run on inputs of shape 1,4,8,8: .* expected .* 3 channels",
    ),
    (["prune", "net:net", *SHAPE, *SHAPE, *HALF], 2, "shape 1,3,8,8 and 1,3,8,8: .*arguments"),
    (["prune", "net:Frozen", *SHAPE, *HALF], 2, "nothing in this model can be pruned"),
    (["prune", *TINY, "--flops", "half"], 2, "'half' is no amount; give a fraction such as 0.5"),
    (["prune", *TINY, "--flops", "-1"], 2, "'-1' must be positive"),
    (["prune", *TINY, "--flops", "nan"], 2, "'nan' is no amount"),
    (["prune", *TINY, "--flops", "0.0001"], 1, "can't be met; the nearest that can be reached is flops="),
    (["prune", *TINY, "--params", "5M"], 1, "already meets the budget params=5000000"),
    (["prune", *TINY, "--latency", "0.5", "--latency-ms", "3"], 2, "give --latency or --latency-ms, not both"),
    (["prune", *TINY, "--latency", "5"], 2, "--latency 5 is no fraction; say milliseconds with --latency-ms"),
    (["prune", *TINY, "--latency-ms", "-3"], 2, r"latency=-0\.003 must be a number above 0"),
    (["prune", *TINY, *HALF, "--tolerance", "3"], 2, "--tolerance 3.0 must be a number above 0 and below 1"),
    (["prune", *TINY, *HALF, "--keep", "layer9"], 2, "--keep 'layer9' matches no module"),
    (["prune", *TINY, *HALF, "--criterion", "magnitud"], 2, "no criterion is called 'magnitud'; did you mean magn"),
    (["prune", *TINY, *HALF, "--criterion", "zzz"], 2, "no criterion is called 'zzz'; there are magnitude, batch-"),
    (["prune", *TINY, *HALF, "--criterion", "taylor"], 2, "criterion taylor looks at data: give it images"),
    (["prune", *TINY, *HALF, "--round-to", "0"], 2, "greater than or equal to 1"),
    (["prune", *TINY, *HALF, "--minimum", "2"], 2, "--minimum 2.0 must be a number at least 0 and at most 1"),
    (["prune", "net:torch", *SHAPE, *HALF], 2, "net has no class or function 'torch': that is a module"),
    (["prune", *TINY, *HALF, "--mean", "0.5"], 2, "--mean is of images: give them with --data FOLDER"),
    (["prune", *TINY, *HALF, "--data", "many", "--mean", "0.5,a"], 2, "--mean '0.5,a' must be numbers such as"),
    (["prune", *TINY, *HALF, "--data", "many", "--std", "1,1"], 2, "--std '1,1' has 2 numbers, but the model takes 3"),
    (["prune", *TINY, *HALF, "--data", "many", "--mean", "125"], 2, "--mean '125' is of pixels from 0 to 1, not 255"),
    (["prune", *TINY, *HALF, "--data", "net:Absent"], 2, "net has no class or function 'Absent'"),
    (["prune", *TINY, *HALF, "--data", "net:Two"], 2, "net:Two must be batches .* got Two with 0 batches"),
    (["prune", *TINY, *HALF, "--data", "nowhere"], 2, "there is no folder nowhere"),
    (
        ["prune", *TINY, *HALF, "--data", "empty"],
        2,
        "empty must have a folder for each class with images in it, as empty/cat/1.jpg",
    ),
    (["prune", *TINY, *HALF, "--data", "text"], 2, "text must have a folder for each class with images in it"),
    (
        ["prune", *TINY, *HALF, "--data", "many", "--criterion", "taylor"],
        2,
        "more classes than the model, which tells 3",
    ),
    (["prune", *TINY, *HALF, "--data", "many"], 2, "more classes than the model, which tells 3"),
    (["prune", *TINY, *HALF, "--data", "torn"], 2, "can't read the image .*torn/class0/0.png"),
    (["prune", "net:net", "--input", "1,3,9999999,9999999", *HALF], 2, "does not fit into memory"),
    (["prune", *TINY, "--flops", "1.5"], 2, r"flops=1\.5 is neither a fraction nor a count"),
    (["prune", "net:Two", "--input", "2,4", "--input", "2,4", *HALF, "--data", "many"], 2, "takes more than one"),
    (["prune", "net:Words", "--input", "int64:2,5", *HALF, "--data", "many"], 2, r"takes a tensor of shape \[2, 5\]"),
    (["prune", *TINY, *HALF, "--weights", "none.pt"], 2, "there is no file none.pt"),
    (["prune", "net:net", *SHAPE, *HALF, "--weights", "DEFAULT"], 2, "there is no file DEFAULT"),
    (["prune", "torchvision:resnet18", *HALF, "--weights", "BEST"], 2, "torchvision has no such weights of resnet18"),
    (["prune", *TINY, *HALF, "--weights", "text/words.pt"], 2, "can't read weights from text/words.pt"),
    (["prune", *TINY, *HALF, "--weights", "text/cut.safetensors"], 2, "can't read weights from text/cut.safetensors"),
    (["prune", *TINY, *HALF, "--weights", "code.pt"], 2, "can't read weights from code.pt.*no pickled modules"),
    (["prune", *TINY, *HALF, "--weights", "list.pt"], 2, "list.pt holds no state_dict"),
    (["prune", *TINY, *HALF, "--weights", "five.pt"], 2, r"7.weight is float32\[5, 16\] in the file.*see|--classes"),
    (
        ["prune", *TINY, *HALF, "--weights", "other.pt"],
        2,
        "other.pt does not fit the model: it lacks 0.weight.*besides",
    ),
    (["prune", *TINY, *HALF, "-o", "net.py"], 2, "can't write to net.py: .*net.py is a file, not a folder"),
    (["prune", *TINY, *HALF, "-o", "net.py/out"], 2, "can't write to net.py/out: .*net.py is a file"),
    (["prune", *TINY, *HALF, "-o", "taken"], 2, "can't write to taken: taken/plan.json is a folder"),
    (["prune", *TINY, *HALF, "--weights", "out/model.safetensors"], 2, "holds a model that fxprune wrote.*MODEL"),
    (["prune", *TINY, *HALF, "--frobnicate"], 2, "No such option"),
    (["prune", "none.safetensors", *HALF], 2, "there is no file none.safetensors"),
    (["prune", "text/cut.safetensors", *HALF], 2, "can't read a model from text/cut.safetensors"),
    (["export", "foreign.safetensors", "x.onnx"], 2, "not one that fxprune.save wrote"),
    (["export", "torchvision:fxprune_tiny", *SHAPE, "nowhere/x.onnx"], 2, "there is no folder nowhere"),
    (["export", "out/model.safetensors", "x.onnx", "--model", "net:Words"], 2, "does not belong to this Words"),
    (["export", "start.safetensors", "x.onnx"], 2, "was not pruned: it holds a model from fxprune.initialize"),
    (["apply", "none.json"], 2, "can't read a plan from none.json"),
    (["apply", "out/report.json"], 2, "this is not a plan"),
    (
        ["apply", PLAN, "--model", "net:Two", "--input", "2,4", "--input", "2,4", "-o", "new"],
        2,
        "made for another model",
    ),
    (["apply", PLAN, "--stream", "-o", "new"], 2, "--stream cuts a file of weights: give it with --weights"),
    (
        ["apply", PLAN, "--stream", "--weights", "five.pt", "--data", "many", "-o", "new"],
        2,
        "leave out --stream or --data",
    ),
    (["apply", PLAN, "--stream", "--weights", "five.pt", "-o", "new"], 2, "can't read weights from five.pt"),
    (["apply", "bare.json"], 2, "bare.json does not say which model it was made of; say so with --model"),
    (["apply", PLAN, "--weights", "five.pt", "-o", "new"], 2, "--classes"),
    (["diff", PLAN, "none.json"], 2, "can't read none.json"),
    (["diff", PLAN, "list.json"], 2, "list.json is neither a plan nor a report"),
    (["diff", PLAN, "report.json"], 2, "report.json is a damaged report"),
    (["diff", PLAN, "other.json"], 2, "have no group in common: they are of different models"),
    (["diff", PLAN, "start.safetensors"], 2, "start.safetensors was not pruned"),
    (["bench", "torchvision:fxprune_tiny", *SHAPE], 2, "compare torchvision:fxprune_tiny with what"),
    (["bench", "out/model.safetensors", "--backend", "tpu"], 2, "no backend is called 'tpu'"),
    (["bench", "out/model.safetensors", "--batch", "1,x"], 2, "--batch '1,x' must be sizes such as 1,32"),
    (["bench", "out/model.safetensors", "--backend", "onnxruntime-cuda"], 2, "nothing could be measured: "),
    (["bench", "out/model.safetensors", "--input", "1,3,8"], 2, "does not run on inputs of shape 1,3,8: "),
    (["export", "out/model.safetensors", "out/model.safetensors"], 2, "the file must end in .onnx"),
    (["apply", PLAN], 2, "out has the plan and the model that it was made for: say with -o"),
    (["bench", "out/model.safetensors", "--vs", "net:Words"], 2, "net:Words does not run on inputs of shape 1,3,8,8"),
    (["inspect", "torchvision:fxprune_tiny", *SHAPE, "--explain", "zzz"], 2, "nothing called 'zzz' in this model"),
    (
        ["inspect", "torchvision:fxprune_tiny", *SHAPE, "--html", "no/page.html"],
        2,
        "can't write a page to no/page.html",
    ),
    (["apply", PLAN, "net:net", "--model", "net:Two", "-o", "new"], 2, "the model is net:net or --model net:Two"),
    (["export", "out/model.safetensors"], 2, "where to.*fxprune export out/model.safetensors FILE.onnx"),
    (["export", "out/model.safetensors", "x.onnx", "-o", "y.onnx"], 2, "write to x.onnx or to -o y.onnx"),
    (["shrink"], 2, "No such command 'shrink'"),
]


@pytest.fixture
def wrong_files(folder: Path) -> None:
    pruned()
    (folder / "empty").mkdir()
    (folder / "text" / "class0").mkdir(parents=True)
    (folder / "text" / "words.pt").write_text("not weights")
    (folder / "text" / "cut.safetensors").write_bytes((folder / "out/model.safetensors").read_bytes()[:300])
    photos(folder / "many", classes=6)
    photos(folder / "torn", classes=2)
    (folder / "torn/class0/0.png").write_text("no image")
    (folder / "taken/plan.json").mkdir(parents=True)
    torch.save(nn.Linear(1, 1), "code.pt")
    torch.save([1, 2], "list.pt")
    torch.save(tiny(5).state_dict(), "five.pt")
    torch.save({"weight": torch.zeros(1)}, "other.pt")
    save_file({"weight": torch.zeros(1)}, "foreign.safetensors")
    fxprune.save(fxprune.initialize(tiny(), 1), "start.safetensors")
    Path("list.json").write_text("[1]")
    Path("report.json").write_text('{"format": "fxprune report 1", "groups": [1]}')
    plan = json.loads(Path(PLAN).read_text())
    Path("bare.json").write_text(json.dumps({**plan, "options": {}}))
    Path("other.json").write_text(json.dumps({**plan, "sizes": {"z": 4}, "keep": {"z": [0]}}))


@pytest.mark.usefixtures("wrong_files")
def test_wrong_use() -> None:
    """Each in the same folder, for speed: one line that says what to do, the exit code, and no file is written."""
    before = sorted(Path().rglob("*"))
    wrong = []
    for args, code, message in WRONG:
        result = CliRunner().invoke(app, args)
        text = " ".join(result.output.replace("│", " ").split())
        lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
        files = [path for path in sorted(Path().rglob("*")) if "__pycache__" not in path.parts]
        said = bool(re.search(message, text)) and (len(lines) == 1 or "Usage:" in text)
        if not (said and result.exit_code == code and isinstance(result.exception, SystemExit) and files == before):
            wrong.append((args, code, message, result.exit_code, text, result.exception, set(files) ^ set(before)))
    assert not wrong, "\n".join(map(str, wrong))


def test_a_file_names_no_code_to_run(folder: Path) -> None:
    for name in ("evil.py", "torchvision:evil.py", "timm:evil.py"):
        (folder / name).write_text("raise SystemExit('run')")
    pruned()
    plan = json.loads(Path(PLAN).read_text())
    code = ("evil:x", "evil.py:x", "os:system", "torchvision.models:resnet18")
    for model in (*code, "torchvision:evil.py:x", "timm:evil:x", "timm:evil.py:x", "torchvision:torchvision:x", ":x"):
        Path("evil.json").write_text(json.dumps({**plan, "options": {**plan["options"], "model": model}}))
        assert "Building that runs code, which a file may not choose" in run("apply", "evil.json", code=2).stderr
    assert "evil" not in sys.modules


def test_nothing_is_left_when_the_export_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned()
    before = {file.name: file.read_bytes() for file in Path("out").iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise fxprune.FxpruneError("the export fails")

    monkeypatch.setattr(fxprune, "export_onnx", fail)
    assert "the export fails" in run("prune", *TINY, "--flops", "0.6", "-o", "out", code=2).stderr
    assert {file.name: file.read_bytes() for file in Path("out").iterdir()} == before


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*args: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(fxprune, "analyze", bug)
    result = CliRunner().invoke(app, ["prune", *TINY, *HALF])
    assert result.exit_code == 3
    assert "ZeroDivisionError: a bug" in result.stderr


def test_a_reader_that_has_seen_enough_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*args: Any) -> None:  # as `fxprune --help | head -3` does
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(fxprune, "analyze", closed)
    assert "bug" not in run("prune", *TINY, *HALF, code=1).stderr


# ------------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "swin_t", "shufflenet_v2_x0_5"])
def test_models_of_torchvision(name: str) -> None:
    assert "channels that can be pruned" in run("inspect", f"torchvision:{name}").stdout
    result = run("prune", f"torchvision:{name}", "--flops", "0.6", "--json")
    before, after = json.loads(result.stdout)["totals"]["flops"]
    assert 0.5 * before < after <= 0.6 * before
    run("apply", PLAN, "-o", "again", "--no-onnx", "--no-verify")
    run("export", "out/model.safetensors", "again.onnx")
    assert "are the same" in run("diff", PLAN, "again/model.safetensors").stdout
