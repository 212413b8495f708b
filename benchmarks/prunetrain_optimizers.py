"""Does PruneTrain meet its budget with SGD, AdamW and Muon? Short runs on CIFAR-10, the dense network beside each.

    python benchmarks/prunetrain_optimizers.py --data PATH

PATH as for benchmarks/cifar10.py. Run it again after an interruption and it goes on with the runs that are missing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar10 import LAST, Block, build_network, console, conv_bn, draw_batches, load_data, measure_accuracy
from common import RESULTS, in_words, machine, table
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import fxprune
from fxprune import passes

Row = dict[str, Any]


class ConvMuon(Optimizer):
    """Muon (Jordan 2024) for convolutions too, as matrices [out, in * kernel]: torch's takes matrices only.

    The momentum is orthogonalized by five Newton-Schulz steps. Norms and biases take plain momentum SGD."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    momentum = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
                    momentum.mul_(group["momentum"]).add_(parameter.grad)
                    update = parameter.grad + group["momentum"] * momentum
                    parameter.sub_(group["lr"] * (orthogonalize(update) if update.ndim > 1 else update))


def orthogonalize(update: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, roughly, of the size of a step of plain momentum."""
    matrix = update.flatten(1)
    tall = matrix.shape[0] > matrix.shape[1]
    matrix = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = matrix @ matrix.T
        matrix = 3.4445 * matrix + (-4.775 * square + 2.0315 * square @ square) @ matrix
    matrix = matrix.T if tall else matrix
    return max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5 * matrix.reshape(update.shape)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda model: SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4),
    "AdamW": lambda model: AdamW(model.parameters(), lr=2e-3),
    "Muon": lambda model: ConvMuon(model.parameters(), lr=0.01),
}


def narrow_resnet18() -> nn.Module:
    """ResNet-18 with a quarter of the channels and the stem of the ResNets for CIFAR."""
    shapes = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    blocks = (Block(*shape) for shape in shapes)
    return nn.Sequential(
        conv_bn(3, 16).append(nn.ReLU()), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": lambda: build_network("resnet20"),
    "ResNet-18, a quarter wide": narrow_resnet18,
}


def main() -> None:
    options = parse_arguments()
    torch.set_flush_denormal(True)  # dying channels go through tiny numbers that a CPU is slow at
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    data = load_data(options)
    path = options.results / "prunetrain_optimizers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["model"], row["optimizer"], row["epochs"]) for row in rows}
    for cell in product(MODELS, OPTIMIZERS, options.epochs):
        if cell not in done:
            rows.append(measure_cell(*cell, data, options))
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            write_table(rows, options)


def measure_cell(model: str, optimizer: str, epochs: int, data: Any, options: argparse.Namespace) -> Row:
    """The dense and the pruned run of one cell."""
    pruner = passes.PruneTrain(budget=fxprune.Budget(flops=options.flops), by=0.6)
    runs = {
        name: train_session(model, optimizer, epochs, pruners, data, options)
        for name, pruners in (("dense", []), ("pruned", [pruner]))
    }
    first, last = runs["dense"].log[-1], runs["pruned"].log[-1]
    met = next((epoch.epoch for epoch in runs["pruned"].log if epoch.flops <= options.flops * first.flops), None)
    row: Row = {
        "model": model,
        "optimizer": optimizer,
        "epochs": epochs,
        "steps": first.steps,
        "left": last.flops / first.flops,
        "met": None if met is None else met - 1,  # the cut at the end of the epoch before
        "dense": first.values["accuracy"],
        "pruned": last.values["accuracy"],
        "notes": [note for epoch in runs["pruned"].log for note in epoch.notes],
    }
    console.print(row)
    return row


def train_session(model: str, optimizer: str, epochs: int, pruners: Any, data: Any, options: argparse.Namespace) -> Any:
    """The session of a run, with a rate that falls to zero in a line."""
    torch.manual_seed(options.seed)
    network = MODELS[model]().to(memory_format=LAST)
    its_optimizer = OPTIMIZERS[optimizer](network)
    rate = LambdaLR(its_optimizer, lambda epoch: 1 - epoch / epochs)
    with fxprune.Session(
        network, torch.zeros(2, 3, 32, 32), its_optimizer, pruners, epochs=epochs, progress=False
    ) as session:
        session.register(rate=rate)
        for _ in range(epochs):
            session.model.train()
            for x, y in draw_batches(data[0], options.seed, session, options.batch_size):
                its_optimizer.zero_grad()
                task = F.cross_entropy(session.model(x), y)
                (task + session.penalty(task)).backward()
                its_optimizer.step()
            session.epoch_end(accuracy=measure_accuracy(session.graph, data[1]))
            rate.step()
    return session


def write_table(rows: list[Row], options: argparse.Namespace) -> None:
    header = ["network", "optimizer", "epochs", "FLOPs left", "after epoch", "accuracy, dense", "accuracy, pruned"]
    lines = [
        [
            row["model"],
            row["optimizer"],
            str(row["epochs"]),
            f"{row['left']:.3f}",
            "not met" if row["met"] is None else str(row["met"]),
            f"{row['dense']:.1%}",
            f"{row['pruned']:.1%}",
        ]
        for row in rows
    ]
    text = f"""# PruneTrain's budget with three optimizers

`python benchmarks/prunetrain_optimizers.py --data CIFAR --limit {options.limit}`

`PruneTrain(budget=Budget(flops={options.flops:g}), by=0.6)` on {options.limit or "all"} images of CIFAR-10 re-encoded
as JPEG and as many of the test, {rows[0]["steps"]} steps an epoch with batches of {options.batch_size}. Such runs are
far too short to learn much: they show whether the budget is met, and that nothing breaks. Muon takes each convolution
as a matrix, and moves norms and biases by plain momentum.
{in_words(machine("torch"))}

{table(header, lines)}
"""
    (options.results / "prunetrain_optimizers.md").write_text(text, encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="the folder of the images")
    add("--out", type=Path, default=Path("out/prunetrain_optimizers"), help="folder for the decoded images")
    add("--results", type=Path, default=RESULTS, help="folder for the results")
    add("--epochs", type=int, nargs="+", default=[5, 10])
    add("--flops", type=float, default=0.5, help="the share of a forward pass that may remain")
    add("--batch-size", type=int, default=64)
    add("--seed", type=int, default=0)
    add("--limit", type=int, default=2560, help="use only so many images, of each set")
    return parser.parse_args()


if __name__ == "__main__":
    main()
