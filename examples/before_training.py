"""Prune resnet18 before it is trained on handwritten digits: 3SP and Uniform beside the dense network.

About two minutes on one CPU core. 3SP looks at one batch, Uniform at nothing; they leave a half, a quarter and a tenth
of the FLOPs. All start from the same weights and train on the same batches, in turns, so that the times compare. The
picture, accuracy against the time of a step, is left in out/before_training/."""

import random
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from shared import BATCH, accuracy, batches, console, digits, few, say, table
from torchvision.models import resnet18

import fxprune
from fxprune import passes

OUT = Path("out/before_training")
EPOCHS = few(8)


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    train_set, test_set = digits()
    example, batch = test_set[0][:BATCH], (train_set[0][:BATCH], train_set[1][:BATCH])

    dense = fxprune.trace(resnet18(weights=None, num_classes=10), example).train()
    analysis = fxprune.analyze(dense, example)
    runs = [Run("dense", dense)]
    for flops in (0.5, 0.25, 0.1):
        for name, method in {"3SP": passes.SingleShot(batch, F.cross_entropy), "Uniform": passes.Uniform()}.items():
            compact, _ = fxprune.rewrite(dense, analysis, method.plan(analysis, fxprune.Budget(flops=flops)))
            runs.append(Run(f"{name} {flops:.0%}", compact))
    say(f"training {len(runs)} networks on {len(train_set[0])} digits, in turns; {len(test_set[0])} are the test")
    train(runs, train_set)

    caption = f"ms: forward, backward and update, a batch of {BATCH}, one CPU thread, median"
    rows = table("FLOPs an image", "parameters", "ms a step", "of dense", "test accuracy", caption=caption)
    for run in runs:
        run.ms, run.accuracy = 1e3 * median(run.seconds), accuracy(run.model.eval(), test_set)
        sizes = fxprune.cost.flops(run.model, example[:1]), fxprune.cost.params(run.model)
        figures = f"{run.ms:.1f}", f"{run.ms / runs[0].ms:.2f}", f"{run.accuracy:.1%}"
        rows.add_row(run.name, *(f"{size:,}" for size in sizes), *figures)
    console.print(rows)
    draw(runs, OUT / "accuracy.png")
    say(f"done; the picture is {OUT / 'accuracy.png'}")


class Run:
    """A network in training, and the seconds of its steps."""

    def __init__(self, name, model):
        self.name, self.model, self.seconds = name, model, []
        self.optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)

    def step(self, x, y, lr):
        start = time.perf_counter()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)


def train(runs, train_set):
    """All runs in turns, with a learning rate that falls to zero in a line."""
    steps, done = EPOCHS * (len(train_set[1]) // BATCH), 0
    for epoch in range(EPOCHS):
        for x, y in batches(train_set, epoch, f"epoch {epoch + 1} of {EPOCHS}"):
            for run in random.sample(runs, len(runs)):
                run.step(x, y, 0.03 * (1 - done / steps))
            done += 1


def draw(runs, path):
    """A point for each network: the time of a step, and the accuracy; lines lead from the dense one."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("3SP", "Uniform"):
        points = [run for run in runs if run.name.startswith(("dense", name))]
        axes.plot([run.ms for run in points], [100 * run.accuracy for run in points], "o-", label=name)
    axes.annotate("dense", (runs[0].ms, 100 * runs[0].accuracy), xytext=(-14, -16), textcoords="offset points")
    axes.set(xlabel="ms a training step, median", ylabel="test accuracy, %", xlim=(0, None), ylim=(90, 100))
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
