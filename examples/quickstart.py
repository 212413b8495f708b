"""Train resnet18 on handwritten digits with PruneTrain: the network gets smaller while it trains. Then ONNX.

The dense network is trained beside it, on the same batches and in turns, so that the times compare. About two minutes
on one CPU core. The ONNX files, and pictures of the run and of the widths, are left in out/quickstart/."""

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
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn
from torchvision.models import resnet18

import fxprune
from fxprune import passes

OUT = Path("out/quickstart")
EPOCHS, BATCH = 14, 64
# The method was made for 70,000 steps. Here are 294, so the penalty is that much stronger, and the step proximal.
PRUNER = passes.PruneTrain(ratio=0.993, interval=2, proximal=True, round_to=16)
console = Console(highlight=False)
start = time.perf_counter()


def main():
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # weights on their way to zero pass through numbers that a CPU is slow at
    OUT.mkdir(parents=True, exist_ok=True)
    train_set, test_set = digits()
    example = test_set[0][:BATCH]

    # Each with a learning rate that suits it. Batch norm makes the scale of the weights before it free: PruneTrain
    # begins with small ones, which reach zero sooner, and its rate falls faster, since a step turns small ones more.
    runs = {
        "dense": Run([], example, 1.0, lambda done: 0.03 * (1 - done)),
        "PruneTrain": Run([PRUNER], example, 0.2, lambda done: 0.03 * (1 - done) ** 3),
    }
    dense, pruned = runs.values()
    say(f"training resnet18 on {len(train_set[0])} digits twice, in turns; {len(test_set[0])} others are the test")
    for epoch in range(EPOCHS):
        for name, run in runs.items():
            run.epoch(train_set, test_set, f"epoch {epoch + 1} of {EPOCHS}, {name}")
        say(f"epoch {epoch + 1:2}  dense {dense.last()}  PruneTrain {pruned.last()}")
    cuts = [record for record in pruned.session.log if record.removed]
    before, after = dense.session.analysis.sizes, pruned.session.analysis.sizes
    say(
        f"{len(cuts)} cuts took {sum(before.values()) - sum(after.values())} of {sum(before.values())} channels, "
        f"{len(before) - len(after)} of {len(before)} groups whole; "
        "each cut was proved in float64, before it was made, to change nothing but what it removed"
    )

    for name, run in runs.items():
        update_bn(train_set[0].split(BATCH), run.model)
        run.export(example, OUT / f"{name}.onnx")
    in_onnx = [run.in_onnx for run in runs.values()]
    times = milliseconds([dense.model, pruned.model, *in_onnx], example)

    table = Table("", *(Column(name, justify="right") for name in (*runs, "ratio")), caption_justify="left")
    table.caption = f"ms: a batch of {BATCH}, one CPU thread, median of 30"
    row(table, "parameters", "{:,}", *(fxprune.cost.params(run.model) for run in runs.values()))
    row(table, "FLOPs an image", "{:,}", *(fxprune.cost.flops(run.model, example[:1]) for run in runs.values()))
    row(table, "ONNX file, bytes", "{:,}", *(run.path.stat().st_size for run in runs.values()))
    row(table, "PyTorch, ms", "{:.1f}", *times[:2])
    row(table, "onnxruntime, ms", "{:.1f}", *times[2:])
    table.add_section()
    row(table, f"training FLOPs, {EPOCHS} epochs", "{:.3g}", *(run.flops() for run in runs.values()))
    row(table, f"training time, {EPOCHS} epochs, s", "{:.1f}", *(run.seconds for run in runs.values()))
    row(table, "of that, cuts and their proofs, s", "{:.1f}", *(run.cutting() for run in runs.values()))
    table.add_section()
    row(table, "test accuracy", "{:.1%}", *(accuracy(run.model, test_set) for run in runs.values()))
    row(table, "test accuracy in onnxruntime", "{:.1%}", *(accuracy(run, test_set) for run in in_onnx))
    console.print(table)
    pruned.session.log.plot(OUT / "timeline.png")
    draw_widths(before, after, OUT / "widths.png")
    say(f"done; the ONNX files, timeline.png and widths.png are in {OUT}")


