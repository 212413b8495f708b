"""Pictures: what a cut and a training run look like. matplotlib (the extra ``plots``) draws them as SVG."""

import colorsys
import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from fxprune.budget.staircase import Staircase
from fxprune.report.rows import choose_hue
from fxprune.tables import Pair, format_change, shorten_name
from fxprune.training.log import Log

Points = Sequence[tuple[float, float]]
Colour = tuple[float, float, float]

INK = "#808890"  # reads on a light page and on a dark one
PLAIN: Colour = (0.2, 0.5, 0.85)  # of what belongs to no group
TINY = 1e-12  # stands for zero on a logarithmic scale
LONGEST = 36  # letters of a name beside a bar
LOOK: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fxprune",  # the same picture is the same file
    "text.parse_math": False,  # names may have dollar signs
    "font.family": "sans-serif",
    "font.sans-serif": "DejaVu Sans",  # else every text names a dozen fonts
    "font.size": 10,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw_pictures(
    groups: Mapping[str, Pair],
    log: Log | None,
    stairs: Sequence[Staircase],
    accuracies: Mapping[str, tuple[float, float]],
) -> str:
    """All pictures of a summary as HTML; see ``Summary.to_html``. ``groups``: channels before and after."""
    colours = {name: choose_colour(number) for number, name in enumerate(groups)}
    figures: list[tuple[str, Figure]] = []
    with matplotlib.rc_context(LOOK):
        if groups:
            figures.append(("Channels of each group, before (pale) and after", draw_widths(groups, colours)))
        for staircase in stairs:
            chosen, colour = groups.get(staircase.group, (0, 0))[1], colours.get(staircase.group, PLAIN)
            figures.append(
                (f"Time of the layers of {staircase.group}, by its width", draw_staircase(staircase, chosen, colour))
            )
        if log:
            figures.append(("The training run; dotted lines are cuts", draw_run(log, colours)))
        if accuracies:
            figures.append(("Accuracy against time", draw_tradeoff(accuracies)))
        return f'<div class="pictures">{"".join(embed_figure(title, figure) for title, figure in figures)}</div>'


def draw_widths(groups: Mapping[str, Pair], colours: Mapping[str, Colour]) -> Figure:
    """A pale bar a group for the channels before the cut, with a bar for those after it on top."""
    figure, axes = make_axes(8, 0.7 + 0.22 * len(groups))
    lines, both = range(len(groups)), np.array(list(groups.values()))
    for widths, alpha in zip(both.T, (0.3, 1.0), strict=True):
        axes.barh(lines, widths, color=[colours[name] for name in groups], alpha=alpha)
    for line, pair in enumerate(groups.values()):
        words = axes.annotate(format_change(pair), (pair[0], line), (4, 0), textcoords="offset points", va="center")
        words.set_in_layout(False)  # the margin has room for them, and hundreds would take seconds
    names = [name if len(name) <= LONGEST else f"…{name[-LONGEST:]}" for name in groups]
    axes.margins(x=0.2)
    axes.set(yticks=lines, yticklabels=names, xlabel="channels", ylim=(len(groups) - 0.5, -0.5))
    return figure


def draw_staircase(stairs: Staircase, chosen: float, colour: Colour) -> Figure:
    """Milliseconds by the width of one group; ``chosen``: the width after the cut, marked where it was measured."""
    figure, axes = make_axes(5, 2.6)
    times = 1e3 * np.array(stairs.seconds)
    axes.plot(stairs.widths, times, "o-", ms=3, color=colour)
    if stairs.widths[0] <= chosen <= stairs.widths[-1]:
        place = chosen, float(np.interp(chosen, stairs.widths, times))
        axes.plot(*place, "o", ms=8, color=INK, fillstyle="none")
        axes.annotate("chosen", place, (0, 8), textcoords="offset points", ha="center")
    axes.margins(y=0.2)
    axes.set(xlabel="channels", ylabel="ms", ylim=(0, None))
    return figure


class Panel(NamedTuple):
    """One plot of a training run: lines by their names, of points (epoch, value)."""

    title: str
    lines: Mapping[str, Points]
    from_zero: bool = True
    log: bool = False


def draw_run(log: Log, colours: Mapping[str, Colour]) -> Figure:
    """By epoch: the time of a step, FLOPs, channels and norms of the groups, and the caller's numbers."""
    reported = collect_points((epoch.epoch, epoch.values) for epoch in log)
    norms = collect_points((epoch.epoch, epoch.norms) for epoch in log)
    panels = [
        Panel(
            f"ms a step; {log[-1].saved:,.0f} s saved", {"": [(epoch.epoch, 1e3 * epoch.step_time) for epoch in log]}
        ),
        Panel("FLOPs of a sample", {"": [(epoch.epoch, epoch.flops) for epoch in log]}),
        Panel("channels of each group", collect_points((epoch.epoch, epoch.widths) for epoch in log)),
        Panel("median norm of the channels of each group", norms, log=True),
        *(Panel(name, {"": points}, from_zero=False) for name, points in reported.items()),
    ]
    cuts = [epoch.epoch + 0.5 for epoch in log if epoch.removed and epoch.epoch < log[-1].epoch]
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(10, 2.4 * rows), layout="constrained")
    for number, panel in enumerate(panels, 1):
        draw_panel(figure.add_subplot(rows, 2, number), panel, cuts, colours)
    return figure


def draw_panel(axes: Axes, panel: Panel, cuts: Sequence[float], colours: Mapping[str, Colour]) -> None:
    """The lines of a panel, with a dotted line at each cut."""
    for name, points in panel.lines.items():
        epochs, values = np.transpose(points)
        values = values.clip(TINY) if panel.log else values
        axes.plot(epochs, values, "o-", ms=3, color=colours.get(name, PLAIN))
    for cut in cuts:
        axes.axvline(cut, color=INK, lw=0.8, ls=":")
    axes.set(title=panel.title, xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set(major_formatter=LogFormatter(), minor_formatter=LogFormatter())
    elif panel.from_zero:
        axes.set_ylim(0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1e4 else shorten_name(value))


def draw_tradeoff(accuracies: Mapping[str, tuple[float, float]]) -> Figure:
    """Accuracy against milliseconds, a named point a model."""
    figure, axes = make_axes(5, 2.6)
    for name, (seconds, accuracy) in accuracies.items():
        axes.plot(1e3 * seconds, accuracy, "o", color=PLAIN)
        axes.annotate(name, (1e3 * seconds, accuracy), (6, 4), textcoords="offset points")
    axes.set(xlabel="ms", ylabel="accuracy")
    axes.margins(0.2)
    return figure


def collect_points(records: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, list[tuple[float, float]]]:
    """The line of each name: of the records by epoch, those that have it."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for epoch, values in records:
        for name, value in values.items():
            lines.setdefault(name, []).append((epoch, value))
    return lines


def choose_colour(number: int) -> Colour:
    """The colour of a group, in its hue on the page, neither light nor dark."""
    return colorsys.hls_to_rgb(choose_hue(number) / 360, 0.54, 0.55)


def make_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of one plot, in inches. No process-wide list keeps it, as pyplot's does."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def render_svg(figure: Figure) -> str:
    """The figure as an SVG file on no background."""
    file = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # else the file says when and by what it was made
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts have it, or show a box
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    return file.getvalue()


def embed_figure(title: str, figure: Figure) -> str:
    """The figure as a part of a page, whose text it takes its grey from."""
    with matplotlib.rc_context({"svg.hashsalt": title}):  # ids differ between the pictures of one page
        text = render_svg(figure)
    svg = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :]).replace(INK, "currentColor")
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"
