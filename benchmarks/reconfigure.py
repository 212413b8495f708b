"""What a cut costs: session.reconfigure on ResNet-50 with SGD momentum, against training steps, on the CPU.

    python benchmarks/reconfigure.py [--size 224] [--batch 32] [--rounds 3] [--threads 2]

In each round a step of the whole model is timed, then a cut of one channel in eight of every group, then a step of what
is left; the next round begins with the whole model again. The aim is a cut in the time of two steps of the whole model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from common import RESULTS, in_words, machine, table, write
from torch import Tensor, nn

import fxprune

AIM = 2  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x, y = torch.randn(options.batch, 3, options.size, options.size), torch.randint(0, 1000, (options.batch,))
    rounds = [time_round(x, y) for _ in range(options.rounds)]
    write_report({name: [timing[name] for timing in rounds] for name in rounds[0]}, options)


def time_round(x: Tensor, y: Tensor) -> dict[str, float]:
    """Seconds of a new session, a step, a cut and a step after it. A step before them fills the momentum."""
    model = torchvision.models.resnet50(weights=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    start, session = time_call(lambda: fxprune.Session(model, x[:1], optimizer, progress=False))

    def step() -> None:
        nn.functional.cross_entropy(session.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    before, _ = time_call(step)
    cut, _ = time_call(lambda: session.reconfigure(remove_eighth(session.analysis)))
    after, _ = time_call(step)
    return {"session": start, "step": before, "cut": cut, "step after": after}


def time_call(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def remove_eighth(analysis: fxprune.Analysis) -> fxprune.Plan:
    """Remove one channel in eight of every group."""
    keep = {name: [at for at in range(size) if at % 8] for name, size in analysis.sizes.items()}
    return fxprune.Plan(keep, analysis.sizes, analysis.options)


def write_report(seconds: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Print the table and the verdict, and write them."""
    machine_facts = machine("fxprune", "torch", "torchvision")
    labels = {
        "session": "a new session (trace and analysis)",
        "step": "a step of the whole model",
        "cut": "a cut (session.reconfigure)",
        "step after": "the first step after the cut",
    }
    step = median(seconds["step"])
    rows = [
        [
            labels[name],
            f"{median(values):.3f}",
            f"{min(values):.3f}",
            f"{max(values):.3f}",
            f"{median(values) / step:.2f}",
        ]
        for name, values in seconds.items()
    ]
    ratios = [cut / step_time for cut, step_time in zip(seconds["cut"], seconds["step"], strict=True)]
    verdict = "reached" if median(ratios) <= AIM else "missed"
    text = "\n".join(
        [
            "# What a cut costs in training",
            "",
            f"ResNet-50, SGD with momentum, batch {options.batch}, {options.size} px, {options.threads} CPU threads, "
            f"{options.rounds} rounds, the parts of each in turn: seconds.",
            "",
            in_words(machine_facts),
            "",
            f"A cut of one channel in eight takes {median(ratios):.2f} training steps (median over the rounds, "
            f"{min(ratios):.2f} to {max(ratios):.2f}); the aim, at most {AIM}, is {verdict}.",
            "",
            table(["", "median", "least", "most", "in steps"], rows),
        ]
    )
    print(text)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    write(options.out, "reconfigure", text, {"machine": machine_facts, "settings": settings, "seconds": seconds})


if __name__ == "__main__":
    main()
