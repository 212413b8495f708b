"""What DropBack costs: steps of ResNet-18 and ResNet-50 with its rules beside plain SGD, and the memory, on the CPU.

    python benchmarks/dropback.py [--size 64] [--batch 32] [--budget 0.2] [--rounds 7] [--threads 1]

All variants of a network take one step each in turn, on the same batch, so that a busy machine slows all alike. The
aims: at most 1.15 times the step of SGD where the choice is cheap or rare, at most 2 times where it is exact each time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from common import RESULTS, in_words, machine, table, write
from torch import Tensor, nn

import fxprune
from fxprune import passes

VARIANTS: dict[str, dict[str, Any] | None] = {
    "SGD": None,
    "exact": {},
    "quantile": {"rule": "quantile"},
    "exact, select_every=10": {"select_every": 10},
    "exact, tracked_state": {"tracked_state": True},
    "exact, regenerate": {"regenerate": True},
}
AIMS = {"exact": 2.0, "quantile": 1.15, "exact, select_every=10": 1.15}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--size", type=int, default=64, help="pixels")
    add("--batch", type=int, default=32)
    add("--budget", type=float, default=0.2, help="the fraction of the weights that is tracked")
    add("--rounds", type=int, default=7, help="timed steps of each, 8 at most: the choices of select_every come before")
    add("--threads", type=int, default=1)
    add("--models", nargs="+", default=["resnet18", "resnet50"])
    add("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {name: measure_variants(name, options) for name in options.models}
    write_report(results, options)


def measure_variants(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every step of each variant, and bytes."""
    x = torch.randn(options.batch, 3, options.size, options.size)
    y = torch.randint(1000, (options.batch,))
    runs = {variant: Run(name, x, options.budget, settings) for variant, settings in VARIANTS.items()}
    for step in range(options.rounds + 2):  # two to warm up: the first choice, and the buffers
        for run in list(runs.values())[:: 1 if step % 2 else -1]:
            run.step(x, y)
        print(name, step, {variant: round(run.update[-1], 3) for variant, run in runs.items()}, flush=True)
    steps = {variant: {"forward, backward": run.rest[2:], "update": run.update[2:]} for variant, run in runs.items()}
    return {"weights": runs["SGD"].weights, "steps": steps, "bytes": {key: run.bytes() for key, run in runs.items()}}


class Run:
    """A network with its optimizer. The times of a step are taken in two parts, for only the second part differs."""

    def __init__(self, name: str, x: Tensor, budget: float, settings: dict[str, Any] | None) -> None:
        model = fxprune.initialize(torchvision.models.get_model(name, weights=None), 0)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
        pruners = [] if settings is None else [passes.DropBack(budget, **settings)]
        self.session = fxprune.Session(model, x[:1], optimizer, pruners, progress=False)
        self.weights = sum(p.numel() for p in model.parameters())
        self.rest: list[float] = []
        self.update: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        start = time.perf_counter()
        nn.functional.cross_entropy(self.session.model(x), y).backward()
        between = time.perf_counter()
        self.session.optimizer.step()
        end = time.perf_counter()
        self.session.optimizer.zero_grad()
        self.rest.append(between - start)
        self.update.append(end - between)

    def bytes(self) -> dict[str, int]:
        """What is held between two steps, by what it is for; each storage once."""
        memories = self.session.memories
        model = list(self.session.graph.parameters())
        return {
            "weights": count_bytes(model),
            "optimizer state": count_bytes([self.session.optimizer.state, [memory.state for memory in memories]]),
            "DropBack": count_bytes([(memory.marks, memory.masks, memory.start, memory.scores) for memory in memories]),
        }


def count_bytes(tree: Any) -> int:
    """Bytes of the storages of all tensors in nested lists and dictionaries."""
    storages = {}
    waiting = [tree]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
    return sum(storages.values())


def write_report(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the tables, and write them."""
    machine_facts = machine("fxprune", "torch", "torchvision")
    lines = [
        "# What DropBack costs",
        "",
        f"SGD with momentum and weight decay, batch {options.batch}, {options.size} px, {options.threads} CPU thread, "
        f"{options.budget:.0%} of the weights tracked; medians of {options.rounds} steps, all variants in turn on the "
        "same batch.",
        "",
        in_words(machine_facts),
        "",
        "The forward and the backward pass are the same for all, so their median over all variants counts. A step with "
        "`select_every=10` is nine tenths of a step without a choice and one tenth of one with it (exact). Smaller "
        "images or batches make the ratio worse, larger ones better: the update depends on the weights alone.",
    ]
    for name, result in results.items():
        lines += [
            "",
            f"## {name}, {result['weights']:,} weights",
            "",
            tabulate_steps(result["steps"]),
            "",
            tabulate_memory(result["bytes"]),
        ]
    text = "\n".join(lines)
    print(text)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    write(options.out, "dropback_steps", text, {"machine": machine_facts, "settings": settings, "results": results})


def tabulate_steps(steps: dict[str, dict[str, list[float]]]) -> str:
    """Milliseconds of the parts of a step, and the whole beside that of SGD."""
    rest = median(seconds for parts in steps.values() for seconds in parts["forward, backward"])
    update = {variant: median(parts["update"]) for variant, parts in steps.items()}
    update["exact, select_every=10"] = 0.9 * update["exact, select_every=10"] + 0.1 * update["exact"]
    rows = []
    for variant, seconds in update.items():
        ratio = (rest + seconds) / (rest + update["SGD"])
        aim = AIMS.get(variant)
        verdict = "" if aim is None else f"at most {aim}: {'reached' if ratio <= aim else 'missed'}"
        rows.append([variant, f"{rest * 1e3:.0f}", f"{seconds * 1e3:.0f}", f"{ratio:.2f}", verdict])
    return table(["", "forward and backward, ms", "update, ms", "step beside SGD", "aim"], rows)


def tabulate_memory(held: dict[str, dict[str, int]]) -> str:
    """Megabytes between two steps. The gradients, which are as large as the weights, come with each backward pass."""
    kinds = list(held["SGD"])
    rows = [[variant, *(f"{sizes[kind] / 1e6:.1f}" for kind in kinds)] for variant, sizes in held.items()]
    return table(["MB held between steps", *kinds], rows)


if __name__ == "__main__":
    main()