class Run:
    """A network in training: its session, the seconds that training took, and what it is in ONNX."""

    def __init__(self, pruners, example, scale, rate):
        """``scale``: of the first weights of the convolutions. ``rate``: learning rate by the share of the run done."""
        torch.manual_seed(0)  # the same weights for both
        model = resnet18(weights=None, num_classes=10, zero_init_residual=True)
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.data *= scale
        optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9, weight_decay=5e-4)
        self.scheduler = LambdaLR(optimizer, lambda epoch: rate(epoch / EPOCHS))
        self.session = fxprune.Session(
            model, example[:2], optimizer, pruners, batch_size=BATCH, verify=True, progress=False
        )
        self.session.register(scheduler=self.scheduler)
        self.model = self.session.model
        self.seconds = 0.0

    def epoch(self, train_set, test_set, name):
        """Train for one epoch, test, and cut."""
        session, (x, y) = self.session, train_set
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(session.epoch)).split(BATCH)[:-1]
        batches = track(order, name, console=console, transient=True, disable=not console.is_terminal)
        self.model.train()
        begin = time.perf_counter()
        for batch in batches:
            session.optimizer.zero_grad()
            task = F.cross_entropy(self.model(x[batch]), y[batch])
            (task + session.penalty(task)).backward()
            session.optimizer.step()
        trained = time.perf_counter()
        self.model.eval()
        update_bn(x.split(BATCH)[:8], self.model)  # its averages are still those of larger weights
        accurate = accuracy(self.model, test_set)
        tested = time.perf_counter()
        session.epoch_end(accuracy=accurate)
        self.scheduler.step()
        self.seconds += trained - begin + time.perf_counter() - tested

    def last(self):
        """The last epoch in words."""
        record = self.session.log[-1]
        cut = f", {record.removed} channels cut" if record.removed else ""
        return f"{record.values['accuracy']:6.1%} at {record.flops / 1e6:.1f} MFLOPs{cut}"

    def flops(self):
        """Of the whole training: a backward pass is twice a forward pass."""
        return sum(3 * record.flops * record.steps * BATCH for record in self.session.log)

    def cutting(self):
        """Seconds that the cuts took, with their proofs."""
        return sum(record.cut_time for record in self.session.log)

    def export(self, example, path):
        """Write the ONNX file, compared with PyTorch on the way; ``in_onnx`` runs it on a batch, on one thread."""
        say(fxprune.export_onnx(self.model, example, path))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        onnx = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.path, self.in_onnx = path, lambda x: torch.from_numpy(onnx.run(None, {"x": x.numpy()})[0])


def digits():
    """Training and test set, each (images: float[n, 3, 32, 32], labels: int64[n])."""
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = F.interpolate(images.float().reshape(-1, 1, 8, 8), size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    x, test_x, y, test_y = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    return ((x - x.mean()) / x.std(), y), ((test_x - x.mean()) / x.std(), test_y)


@torch.no_grad()
def accuracy(model, data):
    """The fraction of ``data`` that ``model`` gets right."""
    return (model(data[0]).argmax(1) == data[1]).float().mean().item()


@torch.no_grad()
def milliseconds(functions, example):
    """The median time of each function; they take turns, so that a busy machine slows all alike."""
    turns = [[timeit(lambda run=run: run(example), number=1) for run in functions] for _ in range(35)]
    return [1e3 * median(seconds) for seconds in zip(*turns[5:], strict=True)]  # the first five are warm-up


def row(table, what, form, dense, pruned):
    ratio = f"{pruned / dense:.2f}" if dense and "%" not in form else ""
    table.add_row(what, form.format(dense), form.format(pruned), ratio)


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


def say(text):
    console.print(f"{time.perf_counter() - start:4.0f} s  {text}", soft_wrap=True)


if __name__ == "__main__":
    main()
