"""Torch-Pruning's criteria beside fxprune's at half the FLOPs of a network trained on CIFAR-10.

    python benchmarks/criteria_cifar10.py --data PATH [--dense CHECKPOINT]

PATH as for benchmarks/cifar10.py. The dense network is the narrow ResNet-18 of benchmarks/before_training.py, taken
from the checkpoint that this leaves, or trained here. Each criterion cuts a copy of it, all to the same FLOPs, by
global ranking; then come the accuracy right after the cut, with batch norm's averages renewed, and after one epoch of
fine-tuning.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning
from before_training import BATCH, Run, Set, accuracy, draw_batches, load_images, make, train_runs
from cifar10 import normalize_images
from common import RESULTS, in_words, machine, table, write
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import fxprune
from fxprune import passes

FLOPS = 0.5
MINIMUM = 0.1  # of each group stays
LR = 0.01


def cut_by_fxprune(dense: nn.Module, criterion: passes.Criterion, x: Tensor) -> nn.Module:
    """Cut by fxprune; any widths, as the others have them."""
    cut: nn.Module = fxprune.prune(dense, x, criterion, budget=fxprune.Budget(flops=FLOPS))
    return cut


def cut_by_torch_pruning(dense: nn.Module, importance: Any, x: Tensor, data: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Cut by Torch-Pruning: the smallest ratio of channels that brings the FLOPs down to the budget."""
    limit = FLOPS * fxprune.cost.flops(dense, x)
    low, high, best = 0.0, 1.0, None
    for _ in range(12):
        ratio = (low + high) / 2
        model = copy.deepcopy(dense)
        for batch in data if isinstance(importance, torch_pruning.importance.GroupTaylorImportance) else ():
            F.cross_entropy(model(batch[0]), batch[1]).backward()
        torch_pruning.pruner.BasePruner(
            model,
            x,
            importance=importance,
            global_pruning=True,
            pruning_ratio=ratio,
            max_pruning_ratio=1 - MINIMUM,
            ignored_layers=[model[-1]],
        ).step()
        if fxprune.cost.flops(model, x) <= limit:
            best, high = model, ratio
        else:
            low = ratio
    assert best is not None
    return best


def make_candidates(
    dense: nn.Module, x: Tensor, data: list[tuple[Tensor, Tensor]]
) -> dict[str, Callable[[], nn.Module]]:
    """What makes each cut model. ``dense`` is in eval mode, in which both look at the data."""
    free = {"round_to": 1, "minimum": MINIMUM}
    loss = F.cross_entropy
    criteria: dict[str, passes.Criterion] = {
        "magnitude": passes.Magnitude(p=2, **free),
        "BN scale": passes.BatchNormScale(**free),
        "Taylor": passes.Taylor(data, loss, **free),
        "Fisher": passes.Fisher(data, loss, **free),
        "geometric median": passes.GeometricMedian(**free),
        "activation mean": passes.Activation(data, **free),
        "random": passes.Random(**free),
        "uniform by magnitude": passes.Uniform(by=passes.Magnitude(), **free),
    }
    importances = {
        "magnitude": torch_pruning.importance.GroupMagnitudeImportance(p=2),
        "BN scale": torch_pruning.importance.BNScaleImportance(),
        "Taylor": torch_pruning.importance.GroupTaylorImportance(),
    }
    makers: dict[str, Callable[[], nn.Module]] = {}
    for name, criterion in criteria.items():
        makers[f"{name}, fxprune"] = partial(cut_by_fxprune, dense, criterion, x)
        if name in importances:
            makers[f"{name}, Torch-Pruning"] = partial(cut_by_torch_pruning, dense, importances[name], x, data)
    return makers


