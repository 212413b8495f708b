"""What the examples share: handwritten digits, a training loop, and how accuracy and time are measured.

With ``--quick`` every example takes few images, one epoch and few turns: which shows that it works, no more."""

import sys
import time
from statistics import median
from timeit import timeit

import onnxruntime
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

BATCH = 64
console = Console(highlight=False)
start = time.perf_counter()


def few(number, instead=1):
    """``number``, or with --quick ``instead``."""
    return instead if "--quick" in sys.argv else number


def digits():
    """Training and test set, each (images: float[n, 3, 32, 32], labels: int64[n])."""
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = F.interpolate(images.float().reshape(-1, 1, 8, 8), size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    x, test_x, y, test_y = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    size = few(len(y), 3 * BATCH)
    mean, std = x.mean(), x.std()
    return ((x[:size] - mean) / std, y[:size]), ((test_x[:size] - mean) / std, test_y[:size])


def batches(train_set, seed, name=""):
    """The whole batches of one epoch, in the order that ``seed`` gives, with a bar on a terminal."""
    x, y = train_set
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).split(BATCH)
    full = order[: len(y) // BATCH]
    for batch in track(full, name, console=console, transient=True, disable=not console.is_terminal):
        yield x[batch], y[batch]


def train(model, optimizer, train_set, epochs, lr):
    """A plain training, with a learning rate from ``lr`` to zero in a line; leaves ``model`` in eval mode."""
    epochs, done = few(epochs), 0
    steps = epochs * (len(train_set[1]) // BATCH)
    model.train()
    for epoch in range(epochs):
        for x, y in batches(train_set, epoch, f"epoch {epoch + 1} of {epochs}"):
            optimizer.param_groups[0]["lr"] = lr * (1 - done / steps)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            done += 1
    model.eval()


@torch.no_grad()
def accuracy(model, data):
    """The fraction of ``data`` that ``model`` gets right."""
    return (model(data[0]).argmax(1) == data[1]).float().mean().item()


@torch.no_grad()
def milliseconds(functions, example):
    """The median time of each function; they take turns, so that a busy machine slows all alike."""
    turns = [[timeit(lambda run=run: run(example), number=1) for run in functions] for _ in range(few(35, 7))]
    return [1e3 * median(seconds) for seconds in zip(*turns[5:], strict=True)]  # the first five are warm-up


def in_onnxruntime(path):
    """The network in an ONNX file as a function of a batch, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def table(*names, caption=None):
    """A table whose first column has the names of the rows."""
    columns = (Column(name, justify="right") for name in names)
    return Table("", *columns, caption=caption, caption_justify="left")


def say(text):
    console.print(f"{time.perf_counter() - start:4.0f} s  {text}", soft_wrap=True)


def compare(rows, label, form, dense, pruned):
    """Add a row with two numbers and, unless they are shares, their ratio."""
    ratio = f"{pruned / dense:.2f}" if dense and "%" not in form else ""
    rows.add_row(label, form.format(dense), form.format(pruned), ratio)


def draw_widths(before, after, path):
    """A pair of bars for each group, coloured by stage: its channels before (pale) and after."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    colours = [f"C{group[5]}" if group.startswith("layer") else "C0" for group in before]
    for shift, widths, alpha in ((-0.2, before, 0.35), (0.2, after, 1.0)):
        at = [line + shift for line in range(len(before))]
        left = [widths.get(group, 0) for group in before]
        axes.bar_label(axes.barh(at, left, 0.38, color=colours, alpha=alpha), padding=3, fontsize=8)
    axes.set(yticks=range(len(before)), yticklabels=before)
    axes.set_xlabel("channels before (pale) and after training, by group; a group is named after its first layer")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
