"""PruneTrain to half the FLOPs on CIFAR-10, and what it has to beat: three controls, each with a schedule of its own.

    python benchmarks/prunetrain_controls.py --data PATH

For each seed: PruneTrain with a budget; the dense network for as many epochs; the dense network for as many training
FLOPs, which is fewer epochs; and the widths that PruneTrain ended with, trained from new weights. PATH as for
benchmarks/cifar10.py. Run it again after an interruption and it goes on where it was."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from cifar10 import LAST, VGGS, Clock, build_vgg, console, draw_batches, load_data, measure_accuracy
from common import RESULTS, in_words, machine, table
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

import fxprune
from fxprune import passes

NAMES = {
    "pruned": "PruneTrain",
    "dense": "dense, as many epochs",
    "equal": "dense, as many training FLOPs",
    "scratch": "its final widths from new weights",
}
Row = dict[str, Any]


def main() -> None:
    options = parse_arguments()
    torch.set_flush_denormal(True)  # dying channels go through tiny numbers that a CPU is slow at
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    data = load_data(options)
    for seed in range(options.seeds):
        widths, epochs = VGGS[options.model], options.epochs
        pruned = run("pruned", seed, widths, epochs, data, options)
        for name, its_widths, its_epochs in (
            ("equal", widths, max(1, round(pruned["train_flops"] / pruned["dense_epoch_flops"]))),
            ("scratch", replace_widths(widths, pruned["widths"]), epochs),
            ("dense", widths, epochs),
        ):
            run(name, seed, its_widths, its_epochs, data, options)
        write_table(options)


def run(name: str, seed: int, widths: str, epochs: int, data: Any, options: argparse.Namespace) -> Row:
    """Train one network, unless its row is there; returns the row."""
    for row in read_rows(options):
        if (row["run"], row["seed"], row["model"], row["epochs_given"]) == (name, seed, options.model, options.epochs):
            return row
    train_set, test_set = data
    session, clock = start_or_resume(name, seed, widths, epochs, len(train_set[1]), options)
    for _ in range(session.epoch, epochs):
        session.model.train()
        for x, y in draw_batches(train_set, seed, session, options.batch_size):
            with clock:
                take_step(session, x, y)
        with clock:
            accuracy = measure_accuracy(session.graph, test_set)
            record = session.epoch_end(accuracy=accuracy)
        session.save(options.out / f"{name}-{seed}.ckpt")
        console.print(f"{name:8} seed {seed} epoch {record.epoch:2}  {accuracy:.2%}  {record.flops / 1e6:.1f} MFLOPs")
    row = describe_run(name, seed, session, clock, options)
    session.close()
    with (options.results / "prunetrain_controls.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def start_or_resume(
    name: str, seed: int, widths: str, epochs: int, images: int, options: argparse.Namespace
) -> tuple[fxprune.Session, Clock]:
    """The session, where it was if it was interrupted. The rate goes up for a fifth of the run, then down to zero."""
    torch.manual_seed(seed)
    model = build_vgg(widths.split()).to(memory_format=LAST)
    optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (images // options.batch_size)
    rate = OneCycleLR(optimizer, options.lr, steps, pct_start=0.2, anneal_strategy="linear", cycle_momentum=False)
    path, example, clock = options.out / f"{name}-{seed}.ckpt", torch.zeros(2, 3, 32, 32), Clock()
    if path.exists():
        session = fxprune.Session.load(path, model, example, optimizer, progress=False)
    else:
        pruner = passes.PruneTrain(budget=fxprune.Budget(flops=options.flops), by=options.by, round_to=8)
        pruners = [pruner] if name == "pruned" else []
        session = fxprune.Session(
            model, example, optimizer, pruners, batch_size=options.batch_size, epochs=epochs, progress=False
        )
    session.register(rate=rate, clock=clock)
    return session, clock


def take_step(session: fxprune.Session, x: torch.Tensor, y: torch.Tensor) -> None:
    """One step of the optimizer and of the rate."""
    session.optimizer.zero_grad()
    task = F.cross_entropy(session.model(x), y, label_smoothing=0.1)
    (task + session.penalty(task)).backward()
    session.optimizer.step()
    session.registered["rate"].step()  # type: ignore[attr-defined]


def describe_run(name: str, seed: int, session: fxprune.Session, clock: Clock, options: argparse.Namespace) -> Row:
    """What is written of a run that ended."""
    log = session.log
    convolutions = [module for module in session.graph.modules() if isinstance(module, nn.Conv2d)]
    return {
        "run": name,
        "seed": seed,
        "model": options.model,
        "epochs_given": options.epochs,
        "epochs": len(log),
        "accuracy": log[-1].values["accuracy"],
        "train_flops": sum(3 * epoch.flops * epoch.steps * options.batch_size for epoch in log),  # backward is twice
        "dense_epoch_flops": 3 * log[0].flops * log[0].steps * options.batch_size,
        "flops": fxprune.cost.flops(session.graph, torch.zeros(1, 3, 32, 32)),
        "params": fxprune.cost.params(session.graph),
        "cpu_minutes": clock.cpu / 60,
        "widths": [convolution.out_channels for convolution in convolutions],
        "notes": [note for epoch in log for note in epoch.notes],
        "machine": machine("torch"),
        "accuracies": [epoch.values["accuracy"] for epoch in log],
        "epoch_flops": [epoch.flops for epoch in log],
    }


def replace_widths(layers: str, widths: list[int]) -> str:
    """The layers of a VGG with other widths; the poolings stay."""
    remaining = iter(widths)
    return " ".join(layer if layer == "M" else str(next(remaining)) for layer in layers.split())


def read_rows(options: argparse.Namespace) -> list[Row]:
    """The rows of the runs that ended."""
    path = options.results / "prunetrain_controls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_table(options: argparse.Namespace) -> None:
    """Write the table of all runs that ended."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in read_rows(options):
        groups[row["run"]].append(row)
    dense = groups["dense"][0]
    lines = [
        [
            title,
            str(groups[name][0]["epochs"]),
            " ".join(f"{row['accuracy']:.2%}" for row in groups[name]),
            f"{mean(row['accuracy'] for row in groups[name]):.2%}",
            f"{mean(row['train_flops'] for row in groups[name]) / dense['train_flops']:.2f}",
            f"{mean(row['cpu_minutes'] for row in groups[name]):.1f}",
            f"{mean(row['flops'] for row in groups[name]) / 1e6:.1f}",
            f"{mean(row['params'] for row in groups[name]):,.0f}",
        ]
        for name, title in NAMES.items()
    ]
    header = ["", "epochs", "test accuracy, each seed", "mean", "training FLOPs", "minutes", "MFLOPs", "parameters"]
    text = f"""# PruneTrain to {options.flops:g} of the FLOPs, beside its controls

`python benchmarks/prunetrain_controls.py --data CIFAR --model {options.model} --epochs {options.epochs}`

{options.model} on CIFAR-10 re-encoded as JPEG, batch {options.batch_size}, Nesterov momentum, a rate that rises to
{options.lr:g} and falls to zero, label smoothing 0.1. Training FLOPs beside those of the dense network. Minutes are of
the processor, one thread, with tests and cuts. {in_words(dense["machine"])}

{table(header, lines)}
"""
    (options.results / "prunetrain_controls.md").write_text(text, encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="the folder of the images")
    add("--out", type=Path, default=Path("out/prunetrain_controls"), help="folder for checkpoints")
    add("--results", type=Path, default=RESULTS, help="folder for the results")
    add("--model", choices=VGGS, default="vgg8")
    add("--epochs", type=int, default=10)
    add("--seeds", type=int, default=3)
    add("--flops", type=float, default=0.5, help="the share of a forward pass that may remain")
    add("--by", type=float, default=0.6, help="the share of the run by which it is met")
    add("--batch-size", type=int, default=128)
    add("--lr", type=float, default=0.2)
    add("--limit", type=int, help="use only so many images, to try things out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