def measure_accuracies(
    model: nn.Module, train_set: Set, test_set: Set, epoch: int, limit: int | None
) -> dict[str, float]:
    """The accuracies of a cut model, which is fine-tuned."""
    accuracies = {"after the cut": accuracy(model, test_set)}
    renewed = copy.deepcopy(model)
    update_bn([x for (x, _), _ in zip(draw_batches(train_set, epoch), range(20), strict=False)], renewed)
    accuracies["new averages"] = accuracy(renewed, test_set)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    model.train()
    for number, (x, y) in enumerate(draw_batches(train_set, epoch)):
        if number == limit:
            break
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return accuracies | {"one epoch": accuracy(model, test_set)}


def write_report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write what is finished."""
    machine_facts = machine("fxprune", "torch", "torch-pruning")
    flops = rows[0]["flops"]
    names = ["after the cut", "new averages", "one epoch"]
    lines = [
        [row["criterion"], f"{row['flops'] / flops:.1%}", f"{row['params']:,}", *(f"{row[name]:.2%}" for name in names)]
        for row in rows
    ]
    text = [
        "# Criteria at half the FLOPs of a trained network",
        "",
        f"ResNet-18 of a quarter of its width for 32 x 32 pixels, trained on {options.images:,} images of CIFAR-10 for "
        f"{options.epochs} epochs; {options.tested:,} test images; one seed. Global ranking over all groups, at least "
        f"{MINIMUM:.0%} of a group stays, any width. Criteria that look at data see the same {options.scored} batches "
        f"of {BATCH}. New averages: those of batch norm, from 20 batches. One epoch: of fine-tuning at a rate of {LR}, "
        "the same batches for all.",
        "",
        in_words(machine_facts),
        "",
        table(["criterion", "FLOPs", "parameters", *names], lines),
    ]
    print("\n".join(text[-1:]), flush=True)
    arguments = {name: value for name, value in vars(options).items() if name not in ("data", "work", "out", "dense")}
    write(
        options.out, "criteria_cifar10", "\n".join(text), {"machine": machine_facts, "options": arguments, "rows": rows}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the images")
    parser.add_argument("--dense", type=Path, help="a checkpoint of benchmarks/before_training.py")
    parser.add_argument("--images", type=int, default=12_800, help="of the training set")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--scored", type=int, default=10, help="batches that the criteria see")
    parser.add_argument("--tested", type=int, default=10_000, help="images of the test set")
    parser.add_argument("--only", nargs="+", help="the criteria whose names begin so")
    parser.add_argument("--limit", type=int, help="steps of fine-tuning, to try things out")
    parser.add_argument(
        "--work", type=Path, default=Path("out/before_training"), help="folder of images and checkpoint"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()

    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    train_set, test_set = load_images(options)
    sample = torch.randperm(len(test_set[1]), generator=torch.Generator().manual_seed(0))[: options.tested]
    test_set = test_set[0][sample], test_set[1][sample]
    dense = make("ResNet-18", options.width)
    if options.dense:
        saved = torch.load(options.dense, weights_only=True)
        if saved["epoch"] < options.epochs:
            raise SystemExit(
                f"{options.dense} holds {saved['epoch']} epochs of {options.epochs}: finish that run first"
            )
        dense.load_state_dict(saved["runs"]["dense"]["model"])
    else:
        run = Run(dense, options.epochs * (options.images // BATCH))
        train_runs({"dense": run}, train_set, options.epochs, options.work / "criteria.pt")
    dense.eval()
    parts = torch.arange(len(train_set[1])).split(BATCH)[: options.scored]
    data = [(normalize_images(train_set[0][part]), train_set[1][part]) for part in parts]
    x = data[0][0][:2]
    rows: list[dict[str, Any]] = []
    for name, cut in {"dense": lambda: copy.deepcopy(dense), **make_candidates(dense, x, data)}.items():
        if options.only and not name.startswith(("dense", *options.only)):
            continue
        model = cut()
        sizes = {"flops": fxprune.cost.flops(model.eval(), x), "params": fxprune.cost.params(model)}
        rows.append(
            {"criterion": name} | sizes | measure_accuracies(model, train_set, test_set, options.epochs, options.limit)
        )
        print(rows[-1], flush=True)
    write_report(rows, options)


if __name__ == "__main__":
    main()
