"""Train resnet18 on handwritten digits, prune it to half its FLOPs, prove the cut exact, fine-tune, export to ONNX.

About a minute on one CPU core. The ONNX files and a picture of the widths are left in out/quickstart/."""

import time
from pathlib import Path
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
from torch.optim.swa_utils import update_bn
from torchvision.models import resnet18

import fxprune
from fxprune import passes

OUT = Path("out/quickstart")
BATCH = 64
console = Console(highlight=False)
start = time.perf_counter()


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    train_set, test_set = digits()
    example = test_set[0][:BATCH]

    dense = fxprune.trace(resnet18(weights=None, num_classes=10), example)
    optimizer = torch.optim.SGD(dense.parameters(), momentum=0.9, weight_decay=5e-4)
    train(dense, optimizer, *train_set, epochs=12, lr=0.03)
    before = accuracy(dense, test_set)
    say(f"trained resnet18 on {len(train_set[0])} digits; it recognises {before:.1%} of {len(test_set[0])} others")

    analysis = fxprune.analyze(dense, example)
    plan = passes.Magnitude(p=2).plan(analysis, fxprune.Budget(flops=0.5))
    compact, param_map = fxprune.rewrite(dense, analysis, plan)
    say(f"pruned {sum(plan.sizes.values())} channels to {sum(plan.widths.values())} in {len(plan.sizes)} groups")
    say(fxprune.verify(dense, compact, param_map, example))
    draw_widths(analysis, plan, OUT / "widths.png")

    cut = accuracy(compact, test_set)
    update_bn(train_set[0].split(BATCH), compact)  # BatchNorm's averages are still those of the dense model
    renewed = accuracy(compact, test_set)
    param_map.migrate(optimizer)  # the same optimizer goes on, with the momentum of the channels that stay
    train(compact, optimizer, *train_set, epochs=6, lr=0.02)
    after = accuracy(compact, test_set)
    say(f"fine-tuned; {cut:.1%} right after the cut, {renewed:.1%} with new BatchNorm averages, {after:.1%} now")

    models = {"dense": dense, "compact": compact}
    in_onnx = [export(model, example, OUT / f"{name}.onnx") for name, model in models.items()]
    times = milliseconds([*models.values(), *in_onnx], example)

    sizes = [(OUT / f"{name}.onnx").stat().st_size for name in models]
    table = Table("", *(Column(name, justify="right") for name in (*models, "ratio")), caption_justify="left")
    table.caption = f"ms: a batch of {BATCH}, one CPU thread, median of 30; compact: 6 more epochs"
    row(table, "parameters", "{:,}", *map(fxprune.cost.params, models.values()))
    row(table, "FLOPs an image", "{:,}", *(fxprune.cost.flops(model, example[:1]) for model in models.values()))
    row(table, "ONNX file, bytes", "{:,}", *sizes)
    row(table, "PyTorch, ms", "{:.1f}", *times[:2])
    row(table, "onnxruntime, ms", "{:.1f}", *times[2:])
    table.add_section()
    row(table, "accuracy before the cut", "{:.1%}", before)
    row(table, "accuracy right after the cut", "{:.1%}", None, cut)
    row(table, "accuracy with new BatchNorm averages", "{:.1%}", None, renewed)
    row(table, "accuracy after fine-tuning", "{:.1%}", None, after)
    row(table, "accuracy in onnxruntime", "{:.1%}", *(accuracy(run, test_set) for run in in_onnx))
    console.print(table)
    say(f"done; the ONNX files and widths.png are in {OUT}")


def digits():
    """Training and test set, each (images: float[n, 3, 32, 32], labels: int64[n])."""
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = F.interpolate(images.float().reshape(-1, 1, 8, 8), size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    x, test_x, y, test_y = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    return ((x - x.mean()) / x.std(), y), ((test_x - x.mean()) / x.std(), test_y)


def train(model, optimizer, x, y, epochs, lr):
    """Train with a learning rate that falls from ``lr`` to zero in a line; leave ``model`` in eval mode."""
    batches = [batch for _ in range(epochs) for batch in torch.randperm(len(y)).split(BATCH) if len(batch) == BATCH]
    bar = track(batches, f"{epochs} epochs", console=console, transient=True, disable=not console.is_terminal)
    model.train()
    for step, batch in enumerate(bar):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / len(batches))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model, data):
    """The fraction of ``data`` that ``model`` gets right."""
    return (model(data[0]).argmax(1) == data[1]).float().mean().item()


def export(model, example, path):
    """Write the ONNX file, compared with PyTorch on the way; returns it as a function of a batch, on one thread."""
    say(fxprune.export_onnx(model, example, path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@torch.no_grad()
def milliseconds(functions, example):
    """The median time of each function; they take turns, so that a busy machine slows all alike."""
    turns = [[timeit(lambda run=run: run(example), number=1) for run in functions] for _ in range(35)]
    return [1e3 * median(seconds) for seconds in zip(*turns[5:], strict=True)]  # the first five are warm-up


def row(table, what, form, dense=None, compact=None):
    cells = ["" if value is None else form.format(value) for value in (dense, compact)]
    table.add_row(what, *cells, f"{compact / dense:.2f}" if all(cells) and "%" not in form else "")


def draw_widths(analysis, plan, path):
    """A pair of bars for each group, coloured by stage: its channels before (pale) and after."""
    colours = ["C" + str(group).split("layer")[1][0] for group in analysis.groups.values()]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for shift, widths, alpha in ((-0.2, plan.sizes, 0.35), (0.2, plan.widths, 1.0)):
        at = [line + shift for line in range(len(widths))]
        axes.bar_label(axes.barh(at, widths.values(), 0.38, color=colours, alpha=alpha), padding=3, fontsize=8)
    axes.set(yticks=range(len(plan.sizes)), yticklabels=plan.sizes)
    axes.set_xlabel("channels before (pale) and after the cut, by group; a group is named after its first layer")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def say(text):
    console.print(f"{time.perf_counter() - start:4.0f} s  {text}", soft_wrap=True)


if __name__ == "__main__":
    main()
