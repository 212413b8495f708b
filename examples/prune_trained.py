"""Prune a trained resnet18, whose weights come from a file, to half its FLOPs by two criteria, and fine-tune.

The file is of handwritten digits; where it is not there yet, it is trained first. About a minute on one CPU core. Each
cut is proved exact; batch norm's averages are renewed after it, and the optimizer goes on with the momentum of the
channels that stay."""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from shared import BATCH, accuracy, console, digits, say, table, train
from torch.optim.swa_utils import update_bn
from torchvision.models import resnet18

import fxprune
from fxprune import passes

WEIGHTS = Path("out/prune_trained/resnet18.pt")


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train_set, test_set = digits()
    example, batch = test_set[0][:BATCH], (train_set[0][:256], train_set[1][:256])
    if not WEIGHTS.exists():
        write_weights(train_set)

    model = resnet18(weights=None, num_classes=10)
    saved = torch.load(WEIGHTS, weights_only=True)
    model.load_state_dict(saved["model"])
    dense = fxprune.trace(model, example).eval()
    before = accuracy(dense, test_set)
    say(f"the resnet18 in {WEIGHTS} recognises {before:.1%} of {len(test_set[0])} digits")

    analysis = fxprune.analyze(dense, example)
    rows = table("parameters", "FLOPs an image", "right after the cut", "new batch norm averages", "fine-tuned")
    rows.add_row(
        "dense", f"{fxprune.cost.params(dense):,}", f"{fxprune.cost.flops(dense, example[:1]):,}", f"{before:.1%}"
    )
    for criterion in (passes.Magnitude(p=2), passes.Taylor(batch, F.cross_entropy)):
        name = type(criterion).__name__
        plan = criterion.plan(analysis, fxprune.Budget(flops=0.5))
        compact, param_map = fxprune.rewrite(dense, analysis, plan)
        say(f"{name}: {fxprune.verify(dense, compact, param_map, example)}")
        reached = [accuracy(compact, test_set)]
        update_bn(train_set[0].split(BATCH), compact)  # its averages are still those of the dense model
        reached.append(accuracy(compact, test_set))
        optimizer = sgd(dense)
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        param_map.migrate(optimizer)
        train(compact, optimizer, train_set, epochs=3, lr=0.02)
        reached.append(accuracy(compact, test_set))
        sizes = (fxprune.cost.params(compact), fxprune.cost.flops(compact, example[:1]))
        rows.add_row(name, *(f"{size:,}" for size in sizes), *(f"{share:.1%}" for share in reached))
    console.print(rows)


def write_weights(train_set):
    say(f"{WEIGHTS} is not there: training resnet18 on {len(train_set[0])} digits")
    model = resnet18(weights=None, num_classes=10)
    optimizer = sgd(model)
    train(model, optimizer, train_set, epochs=8, lr=0.03)
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, WEIGHTS)


def sgd(model):
    return torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=5e-4)


if __name__ == "__main__":
    main()
