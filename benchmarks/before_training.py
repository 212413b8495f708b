"""Pruning before training, on CIFAR-10: 3SP beside widths from formulas, random channels and the dense network.

    python benchmarks/before_training.py --data PATH [--images 12800] [--epochs 3] [--width 16]

PATH as for benchmarks/cifar10.py. All networks of a kind start from the same weights, see the same batches, and
take turns at every step, so that a busy machine slows all alike. Inference is onnxruntime's. Both times are taken once
more, without training, at the full width. Run it again after an interruption and it goes on from the last epoch.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from cifar10 import decode_images, normalize_images
from common import RESULTS, in_words, machine, table, write
from rich.progress import track
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import cfgs, make_layers

import fxprune
from fxprune import passes

BATCH = 64
LAST = torch.channels_last
FULL = 64  # channels of the first layer of the networks as published
Set = tuple[Tensor, Tensor]  # images: uint8[n, 3, 32, 32], labels: int64[n]


# -------------------------------------------------------------------------------------------------- networks


def resnet18(width: int) -> nn.Module:
    """ResNet-18 for small images: a 3 x 3 stem of stride 1 without pooling."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    wide = width
    for stage in range(4):
        out, stride = width << stage, 2 if stage else 1
        shortcut = nn.Sequential(nn.Conv2d(wide, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if stage else None
        layers += [BasicBlock(wide, out, stride, shortcut), BasicBlock(out, out)]
        wide = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 10))


def vgg16_bn(width: int) -> nn.Module:
    """VGG-16 with batch norm for small images: one linear layer behind the convolutions."""
    widths = [entry if isinstance(entry, str) else entry * width // FULL for entry in cfgs["D"]]
    features = make_layers(widths, batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-2], 10))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {"ResNet-18": resnet18, "VGG-16-BN": vgg16_bn}


def make(network: str, width: int) -> nn.Module:
    """The network with the initial weights that torchvision gives it."""
    torch.manual_seed(0)
    model = NETWORKS[network](width)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model.to(memory_format=LAST)


def make_candidates(network: str, width: int, batch: tuple[Tensor, Tensor]) -> dict[str, fxprune.TracedModule]:
    """The dense network, and each method at a half and a quarter of its FLOPs."""
    methods: dict[str, passes.Criterion] = {
        "3SP": passes.SingleShot(batch, F.cross_entropy),
        "Uniform": passes.Uniform(),
        "PreCrop": passes.PreCrop(),
        "Random": passes.Random(),
    }
    graph = fxprune.trace(make(network, width).train(), batch[0][:2])
    analysis = fxprune.analyze(graph, batch[0][:2])
    models = {"dense": graph}
    for flops in (0.5, 0.25):
        for name, method in methods.items():
            plan = method.plan(analysis, fxprune.Budget(flops=flops))
            models[f"{name} {flops}"] = fxprune.rewrite(graph, analysis, plan)[0].to(memory_format=LAST)
    return models


# -------------------------------------------------------------------------------------------------- training


