"""Pattern-pruned networks: masked beside lowered by passes.PatternConv, layer by layer and whole.

    python benchmarks/pattern_conv.py [--networks vgg16_bn resnet18 resnet50] [--seconds 10] [--threads 1]

Every 3×3 convolution but the first gets one of the four corners for each input channel, or for each filter, at random:
the time does not depend on which. Masked is what runs without the pass: dense convolutions with zeros. Each row times
both in turns and reports the median of the ratios of processor time, in PyTorch (forward, and a training step) and in
onnxruntime. Rows that are done are kept in --out; run it again to go on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch
import torch.nn.functional as F
import torchvision
from common import RESULTS, in_words, machine, table, write
from torch import Tensor, nn

import fxprune
from fxprune import passes

NETWORKS = ("vgg16_bn", "resnet18", "resnet50")
SIZES = ((32, 1), (32, 32), (224, 1), (224, 32))
SHARES = ("input_channel", "filter")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    add("--sizes", nargs="+", default=[f"{size}x{batch}" for size, batch in SIZES], help="image size x batch")
    add("--shares", nargs="+", default=SHARES, choices=SHARES)
    add("--seconds", type=float, default=10, help="for each time that is measured, at least three runs")
    add("--threads", type=int, default=1)
    add("--out", type=Path, default=Path("out/pattern_conv.jsonl"), help="rows that are done")
    add("--results", type=Path, default=RESULTS, help="folder of the table")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(row["network"], row["share"], row["size"], row["batch"]) for row in rows}
    for setting, name, share in itertools.product(options.sizes, options.networks, options.shares):
        size, batch = map(int, setting.split("x"))
        if (name, share, size, batch) in done:
            continue
        row = measure_row(name, share, size, batch, options)
        rows.append(row)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print({key: value for key, value in row.items() if key != "layers"}, flush=True)
    write_report(rows, options)


def thin_kernels(model: nn.Module, share: str) -> nn.Module:
    """Zeros outside one corner of each kernel, in all 3×3 convolutions but the first convolution."""
    draw = torch.Generator().manual_seed(0)
    for layer in [module for module in model.modules() if isinstance(module, nn.Conv2d)][1:]:
        if layer.kernel_size == (3, 3):
            pool = passes.training.clicktrain._patterns.static_pool("static4")
            channels = layer.out_channels if share == "filter" else layer.in_channels
            mask = pool[torch.randint(0, 4, (channels,), generator=draw)]
            layer.weight.data *= mask[:, None] if share == "filter" else mask[None]
    return model


def measure_row(name: str, share: str, size: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row: both networks timed."""
    torch.manual_seed(0)
    model = thin_kernels(build_network(name, size), share).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    dense = fxprune.trace(model, x)
    inference, training = passes.PatternConv("inference", x), passes.PatternConv("training", x)
    row: dict[str, Any] = {"network": name, "share": share, "size": size, "batch": batch}
    choices = inference.choices(dense.eval())
    row["layers"] = {choice.layer: choice.speedup for choice in choices if choice.form}
    lowered, every = (candidate(dense).graph_module.eval() for candidate in (inference, passes.PatternConv(None, x)))
    row["lowered"] = sum(hasattr(layer, "pack") for layer in lowered.modules())
    row["flops"] = fxprune.cost.flops(dense, x) / fxprune.cost.flops(every, x)
    with torch.no_grad():
        row["forward"] = compare_times(lambda: dense.eval()(x), lambda: lowered(x), options.seconds)
    row["onnxruntime"] = compare_times(
        *(make_session(candidate, x, options.threads) for candidate in (dense.eval(), every)), options.seconds
    )
    trained = training(dense).graph_module
    row["training"] = compare_times(make_step(dense, x), make_step(trained, x), options.seconds)
    return row


def build_network(name: str, size: int) -> nn.Module:
    """torchvision's network; for 32 pixels as it is used there, without the early strides and large linear layers."""
    model: Any = getattr(torchvision.models, name)(num_classes=10)
    if size == 32 and name == "vgg16_bn":
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    elif size == 32:
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def make_step(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A training step."""
    model.train()
    if len(x) == 1:  # batch norm needs more than one value a channel at the end
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-5, momentum=0.9)
    labels = torch.zeros(len(x), dtype=torch.long)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def make_session(model: nn.Module, x: Tensor, threads: int) -> Callable[[], Any]:
    """A forward pass there."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    with TemporaryDirectory() as folder:
        fxprune.export_onnx(model, x, Path(folder) / "model.onnx")
        session = onnxruntime.InferenceSession(Path(folder) / "model.onnx", settings, ["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: session.run(None, inputs)


def compare_times(first: Callable[[], Any], second: Callable[[], Any], seconds: float) -> float:
    """Processor time of ``first`` over that of ``second``: the median over runs in turns."""
    first(), second()
    ratios: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(ratios) < 3:
        times = []
        for run in (first, second):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        ratios.append(times[0] / times[1])
    return median(ratios)


def write_report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The table of the networks, and that of the layers."""
    machine_facts = machine("fxprune", "torch", "torchvision", "onnxruntime-gpu", "onnxruntime")
    order = {name: at for at, name in enumerate(NETWORKS)}
    rows = sorted(rows, key=lambda row: (SHARES.index(row["share"]), order[row["network"]], row["size"], row["batch"]))

    def times(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    networks = [
        [
            f"{row['network']}, {row['share']}",
            str(row["size"]),
            str(row["batch"]),
            times(row["flops"]),
            f"{row['lowered']} of {len(row['layers'])}",
            times(row["forward"]),
            times(row.get("training")),
            times(row["onnxruntime"]),
        ]
        for row in rows
    ]
    layers = [
        [f"{row['network']}, {row['share']}", str(row["size"]), str(row["batch"])]
        + [times(statistic(list(row["layers"].values()))) for statistic in (min, median, max)]
        for row in rows
    ]
    text = "\n".join(
        [
            "# Pattern-pruned networks, masked beside lowered",
            "",
            "How many times as fast the network is after `passes.PatternConv`, beside the same network without it, "
            "which computes the zeros. Every 3×3 convolution but the first convolution has one of four corners for "
            "each input channel, or for each filter. At 32 px ResNets begin with a 3×3 convolution and no pooling, and "
            "VGG ends in one linear layer, as for CIFAR. "
            f"{options.threads} thread, medians of runs in turns, processor time, channels_last.",
            "",
            in_words(machine_facts),
            "",
            table(
                ["network, share", "px", "batch", "FLOPs", "lowered", "forward", "training step", "onnxruntime"],
                networks,
            ),
            "",
            "`FLOPs`: what all convolutions that can be rewritten save. `lowered`: convolutions that were measured to "
            "be at least 1.05 times as fast in PyTorch, and are rewritten in `forward`; `training step` chooses by "
            "forward and backward passes; onnxruntime has all of them rewritten.",
            "",
            "## Layers",
            "",
            "How many times as fast single convolutions are in a PyTorch forward pass, of those that can be rewritten.",
            "",
            table(["network, share", "px", "batch", "slowest", "median", "fastest"], layers),
        ]
    )
    print(text)
    write(options.results, "pattern_conv", text, {"machine": machine_facts, "threads": options.threads, "rows": rows})


if __name__ == "__main__":
    main()
