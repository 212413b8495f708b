"""What half the FLOPs are worth in time: ResNet-50 by default settings, in onnxruntime.

    python benchmarks/widths.py [--runs 30]

The dense model, fxprune's compact one, and two by Torch-Pruning are exported the same way and run
in turns on one CPU thread, batch 1, 224 x 224. FLOPs are those that PyTorch's own counter sees.
Efficiency is the speed-up divided by the reduction in FLOPs: 1 if every FLOP saved is time saved.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime
import torch
import torch_pruning
import torchvision
from common import RESULTS, in_words, machine, table, write
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune import passes

WARM_UP = 3  # runs
AIM = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()

    torch.set_num_threads(1)
    x = torch.randn(1, 3, 224, 224)
    models = {
        "dense": resnet50(),
        "fxprune": fxprune.prune(resnet50(), x, passes.Magnitude(p=2), budget=fxprune.Budget(flops=0.5)),
        "Torch-Pruning": cut_by_torch_pruning(x, round_to=None),
        "Torch-Pruning, round_to=16": cut_by_torch_pruning(x, round_to=16),
    }
    seconds = in_turns({name: open_session(model, x) for name, model in models.items()}, x, options.runs)
    rows = [describe(name, models, seconds, x) for name in models]
    write_report(rows, options)


def resnet50() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet50(weights=None).eval()
    return model


def cut_by_torch_pruning(x: Tensor, round_to: int | None) -> nn.Module:
    """Cut 30 % of the channels everywhere, which leaves 49 % of the FLOPs if nothing is rounded."""
    model = resnet50()
    torch_pruning.pruner.BasePruner(
        model,
        x,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.3,
        ignored_layers=[model.fc],
        round_to=round_to,
    ).step()
    return model


def open_session(model: nn.Module, x: Tensor) -> onnxruntime.InferenceSession:
    """Export, and load on one thread."""
    graph = model if isinstance(model, torch.fx.GraphModule) else fxprune.trace(model, x)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        fxprune.export_onnx(graph, x, path)
        return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def in_turns(sessions: dict[str, onnxruntime.InferenceSession], x: Tensor, runs: int) -> dict[str, list[float]]:
    """Run each session once a round, in an order drawn anew; seconds, after the warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    order = random.Random(0)
    for _ in range(WARM_UP + runs):
        for name in order.sample(list(sessions), len(sessions)):
            feed = {sessions[name].get_inputs()[0].name: x.numpy()}
            start = time.perf_counter()
            sessions[name].run(None, feed)
            seconds[name].append(time.perf_counter() - start)
    return {name: taken[WARM_UP:] for name, taken in seconds.items()}


def describe(name: str, models: dict[str, nn.Module], seconds: dict[str, list[float]], x: Tensor) -> dict[str, Any]:
    """Compare with the dense model: FLOPs, and time in the same round."""
    reduction = count_flops(models["dense"], x) / count_flops(models[name], x)
    rounds = zip(seconds["dense"], seconds[name], strict=True)
    speedup = median(dense / compact for dense, compact in rounds)
    widths = [m.out_channels for m in models[name].modules() if isinstance(m, nn.Conv2d)]
    return {
        "model": name,
        "flops": count_flops(models[name], x),
        "flops_reduction": reduction,
        "seconds": median(seconds[name]),
        "speedup": speedup,
        "efficiency": speedup / reduction,
        "widths": widths,
    }


def count_flops(model: nn.Module, x: Tensor) -> int:
    """Count the floating-point operations of one forward pass; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return int(counter.get_total_flops())


def write_report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table and the verdict, and write them."""
    machine_facts = machine("fxprune", "torch", "torch-pruning", "onnxruntime", "onnxruntime-gpu")
    header = ["model", "GFLOPs", "reduction", "ms", "speed-up", "efficiency", "widths of 16 n"]
    dense_flops = rows[0]["flops"]
    lines = [
        [
            row["model"],
            f"{row['flops'] / 1e9:.2f} ({row['flops'] / dense_flops:.0%})",
            f"{row['flops_reduction']:.2f}",
            f"{1e3 * row['seconds']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['efficiency']:.2f}",
            f"{sum(w % 16 == 0 for w in row['widths'])} of {len(row['widths'])}",
        ]
        for row in rows
    ]
    reached = next(row["efficiency"] for row in rows if row["model"] == "fxprune")
    text = "\n".join(
        [
            "# Half the FLOPs of ResNet-50, in time",
            "",
            f"onnxruntime, one CPU thread, batch 1, {options.runs} rounds in turns: median time, "
            "and median over the rounds of the speed-up against the dense model.",
            "",
            in_words(machine_facts),
            "",
            f"fxprune turns FLOPs into time with an efficiency of {reached:.2f} (aim {AIM}).",
            "",
            table(header, lines),
        ]
    )
    print(text)
    write(options.out, "widths", text, {"machine": machine_facts, "runs": options.runs, "rows": rows})


if __name__ == "__main__":
    main()
