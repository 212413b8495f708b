"""Train resnet18 on handwritten digits, then prune it to half its FLOPs by two criteria, and fine-tune.

About a minute on one CPU core. Each cut is proved exact; batch norm's averages are renewed after it, and the optimizer
goes on with the momentum of the channels that stay."""

import copy

import torch
import torch.nn.functional as F
from quickstart import BATCH, accuracy, console, digits, say
from rich.progress import track
from rich.table import Column, Table
from torch.optim.swa_utils import update_bn
from torchvision.models import resnet18

import fxprune
from fxprune import passes


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train_set, test_set = digits()
    example, batch = test_set[0][:BATCH], (train_set[0][:256], train_set[1][:256])

    dense = fxprune.trace(resnet18(weights=None, num_classes=10), example)
    optimizer = torch.optim.SGD(dense.parameters(), momentum=0.9, weight_decay=5e-4)
    train(dense, optimizer, *train_set, epochs=8, lr=0.03)
    before = accuracy(dense, test_set)
    say(f"trained resnet18 on {len(train_set[0])} digits; it recognises {before:.1%} of {len(test_set[0])} others")

    analysis = fxprune.analyze(dense, example)
    names = ("parameters", "FLOPs an image", "right after the cut", "new batch norm averages", "fine-tuned")
    table = Table("", *(Column(name, justify="right") for name in names))
    table.add_row(
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
        its_optimizer = torch.optim.SGD(dense.parameters(), momentum=0.9, weight_decay=5e-4)
        its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        param_map.migrate(its_optimizer)
        train(compact, its_optimizer, *train_set, epochs=3, lr=0.02)
        reached.append(accuracy(compact, test_set))
        sizes = (fxprune.cost.params(compact), fxprune.cost.flops(compact, example[:1]))
        table.add_row(name, *(f"{size:,}" for size in sizes), *(f"{each:.1%}" for each in reached))
    console.print(table)


def train(model, optimizer, x, y, epochs, lr):
    """Train with a learning rate that falls from ``lr`` to zero in a line; leave ``model`` in eval mode."""
    batches = [batch for _ in range(epochs) for batch in torch.randperm(len(y)).split(BATCH)[:-1]]
    bar = track(batches, f"{epochs} epochs", console=console, transient=True, disable=not console.is_terminal)
    model.train()
    for step, batch in enumerate(bar):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / len(batches))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    model.eval()


if __name__ == "__main__":
    main()
