"""Every example runs, on few images: ``--quick``."""

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# What each leaves, and what its last lines have.
LEAVES = {
    "quickstart": ("dense.onnx PruneTrain.onnx timeline.png widths.png", "test accuracy"),
    "prune_trained": ("resnet18.pt", "fine-tuned"),
    "prunetrain": ("run.pt run.png small.onnx", "onnxruntime == PyTorch"),
    "before_training": ("accuracy.png", "Uniform 10%"),
    "clicktrain": ("patterns.safetensors patterns.onnx", "PatternConv"),
    "dropback": ("dense.safetensors 0.2.safetensors 0.05.safetensors", "smaller"),
    "detection": ("", "loss after"),
    "custom_operator": ("", "scale has"),
    "custom_pass": ("", "with ReLU6"),
    "fsdp": ("", "parameters on each process"),
    "ddp": ("run.pt", "1 processes"),
    "with_lightning": ("last.ckpt", "after"),
    "quantize": ("dense.onnx dense-int8.onnx pruned.onnx pruned-int8.onnx", "pruned-int8"),
}
QUICK = ("custom_operator", "custom_pass", "before_training", "ddp")  # the others are marked slow
QUIET = [
    "ignore::UserWarning:lightning",
    "ignore:.*treespec, LeafSpec.*is deprecated",
]


@pytest.fixture(autouse=True)
def _processor() -> Iterator[None]:
    """Examples set what holds for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("sklearn", "rich", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, "--quick"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LEAVES]
)
@pytest.mark.filterwarnings(*QUIET)
def test_an_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name, tmp_path, monkeypatch)
    files, words = LEAVES[name]
    for file in files.split():
        assert (tmp_path / "out" / name / file).stat().st_size > 100
    assert words in "\n".join(capsys.readouterr().out.splitlines()[-14:])


def test_all_are_run_and_short() -> None:
    lengths = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert lengths.keys() - {"shared"} == LEAVES.keys()
    assert {name: lines for name, lines in lengths.items() if name in LEAVES and lines >= 100} == {}


@pytest.mark.slow
def test_before_training_meets_its_budgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    run("before_training", tmp_path, monkeypatch)
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    flops = [int(row[1].replace(",", "")) for row in rows]
    assert [round(amount / flops[0], 2) for amount in flops] == [1, 0.5, 0.5, 0.25, 0.25, 0.1, 0.1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ddp", r"2 processes; gradients sent in the last epoch: ([\d.]+) MB"),
        ("fsdp", r"epoch 2: [\d.]+%, ([\d.]+) M parameters on each process"),
    ],
)
def test_two_processes(name: str, words: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / f"{name}.py"), "--quick"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    number = re.search(words, done.stdout)
    assert number is not None
    assert float(number[1]) > 0
