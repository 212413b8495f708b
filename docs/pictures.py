"""The pictures of the documentation, drawn from models and from the results of the benchmarks. Each returns SVG."""

import json
from pathlib import Path

import matplotlib
import torch
import torchvision
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

import fxprune
from fxprune import passes
from fxprune.report.pictures import INK, LOOK, draw_widths, render_svg

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
COLOURS = ("#2a78d6", "#e0742d", "#1d9a7b")


def axes_of(width, height, count=1):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, count)


class Block(nn.Module):
    """A residual block between a stem and a classifier: what the coupling is shown on."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(torch.relu(self.a(x)))
        return self.fc(x.mean((2, 3)))


def coupling():
    """The weights of a residual block as matrices: above before a cut, below after it."""
    torch.manual_seed(0)
    example = torch.randn(1, 3, 8, 8)
    graph = fxprune.trace(Block(), example)
    analysis = fxprune.analyze(graph, example)
    plan = fxprune.Plan({"stem": [0, 2, 3, 5], "a": [0, 1, 3]}, analysis.sizes)
    compact, param_map = fxprune.rewrite(graph, analysis, plan)

    sides = {}  # of each weight and axis: the colour of every position
    for group, colour in zip(analysis.groups.values(), COLOURS, strict=False):
        for member in group.members:
            sides[member.parameter, member.axis] = colour
    names = [name for name, parameter in graph.named_parameters() if parameter.ndim > 1]
    figure, axes = axes_of(7, 4.4)
    left = 0.0
    for name in names:
        rows, columns = graph.get_parameter(name).shape[:2]
        kept = [
            set(range(size)) if ids is None else set(ids.tolist())
            for size, ids in zip((rows, columns), param_map[name], strict=False)
        ]
        matrix(axes, left, 0, rows, columns, kept, [sides.get((name, axis), INK) for axis in (0, 1)])
        axes.text(left, 1.9, name, fontsize=10)
        new_rows, new_columns = compact.get_parameter(name).shape[:2]
        matrix(axes, left, -9, new_rows, new_columns, None, [sides.get((name, axis), INK) for axis in (0, 1)])
        axes.text(left, -14.2, f"{rows} × {columns} → {new_rows} × {new_columns}", fontsize=10)
        left += columns + 3
    axes.text(-2.6, 3.4, "One colour is one group. Pale: what a plan removes.", fontsize=10)
    axes.text(-2.6, -7, "after the rewrite:", fontsize=10)
    axes.set(xlim=(-2.8, left), ylim=(-14.6, 4.4), aspect="equal")
    axes.axis("off")
    return render_svg(figure)


def matrix(axes, left, top, rows, columns, kept, colours):
    """Cells, with a bar of its colour beside each row and above each column."""
    for row in range(rows):
        for column in range(columns):
            stays = kept is None or (row in kept[0] and column in kept[1])
            axes.add_patch(
                Rectangle((left + column, top - row), 0.9, 0.9, color=INK, lw=0, alpha=0.75 if stays else 0.15)
            )
    for row in range(rows):
        alpha = 1 if kept is None or row in kept[0] else 0.25
        axes.add_patch(Rectangle((left - 0.65, top - row), 0.4, 0.9, color=colours[0], lw=0, alpha=alpha))
    for column in range(columns):
        alpha = 1 if kept is None or column in kept[1] else 0.25
        axes.add_patch(Rectangle((left + column, top + 1.15), 0.9, 0.4, color=colours[1], lw=0, alpha=alpha))


def widths():
    """ResNet-18 at half its FLOPs: the channels of each group before (pale) and after, by stage."""
    torch.manual_seed(0)
    example = torch.randn(1, 3, 64, 64)
    analysis = fxprune.analyze(torchvision.models.resnet18(), example)
    after = passes.Magnitude().plan(analysis, fxprune.Budget(flops=0.5)).widths
    groups = {name: (size, after[name]) for name, size in analysis.sizes.items()}
    colours = {name: COLOURS[int(name[5]) % 3] if name.startswith("layer") else COLOURS[0] for name in groups}
    return render_svg(draw_widths(groups, colours))


def before_training():
    """Accuracy against the time of a step, for each method, on both networks."""
    networks = result("before_training")["results"]
    figure, both = axes_of(8, 3.6, len(networks))
    for axes, (network, results) in zip(both, networks.items(), strict=True):
        rows = results["rows"]
        for name, colour in zip(("3SP", "Uniform", "Random"), COLOURS, strict=True):
            points = [row for row in rows if row["model"].split()[0] in ("dense", name)]
            x, y = [1e3 * row["step"] for row in points], [100 * row["accuracy"] for row in points]
            axes.plot(x, y, "o-", color=colour, label=name, ms=4)
        axes.annotate(
            "dense", (1e3 * rows[0]["step"], 100 * rows[0]["accuracy"]), xytext=(-14, 8), textcoords="offset points"
        )
        axes.set(title=network, xlabel="ms a training step", ylabel="test accuracy, %", xlim=(0, None))
    both[0].legend(frameon=False)
    return render_svg(figure)


def activation_density():
    """The run on CIFAR-10: MACs and accuracy by epoch, the dense network beside it."""
    epochs = result("activation_density")["epochs"]
    figure, (macs, accuracy) = axes_of(8, 3.2, 2)
    for name, colour in zip(("dense", "activation_density"), (INK, COLOURS[0]), strict=True):
        records = epochs[name]
        x = [record["epoch"] for record in records]
        macs.step(x, [record["flops"] / 2e6 for record in records], where="mid", color=colour)
        label = name.replace("_", " ")
        accuracy.plot(x, [100 * record["values"]["accuracy"] for record in records], color=colour, label=label)
    macs.set(xlabel="epoch", ylabel="MMACs an image", ylim=(0, None))
    accuracy.set(xlabel="epoch", ylabel="test accuracy, %")
    accuracy.legend(frameon=False)
    return render_svg(figure)


def dropback():
    """Accuracy against the size of the file, for each budget."""
    runs = result("dropback")["runs"]
    figure, axes = axes_of(6, 3.4)
    axes.plot(
        [run["bytes"] / 1e6 for run in runs.values()],
        [100 * run["accuracy"] for run in runs.values()],
        "o-",
        color=COLOURS[0],
    )
    for name, run in runs.items():
        axes.annotate(name, (run["bytes"] / 1e6, 100 * run["accuracy"]), xytext=(6, -12), textcoords="offset points")
    axes.set(xlabel="file, MB", ylabel="test accuracy, %", xlim=(0, None))
    return render_svg(figure)


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def in_the_look(draw):
    def drawn():
        with matplotlib.rc_context(LOOK):
            return draw()

    return drawn


DRAWINGS = (coupling, widths, before_training, activation_density, dropback)
PICTURES = {draw.__name__: in_the_look(draw) for draw in DRAWINGS}
