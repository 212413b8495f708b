"""ClickTrain on CIFAR-10 with patterns shared and not, beside dense training and PruneTrain in the same training time.

    python benchmarks/clicktrain_cifar10.py --data PATH [--epochs 12] [--limit 12500] [--threads 1] [--no-train]

PATH is as for benchmarks/cifar10.py. The runs train one epoch in turn from the same start on the same batches, and
each saves after it; run it again after an interruption and it goes on where it was. PruneTrain then trains for as much
processor time as the slowest of them took. At the end each network is saved as users do, loaded, lowered, and tested.
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

RUNS = ("dense", "none", "input_channel", "filter", "PruneTrain")
EXAMPLE = torch.zeros(2, 3, 32, 32)
Data = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="the folder of the images")
    add("--out", type=Path, default=Path("out/clicktrain"), help="folder for checkpoints")
    add("--results", type=Path, default=RESULTS, help="folder of the table")
    add("--model", default="vgg8", choices=[*cifar.VGGS, *cifar.RESNETS])
    add("--epochs", type=int, default=12, help="the learning rate falls to a tenth at 1/3 and at 2/3 of them")
    add("--kernels", type=float, default=0.5, help="the fraction of each layer's kernels that ClickTrain removes")
    add("--strength", type=float, default=1e-3, help="of ClickTrain's penalty")
    add("--ratio", type=float, default=0.25, help="of PruneTrain's penalty")
    add("--batch-size", type=int, default=64)
    add("--lr", type=float, default=0.05)
    add("--seed", type=int, default=0)
    add("--limit", type=int, help="use only so many training images")
    add("--threads", type=int, default=1)
    add("--no-train", dest="train", action="store_false", help="only write the table of finished runs")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    options.out.mkdir(parents=True, exist_ok=True)
    train_set, test_set = cifar.load_data(argparse.Namespace(out=options.out, data=options.data, limit=None))
    if options.limit:
        sample = torch.randperm(len(train_set[1]), generator=torch.Generator().manual_seed(0))[: options.limit]
        train_set = train_set[0][sample], train_set[1][sample]
    if options.train:
        for epoch in range(options.epochs):
            for name in RUNS[:-1]:
                train_epoch(name, options, train_set, test_set, until=epoch + 1)
        budget = max(count_seconds(resume_run(name, options)) for name in RUNS[1:-1])
        while count_seconds(resume_run("PruneTrain", options)) < budget:
            train_epoch("PruneTrain", options, train_set, test_set, budget=budget)
    write_report(options, test_set, len(train_set[1]))


def pass_of(name: str, options: argparse.Namespace) -> list[fxprune.TrainingPass]:
    """What prunes in a run."""
    if name == "dense":
        return []
    if name == "PruneTrain":
        return [passes.PruneTrain(ratio=options.ratio, interval=max(1, options.epochs // 6))]
    return [
        passes.ClickTrain(
            select=options.epochs // 3,
            hard=max(options.epochs // 3 + 1, options.epochs * 3 // 4),
            kernels=options.kernels,
            strength=options.strength,
            share=name,
        )
    ]


def resume_run(name: str, options: argparse.Namespace) -> fxprune.Session:
    """A run as its checkpoint has it, or at its start."""
    torch.manual_seed(options.seed)
    model = cifar.build_network(options.model).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, weight_decay=5e-4)
    path = options.out / f"{name}.ckpt"
    if path.exists():
        return fxprune.Session.load(path, model, EXAMPLE, optimizer, progress=False)
    pruners = pass_of(name, options)
    return fxprune.Session(model, EXAMPLE, optimizer, pruners, batch_size=options.batch_size, progress=False)


def count_seconds(session: fxprune.Session) -> float:
    """Seconds of processor time that a run took so far."""
    return sum(epoch.values["cpu"] for epoch in session.log.epochs)


def train_epoch(
    name: str,
    options: argparse.Namespace,
    train_set: Data,
    test_set: Data,
    until: int | None = None,
    budget: float = 0.0,
) -> None:
    """One epoch of a run, unless it has ``until`` of them; the learning rate falls by epochs, or by time spent."""
    session = resume_run(name, options)
    if until is not None and session.epoch >= until:
        return
    done = session.epoch / options.epochs if until is not None else count_seconds(session) / budget
    for group in session.optimizer.param_groups:
        group["lr"] = options.lr * 0.1 ** ((done >= 1 / 3) + (done >= 2 / 3))
    cpu, losses = time.process_time(), []
    session.model.train()
    for x, y in cifar.draw_batches(train_set, options.seed, session, options.batch_size):
        session.optimizer.zero_grad()
        loss = F.cross_entropy(session.model(x), y)
        (loss + session.penalty(loss)).backward()
        session.optimizer.step()
        losses.append(loss.item())
    cpu = time.process_time() - cpu
    accuracy = cifar.measure_accuracy(session.graph, test_set)
    record = session.epoch_end(loss=sum(losses) / len(losses), cpu=cpu, accuracy=accuracy)
    session.save(options.out / f"{name}.ckpt")
    print(f"{name:13} epoch {record.epoch:2}  {record.flops / 2e6:.1f} MFLOPs  {record.values}", flush=True)
    session.close()


def write_report(options: argparse.Namespace, test_set: Data, images: int) -> None:
    """Test what a user has in the end, and write the table."""
    runs = {name: measure_run(name, options, test_set) for name in RUNS}
    dense = runs["dense"]
    rows = [
        [
            name if name in ("dense", "PruneTrain") else f"ClickTrain, share={name!r}",
            str(len(run["epochs"])),
            f"{run['cpu'] / dense['cpu']:.2f}",
            f"{run['accuracy']:.2%}",
            f"{run['accuracy'] - dense['accuracy']:+.2%}" if run is not dense else "",
            f"{run['compression']:.2f} ×",
            f"{run['macs'] / 1e6:.1f}",
            f"{run['bytes']:,}" if run["bytes"] else "",
        ]
        for name, run in runs.items()
    ]
    machine_facts = machine("fxprune", "torch", "torchvision")
    select, hard = (getattr(pass_of("none", options)[0], at) for at in ("select", "hard"))
    text = "\n".join(
        [
            "# ClickTrain on CIFAR-10, dense training and PruneTrain beside it",
            "",
            f"{options.model}, {options.epochs} epochs of {images:,} training images re-encoded as JPEG, all 10,000 "
            f"test images, batch {options.batch_size}, SGD with momentum 0.9 and weight decay 5e-4, learning rate "
            f"{options.lr:g} with drops to a tenth at 1/3 and 2/3; the same start, seed and batches for all. "
            f"ClickTrain: select={select}, hard={hard}, kernels={options.kernels:g}, strength={options.strength:g}, "
            f"four patterns, no mixup. PruneTrain: ratio={options.ratio:g}, for as much processor time as the slowest "
            "ClickTrain. One seed: differences of a point say nothing.",
            "",
            in_words(machine_facts),
            "",
            table(["run", "epochs", "time", "test accuracy", "to dense", "compression", "MMACs", "file, bytes"], rows),
            "",
            "`time`: processor time of training, beside the dense run's. `compression`: weights of the convolutions of "
            "the dense network over those that are not zero. `MMACs`: of a forward pass on one image after "
            "`passes.PatternConv`. The accuracy is that of a network loaded from the file that `fxprune.save` wrote.",
        ]
    )
    print(text)
    settings = {key: value for key, value in vars(options).items() if key not in ("data", "out", "results")}
    write(options.results, "clicktrain_cifar10", text, {"machine": machine_facts, "settings": settings, "runs": runs})


def measure_run(name: str, options: argparse.Namespace, test_set: Data) -> dict[str, Any]:
    """What a user has of one run in the end: saved and loaded, and lowered."""
    session = resume_run(name, options)
    if name != "PruneTrain" and session.epoch != options.epochs:
        raise SystemExit(f"{name} has {session.epoch} epochs of {options.epochs}: train on")
    network: nn.Module = session.graph
    path = options.out / f"{name}.safetensors"
    if name != "dense":
        fxprune.save(network, path)
        network = fxprune.load(path, cifar.build_network(options.model).to(memory_format=torch.channels_last))
    lowered = fxprune.Pipeline([passes.PatternConv()], EXAMPLE)(fxprune.trace(network, EXAMPLE)).graph_module
    return {
        "accuracy": cifar.measure_accuracy(network, test_set),
        "lowered_accuracy": cifar.measure_accuracy(lowered, test_set),
        "compression": count_weights(cifar.build_network(options.model))[0] / count_weights(session.graph)[1],
        "macs": fxprune.cost.flops(lowered, EXAMPLE[:1]) / 2,
        "epochs": [epoch.values for epoch in session.log.epochs],
        "cpu": count_seconds(session),
        "bytes": path.stat().st_size if name != "dense" else None,
    }


def count_weights(model: nn.Module) -> tuple[int, int]:
    """The weights of all convolutions, and how many of them are not zero."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    return sum(w.numel() for w in weights), sum(int(w.count_nonzero()) for w in weights)


if __name__ == "__main__":
    main()