class Times:
    """Seconds of every turn: on the wall, and of the processor, which other programs disturb less."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __enter__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.cpu.append(time.process_time() - self.start[1])
        self.wall.append(time.perf_counter() - self.start[0])

    def beside(self, dense: Times, quantity: str) -> dict[str, float]:
        """Medians, and the median over the turns of the speed-up against ``dense``; the first three are warm-up."""
        turns = zip(dense.cpu[3:], self.cpu[3:], strict=True)
        return {
            quantity: median(self.cpu[3:]),
            f"{quantity}_wall": median(self.wall[3:]),
            f"{quantity}_speedup": median(dense_time / own_time for dense_time, own_time in turns),
        }


class Run:
    """A network in training."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=steps, pct_start=0.3)
        self.times = Times()
        self.losses: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step, timed."""
        with self.times:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())
        self.scheduler.step()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler")}
        return parts | {"wall": self.times.wall, "cpu": self.times.cpu, "losses": self.losses}

    def load(self, state: dict[str, Any]) -> None:
        """The opposite of ``state``."""
        for name in ("model", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        self.times.wall, self.times.cpu, self.losses = state["wall"], state["cpu"], state["losses"]


def train_runs(runs: dict[str, Run], train_set: Set, epochs: int, checkpoint: Path) -> None:
    """All epochs of all runs, which take turns at every batch in an order drawn anew."""
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start = saved["epoch"]
        for name, run in runs.items():
            run.load(saved["runs"][name])
    for epoch in range(start, epochs):
        order = random.Random(epoch)
        for run in runs.values():
            run.model.train()
        for x, y in draw_batches(train_set, epoch):
            for name in order.sample(list(runs), len(runs)):
                runs[name].step(x, y)
        torch.save({"epoch": epoch + 1, "runs": {name: run.state() for name, run in runs.items()}}, checkpoint)
        losses = {name: round(sum(run.losses[-50:]) / len(run.losses[-50:]), 3) for name, run in runs.items()}
        print(f"epoch {epoch + 1}: losses {losses}", flush=True)


def draw_batches(data: Set, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch, shifted by up to 4 pixels and flipped."""
    images, labels = data
    generator = torch.Generator().manual_seed(epoch)
    order = torch.randperm(len(labels), generator=generator)
    corners = torch.randint(9, (2, len(labels)), generator=generator)
    flips = torch.rand(len(labels), 1, 1, 1, generator=generator) < 0.5
    for part in track(order.split(BATCH)[: len(order) // BATCH], f"epoch {epoch + 1}", transient=True):
        crops = F.pad(images[part], (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)  # a view
        x = crops[torch.arange(len(part)), :, corners[0, part], corners[1, part]]
        yield normalize_images(torch.where(flips[part], x.flip(3), x)), labels[part]


@torch.no_grad()
def accuracy(model: nn.Module, data: Set) -> float:
    """The fraction of ``data`` that ``model`` gets right."""
    model.eval()
    parts = zip(data[0].split(500), data[1].split(500), strict=True)
    return sum(int((model(normalize_images(x)).argmax(1) == y).sum()) for x, y in parts) / len(data[1])


# --------------------------------------------------------------------------------------------------- figures


def time_inference(models: dict[str, nn.Module], batch: int, rounds: int) -> dict[str, Times]:
    """The seconds of each model in onnxruntime, one thread, in turns."""
    x = torch.randn(batch, 3, 32, 32)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    sessions = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, model) in enumerate(models.items()):
            path = Path(folder) / f"{number}.onnx"
            fxprune.export_onnx(model.eval(), x, path)
            sessions[name] = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    seconds = {name: Times() for name in sessions}
    order = random.Random(0)
    for _ in range(3 + rounds):
        for name in order.sample(list(sessions), len(sessions)):
            feed = {sessions[name].get_inputs()[0].name: x.numpy()}
            with seconds[name]:
                sessions[name].run(None, feed)
    return seconds


def measure_models(models: dict[str, Any], runs: dict[str, Run], rounds: int) -> list[dict[str, Any]]:
    """A row a model: what it costs, and its times beside the dense one's."""
    x = torch.randn(1, 3, 32, 32)
    in_onnx = time_inference(models, BATCH, rounds)
    rows = []
    for name, model in models.items():
        model.eval()
        rows.append(
            {
                "model": name,
                "flops": fxprune.cost.flops(model, x),
                "params": fxprune.cost.params(model),
                "widths": [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)],
            }
            | runs[name].times.beside(runs["dense"].times, "step")
            | in_onnx[name].beside(in_onnx["dense"], "inference")
        )
    return rows


def measure_full_width(network: str, train_set: Set, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Times only: some steps of the network as published."""
    x, y = normalize_images(train_set[0][:BATCH]), train_set[1][:BATCH]
    starts = ("dense", "3SP", "Uniform")
    models = {name: model for name, model in make_candidates(network, FULL, (x, y)).items() if name.startswith(starts)}
    runs = {name: Run(model, 1000) for name, model in models.items()}
    order = random.Random(0)
    for _ in range(3 + steps):
        for name in order.sample(list(runs), len(runs)):
            runs[name].model.train()
            runs[name].step(x, y)
    return measure_models(models, runs, rounds)


def rows_of(rows: list[dict[str, Any]]) -> str:
    """The table of one network."""
    header = ["network", "MFLOPs", "parameters", "step, ms", "step speed-up", "inference, ms", "speed-up", "accuracy"]
    dense = rows[0]
    lines = [
        [
            row["model"],
            f"{row['flops'] / 1e6:.1f} ({row['flops'] / dense['flops']:.0%})",
            f"{row['params']:,}",
            f"{1e3 * row['step']:.1f}",
            f"{row['step_speedup']:.2f}",
            f"{1e3 * row['inference']:.2f}",
            f"{row['inference_speedup']:.2f}",
            f"{row['accuracy']:.2%}" if "accuracy" in row else "",
        ]
        for row in rows
    ]
    if not any("accuracy" in row for row in rows):
        header, lines = header[:-1], [line[:-1] for line in lines]
    return table(header, lines)


def write_report(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Write what is finished."""
    machine_facts = machine("fxprune", "torch", "torchvision", "onnxruntime", "onnxruntime-gpu")
    parts = [
        "# Pruning before training, on CIFAR-10",
        "",
        f"{options.images:,} training images, {options.epochs} epochs of {options.images // BATCH} steps of {BATCH}, "
        "SGD with one cycle up to a rate of 0.1, one seed, the same initial weights and batches for all; 10,000 test "
        f"images. The networks have 1/{FULL // options.width} of their published widths, and stems for 32 x 32 pixels. "
        "The budget is a half and a quarter of the dense FLOPs. Step: forward, backward and update of a batch of "
        f"{BATCH}, {options.steps} of them at full width. Inference: onnxruntime, a batch of {BATCH}, {options.rounds} "
        "turns. All networks take turns; the speed-up is the median over the turns. One thread everywhere; times are "
        "medians of the processor's time, because the machine was busy (those on the wall are in the JSON). Full "
        "width: the networks as published, not trained.",
        "",
        in_words(machine_facts),
    ]
    for network, tables in results.items():
        parts += ["", f"## {network}"]
        parts += ["", rows_of(tables["rows"])] if "rows" in tables else []
        parts += ["", "Full width:", "", rows_of(tables["full"])] if "full" in tables else []
    print("\n".join(parts), flush=True)
    arguments = {name: value for name, value in vars(options).items() if name not in ("data", "work", "out")}
    write(
        options.out,
        "before_training",
        "\n".join(parts),
        {"machine": machine_facts, "options": arguments, "results": results},
    )


def load_images(options: argparse.Namespace) -> tuple[Set, Set]:
    """Training and test set, decoded once."""
    cache = options.work / "images.npz"
    if not cache.exists():
        arrays = {}
        for split in ("train", "test"):
            arrays[f"{split}_x"], arrays[f"{split}_y"] = decode_images(options.data, split)
        np.savez(cache, **arrays)
    arrays = dict(np.load(cache))
    train_x, train_y, test_x, test_y = (torch.from_numpy(arrays[f"{s}_{a}"]) for s in ("train", "test") for a in "xy")
    sample = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(0))[: options.images]
    return (train_x[sample], train_y[sample]), (test_x, test_y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the images")
    parser.add_argument("--images", type=int, default=12_800, help="of the training set")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--width", type=int, default=16, help=f"of the first layer; {FULL} as published")
    parser.add_argument("--steps", type=int, default=5, help="at full width; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=15, help="of inference")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--work", type=Path, default=Path("out/before_training"), help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    options.work.mkdir(parents=True, exist_ok=True)
    train_set, test_set = load_images(options)
    batch = normalize_images(train_set[0][:BATCH]), train_set[1][:BATCH]
    results: dict[str, Any] = {network: {} for network in options.networks}
    for network in options.networks if options.steps else ():
        results[network]["full"] = measure_full_width(network, train_set, options.steps, options.rounds)
        print(rows_of(results[network]["full"]), flush=True)
    for network in options.networks:
        models = make_candidates(network, options.width, batch)
        runs = {name: Run(model, options.epochs * (options.images // BATCH)) for name, model in models.items()}
        name = f"{network}-{options.width}-{options.images}-{options.epochs}.pt"
        train_runs(runs, train_set, options.epochs, options.work / name)
        rows = measure_models(models, runs, options.rounds)
        for row in rows:
            row["accuracy"] = accuracy(models[row["model"]], test_set)
        results[network]["rows"] = rows
        write_report(results, options)


if __name__ == "__main__":
    main()
