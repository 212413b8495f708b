"""DropBack on CIFAR-10 at several weight budgets, the dense network beside them: equal epochs, seed and batches.

    python benchmarks/dropback_cifar10.py --data PATH [--epochs 6] [--limit 12500] [--threads 1] [--no-train]

PATH is as for benchmarks/cifar10.py. All runs train one epoch in turn, with plain SGD, and each saves after it; run
it again after an interruption and it goes on where it was. At the end the table is written: test accuracy, and the
bytes of the file that fxprune.save writes, from which each network is loaded again and tested.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import cifar10 as cifar
import torch
import torch.nn.functional as F
from common import RESULTS, in_words, machine, table, write
from torch import Tensor, nn

import fxprune
from fxprune import passes

BUDGETS = {"dense": 1.0, "1/3": 1 / 3, "1/5": 1 / 5, "1/11.7": 1 / 11.7, "1/24": 1 / 24}
EXAMPLE = torch.zeros(2, 3, 32, 32)
Data = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="the folder of the images")
    add("--out", type=Path, default=Path("out/dropback"), help="folder for checkpoints")
    add("--results", type=Path, default=RESULTS, help="folder of the table")
    add("--model", default="vgg8", choices=[*cifar.VGGS, *cifar.RESNETS])
    add("--epochs", type=int, default=6, help="the learning rate falls to a tenth at 5/8 and at 7/8 of them")
    add("--batch-size", type=int, default=64)
    add("--lr", type=float, default=0.2)
    add("--seed", type=int, default=0)
    add("--limit", type=int, help="use only so many training images")
    add("--threads", type=int, default=1)
    add("--no-train", dest="train", action="store_false", help="only write the table of finished runs")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    train_set, test_set = cifar.load_data(argparse.Namespace(out=options.out, data=options.data, limit=None))
    if options.limit:
        sample = torch.randperm(len(train_set[1]), generator=torch.Generator().manual_seed(0))[: options.limit]
        train_set = train_set[0][sample], train_set[1][sample]
    if options.train:
        for epoch in range(options.epochs):
            for name in BUDGETS:
                train_epoch(name, epoch, options, train_set, test_set)
    write_report(options, test_set, len(train_set[1]))


def build_network(options: argparse.Namespace) -> nn.Module:
    """The network with the start values of the seed; the same for every run."""
    model = cifar.build_network(options.model).to(memory_format=torch.channels_last)
    return fxprune.initialize(model, options.seed)


def resume_run(name: str, options: argparse.Namespace) -> fxprune.Session:
    """A run as its checkpoint has it, or at its start, with its scheduler."""
    path, model = find_checkpoint(name, options), build_network(options)
    optimizer = torch.optim.SGD(model.parameters(), options.lr, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list_milestones(options))
    torch.manual_seed(options.seed)
    if path.exists():
        session = fxprune.Session.load(path, model, EXAMPLE, optimizer, progress=False)
    else:
        pruners = [] if name == "dense" else [passes.DropBack(BUDGETS[name])]
        session = fxprune.Session(model, EXAMPLE, optimizer, pruners, batch_size=options.batch_size, progress=False)
    session.register(scheduler=scheduler)
    return session


def find_checkpoint(name: str, options: argparse.Namespace) -> Path:
    return Path(options.out / f"{name.replace('/', '_')}.ckpt")


def train_epoch(name: str, epoch: int, options: argparse.Namespace, train_set: Data, test_set: Data) -> None:
    """Epoch number ``epoch`` of one run, unless it was done before."""
    session = resume_run(name, options)
    optimizer = session.optimizer
    if session.epoch > epoch:
        return
    wall, cpu, losses = time.perf_counter(), time.process_time(), []
    session.model.train()
    for x, y in cifar.draw_batches(train_set, options.seed, session, options.batch_size):
        optimizer.zero_grad()
        loss = F.cross_entropy(session.model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    session.registered["scheduler"].step()
    last = {"accuracy": cifar.measure_accuracy(session.graph, test_set)} if epoch + 1 == options.epochs else {}
    record = session.epoch_end(loss=sum(losses) / len(losses), wall=wall, cpu=cpu, **last)
    session.save(find_checkpoint(name, options))
    print(f"{name:8} epoch {record.epoch:2}  {record.values}", flush=True)
    session.close()


def write_report(options: argparse.Namespace, test_set: Data, images: int) -> None:
    """Test what a user has in the end, and write the table."""
    runs = {name: measure_run(name, options, test_set) for name in BUDGETS}
    dense = runs["dense"]
    rows = [
        [
            name,
            f"{run['tracked']:,}",
            f"{run['accuracy']:.2%}",
            f"{run['accuracy'] - dense['accuracy']:+.2%}" if run is not dense else "",
            f"{run['loss']:.3f}",
            f"{run['bytes']:,}",
            f"{dense['bytes'] / run['bytes']:.1f} ×",
            f"{(run['bytes'] - run['buffers']) / run['tracked']:.1f}",
            f"{run['cpu'] / dense['cpu']:.2f}",
        ]
        for name, run in runs.items()
    ]
    machine_facts = machine("fxprune", "torch", "torchvision")
    first, second = list_milestones(options)
    header = ["budget", "differ", "test accuracy", "to dense", "training loss", "file, bytes", "smaller", "bytes each"]
    text = "\n".join(
        [
            "# DropBack on CIFAR-10, the dense network beside it",
            "",
            f"{options.model} ({dense['weights']:,} weights), {options.epochs} epochs of {images:,} training images "
            f"re-encoded as JPEG, all 10,000 test images, batch {options.batch_size}, plain SGD, learning rate "
            f"{options.lr:g} with drops to a tenth after epochs {first} and {second}, "
            "weight decay 5e-4, exact rule at every step; the same start, seed and batches for all. One seed: "
            "differences of a point say nothing.",
            "",
            in_words(machine_facts),
            "",
            table([*header, "processor time"], rows),
            "",
            "The accuracy is that of a network loaded from the file, which `fxprune.save` wrote; batch norm's averages "
            f"({dense['buffers']:,} bytes) are in it, but not in `bytes each`. `processor time` is of training, beside "
            "the dense run's. `differ` counts the weights that are not at their start value.",
        ]
    )
    print(text)
    settings = {key: value for key, value in vars(options).items() if key not in ("data", "out", "results")}
    write(
        options.results,
        "dropback",
        text,
        {"machine": machine_facts, "settings": settings, "images": images, "runs": runs},
    )


def measure_run(name: str, options: argparse.Namespace, test_set: Data) -> dict[str, Any]:
    """What a user has of one run in the end: its network, saved and loaded into a new one."""
    session = resume_run(name, options)
    if session.epoch != options.epochs:
        raise SystemExit(f"{name} has {session.epoch} epochs of {options.epochs}: train on")
    path = options.out / "sparse.safetensors"
    fxprune.save(session.graph, path)
    again = fxprune.load(path, cifar.build_network(options.model).to(memory_format=torch.channels_last))
    start = session.graph.meta["fxprune_start"]
    epochs = [record.values for record in session.log.epochs]
    return {
        "weights": sum(p.numel() for p in again.parameters()),
        "tracked": sum(int((p.cpu() != start.values(key)).sum()) for key, p in session.graph.named_parameters()),
        "accuracy": cifar.measure_accuracy(again, test_set),
        "bytes": path.stat().st_size,
        "buffers": sum(buffer.nbytes for buffer in again.buffers()),
        "cpu": sum(record["cpu"] for record in epochs),
        "loss": epochs[-1]["loss"],
        "epochs": epochs,
    }


def list_milestones(options: argparse.Namespace) -> list[int]:
    """The epochs after which the learning rate falls."""
    return [options.epochs * 5 // 8, options.epochs * 7 // 8]


if __name__ == "__main__":
    main()
