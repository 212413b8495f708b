"""Accuracy right after the cut, with averages renewed, and restored: criteria x FLOPs on trained CIFAR-10 networks.

    python benchmarks/restore_cifar10.py --data PATH --weights PATH

--data holds train/<class>/*.jpg and test/<class>/*.jpg; --weights holds resnet20-cifar10.safetensors and
resnet56-cifar10.safetensors, of the ResNets of He et al. (2016), section 4.2, with padded shortcuts. Nothing is
trained: calibration images come from the training set, without labels but for Taylor and Fisher. Run it again after an
interruption and it goes on where it was: each row is in --out at once.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch_pruning
from common import RESULTS, in_words, machine, table
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

import fxprune
from fxprune import Analysis, Budget, Plan, passes

NAME = "restore_cifar10"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLOCKS = {"resnet20": 3, "resnet56": 9}  # in each of the three stages
INSIDE = ["conv1", "linear", "*.conv2"]  # what stays whole where only the insides of blocks are cut
BATCH = 125
MINIMUM = 0.1  # of each group stays
COLUMNS = ("cut", "averages", "restored")
Batches = list[tuple[Tensor, Tensor]]


class Block(nn.Module):
    """Two convolutions, and a shortcut that takes every second pixel and pads channels where the size halves."""

    def __init__(self, wide_in: int, wide_out: int) -> None:
        super().__init__()
        self.stride, self.more = wide_out // wide_in, (wide_out - wide_in) // 2
        self.conv1 = nn.Conv2d(wide_in, wide_out, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide_out)
        self.conv2 = nn.Conv2d(wide_out, wide_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide_out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return F.relu(x + y)


class ResNet(nn.Module):
    """Stages of 16, 32 and 64 channels."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        stages = [
            [Block(max(16, wide // 2), wide), *(Block(wide, wide) for _ in range(blocks - 1))] for wide in (16, 32, 64)
        ]
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(*stage) for stage in stages)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        y: Tensor = self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
        return y


def read_images(folder: Path, count: int, seed: int) -> Batches:
    """``count`` of the images in ``folder``, drawn at random, in batches with their classes."""
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    images = ImageFolder(str(folder), steps)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    drawn = [images[number] for number in order.tolist()]
    x, y = torch.stack([image for image, _ in drawn]), torch.tensor([label for _, label in drawn])
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


@torch.no_grad()
def measure_accuracy(model: nn.Module, batches: Batches) -> float:
    """The fraction of images that the model gets right."""
    right = [(model(x).argmax(1) == y).float() for x, y in batches]
    return torch.cat(right).mean().item()


Planner = Callable[[nn.Module, Analysis, Batches, Budget], Plan]


def list_planners() -> dict[str, Planner]:
    """What is compared, by name."""

    def of(make: Callable[[Batches], passes.Criterion], keep: list[str]) -> Planner:
        return lambda model, analysis, data, budget: make(data).plan(analysis, budget, keep=keep)

    least: dict[str, Any] = {"minimum": MINIMUM}
    loss = F.cross_entropy
    return {
        "Magnitude": of(lambda data: passes.Magnitude(**least), []),
        "Magnitude, round_to=16": of(lambda data: passes.Magnitude(round_to=16, **least), []),
        "Magnitude, round_to=1": of(lambda data: passes.Magnitude(round_to=1, **least), []),
        "Magnitude, inside the blocks": of(lambda data: passes.Magnitude(**least), INSIDE),
        "Torch-Pruning, inside the blocks": plan_as_torch_pruning,
        "GeometricMedian": of(lambda data: passes.GeometricMedian(**least), []),
        "BatchNormScale": of(lambda data: passes.BatchNormScale(**least), []),
        "OptimalBrainSurgeon": of(lambda data: passes.OptimalBrainSurgeon(data, **least), []),
        "Activation": of(lambda data: passes.Activation(data, **least), []),
        "Taylor": of(lambda data: passes.Taylor(data, loss, **least), []),
        "Fisher": of(lambda data: passes.Fisher(data, loss, **least), []),
        "Random": of(lambda data: passes.Random(**least), []),
    }


def plan_as_torch_pruning(dense: nn.Module, analysis: Analysis, data: Batches, budget: Budget) -> Plan:
    """The channels that Torch-Pruning keeps at the largest width within the budget, as a plan.

    It can cut the insides of blocks only: padded shortcuts are too much for it.
    """
    x, widths = data[0][0][:2], analysis.sizes
    limit = float(budget.flops or 1) * fxprune.cost.flops(dense, x)
    inside = [
        module for name, module in dense.named_modules() if name in ("conv1", "linear") or name.endswith(".conv2")
    ]
    low, high, best = 0.0, 1.0, dense
    for _ in range(12):
        model, ratio = copy.deepcopy(dense), (low + high) / 2
        ignored = [model.get_submodule(name) for name, module in dense.named_modules() if module in inside]
        torch_pruning.pruner.BasePruner(
            model,
            x,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=ratio,
            max_pruning_ratio=1 - MINIMUM,
            ignored_layers=ignored,
        ).step()
        low, high, best = (low, ratio, model) if fxprune.cost.flops(model, x) <= limit else (ratio, high, best)
    keep = {}
    for name in widths:
        if name.endswith(".conv1"):  # the scales of the norm behind tell which of its channels are left
            norm = f"{name.removesuffix('conv1')}bn1"
            before, after = (net.get_submodule(norm).weight.detach().numpy() for net in (dense, best))
            keep[name] = np.flatnonzero(np.isin(before, after)).tolist()
    return Plan(keep, widths, analysis.options)


def measure_row(dense: nn.Module, planner: Planner, budget: Budget, data: Batches, tested: Batches) -> dict[str, float]:
    """The accuracies after a cut, and what it took."""
    x = data[0][0][:2]
    graph = fxprune.trace(dense, x)
    analysis = fxprune.analyze(graph, x)
    start = time.perf_counter()
    plan = planner(dense, analysis, data, budget)
    planned = time.perf_counter() - start
    compact, param_map = fxprune.rewrite(graph, analysis, plan)
    row = {
        "left": fxprune.cost.flops(compact, x) / fxprune.cost.flops(graph, x),
        "cut": measure_accuracy(compact, tested),
    }
    renewed = copy.deepcopy(compact)
    fxprune.restore(graph, renewed, param_map, data, method="batch_norm")
    row["averages"] = measure_accuracy(renewed, tested)
    start = time.perf_counter()
    fxprune.restore(graph, compact, param_map, data)
    seconds = {"planning": planned, "restoring": time.perf_counter() - start}
    return row | {"restored": measure_accuracy(compact, tested)} | seconds


def write_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write what is finished: means over the seeds, with the spread of what is restored."""
    text = [
        "# Accuracy right after the cut, and restored",
        "",
        "Trained CIFAR-10 networks, cut to a part of their FLOPs and not trained again; accuracy on "
        f"{options.tested:,} test images, JPEG at 32 x 32 pixels. Averages: those of batch norm renewed. Restored: by "
        f"fxprune.restore. Both on {options.images:,} training images without labels; Taylor and Fisher see their "
        "labels. Means over seeds of these images, with the range of what was restored. At least a tenth of each group "
        "stays.",
        "",
        in_words(machine("fxprune", "torch", "torch-pruning")),
    ]
    for network in dict.fromkeys(row["network"] for row in rows):
        dense = next(row["dense"] for row in rows if row["network"] == network)
        text += ["", f"## {network}, {dense:.1%} before the cut", ""]
        of_network = [row for row in rows if row["network"] == network]
        lines = []
        for flops, criterion in sorted({(row["flops"], row["criterion"]) for row in of_network}, reverse=True):
            same = [row for row in of_network if (row["flops"], row["criterion"]) == (flops, criterion)]
            means = [float(np.mean([row[name] for row in same])) for name in COLUMNS]
            spread = np.ptp([row["restored"] for row in same]) / 2
            lines.append(
                (
                    -flops,
                    -means[-1],
                    [f"{flops:g}", criterion, *(f"{mean:.1%}" for mean in means), f"± {spread:.1%}", str(len(same))],
                )
            )
        header = ["FLOPs", "criterion", *COLUMNS, "range", "seeds"]
        text.append(table(header, [line for *_, line in sorted(lines)]))
    (options.out / f"{NAME}.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def main() -> None:
    planners = list_planners()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the images")
    parser.add_argument("--weights", type=Path, help="the folder of the trained networks; by default in --data")
    parser.add_argument("--networks", nargs="+", default=list(BLOCKS), choices=BLOCKS)
    parser.add_argument("--flops", nargs="+", type=float, default=[0.59, 0.5, 0.75, 0.35])
    parser.add_argument("--criteria", nargs="+", default=list(planners), choices=planners)
    parser.add_argument("--seeds", type=int, default=3, help="of the calibration images")
    parser.add_argument("--images", type=int, default=1000, help="to calibrate on")
    parser.add_argument("--tested", type=int, default=10_000, help="images of the test set")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()

    weights = options.weights or options.data / "checkpoints"
    if not weights.is_dir():
        parser.error(f"no folder {weights}: say with --weights where the trained networks are")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{NAME}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    tested = read_images(options.data / "test", options.tested, 0)
    sizes = {"images": options.images, "tested": options.tested}
    for network in options.networks:
        dense = ResNet(BLOCKS[network]).eval()
        dense.load_state_dict(load_file(weights / f"{network}-cifar10.safetensors"))
        accuracy = measure_accuracy(dense, tested)
        for seed in range(options.seeds):
            data = read_images(options.data / "train", options.images, seed)
            for flops, criterion in itertools.product(options.flops, options.criteria):
                key = {"network": network, "flops": flops, "criterion": criterion, "seed": seed, **sizes}
                if any(key.items() <= row.items() for row in rows):
                    continue
                result = measure_row(dense, planners[criterion], Budget(flops=flops), data, tested)
                rows.append(key | {"dense": accuracy} | result)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(rows[-1], flush=True)
                write_table(rows, options)


if __name__ == "__main__":
    main()
