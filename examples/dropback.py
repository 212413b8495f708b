"""Train resnet18 on handwritten digits with DropBack: only so many weights may differ from what a seed gives.

About two minutes on one CPU core. The dense network and two budgets, the same start, batches and plain SGD for all.
Each network is saved and loaded again, and tested as it comes from the file; the files are left in out/dropback/."""

from pathlib import Path

import torch
import torch.nn.functional as F
from shared import accuracy, batches, console, digits, few, say, table
from torchvision.models import resnet18

import fxprune
from fxprune import passes

OUT = Path("out/dropback")
EPOCHS = 8


def main():
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    train_set, test_set = digits()
    rows = table("weights that differ", "file, bytes", "smaller", "test accuracy", caption="of the network in the file")
    sizes = []
    for budget in (None, 0.2, 0.05):
        model = fxprune.initialize(resnet18(num_classes=10), seed=7)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        pruners = [passes.DropBack(budget)] if budget else []
        with fxprune.Session(model, test_set[0][:2], optimizer, pruners) as session:
            for epoch in range(few(EPOCHS)):
                session.model.train()
                for x, y in batches(train_set, epoch, f"budget {budget}, epoch {epoch + 1}"):
                    optimizer.zero_grad()
                    F.cross_entropy(session.model(x), y).backward()
                    optimizer.step()
                session.epoch_end()
        path = OUT / f"{budget or 'dense'}.safetensors"
        fxprune.save(session.graph.eval(), path)
        again = fxprune.load(path, resnet18(num_classes=10)).eval()
        sizes.append(path.stat().st_size)
        start = fxprune.initialize(resnet18(num_classes=10), seed=7)
        pairs = zip(again.parameters(), start.parameters(), strict=True)
        differ = sum(int((trained != rebuilt).sum()) for trained, rebuilt in pairs)
        reached = accuracy(again, test_set)
        say(f"budget {budget}: {reached:.1%}")
        rows.add_row(
            str(budget or "dense"), f"{differ:,}", f"{sizes[-1]:,}", f"{sizes[0] / sizes[-1]:.1f} ×", f"{reached:.1%}"
        )
    console.print(rows)


if __name__ == "__main__":
    main()
