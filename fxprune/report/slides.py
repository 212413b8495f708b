"""Slides: the pictures of a cut and of a training run, as HTML that stands above the graph of the model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

import numpy as np

from fxprune.budget.staircase import Staircase
from fxprune.report.charts import Series, figure
from fxprune.report.picture import breakable
from fxprune.report.summary import Pair, Summary
from fxprune.report.tables import UNITS, format_amount, format_change, format_milliseconds, format_share, shorten_name
from fxprune.training.log import Log

SHOWN = 12  # lines in one chart


def pictures(
    summary: Summary,
    log: Log | None,
    stairs: Sequence[Staircase],
    accuracies: Mapping[str, tuple[float, float]],
) -> str:
    """Everything there is to see; see ``Summary.to_html``."""
    number = {name: f"g g{at}" for at, name in enumerate(summary.groups)}
    drawn = [*runs(log, number), *(staircase(each, summary, number) for each in stairs), tradeoff(accuracies)]
    charts = "".join(filter(None, drawn))
    measured = f'<h2>Measured</h2><div class="charts">{charts}</div>' if charts else ""
    return (
        f'<div class="pictures">{tiles(summary)}{facts(summary)}'
        f"<h2>Widths before (pale) and after</h2>{widths(summary, number)}"
        f"{measured}{times(summary)}{layers(summary)}</div>"
    )


def tiles(summary: Summary) -> str:
    """What is left of each cost, in large figures."""
    cells = [
        (
            UNITS[kind],
            format_share(both),
            " → ".join(format_amount(kind, each) if kind == "memory" else shorten_name(each) for each in both),
        )
        for kind, both in summary.totals.items()
    ]
    cells[1:1] = [
        (
            f"time, {each.backend}, batch {each.batch}",
            f"{each.ratio.median:.0%}",
            f"{format_milliseconds(each.before.median)} → {format_milliseconds(each.after.median)} ms",
        )
        for each in (summary.bench.rows if summary.bench else ())
        if each.before is not None and each.after is not None and each.ratio is not None
    ]
    if summary.accuracy is not None:
        before, after = summary.accuracy
        cells.append(("accuracy", f"{after:.1%}", f"before: {before:.1%}"))
    html = "".join(
        f'<div class="tile"><span>{escape(what)}</span><b>{left}</b><span>{escape(both)}</span></div>'
        for what, left, both in cells
    )
    return f'<div class="tiles">{html}</div>'


def facts(summary: Summary) -> str:
    """What was said about the cut in words."""
    lines = "".join(f"<dt>{escape(title)}</dt><dd>{escape(words)}</dd>" for title, words in summary.about.items())
    return f'<dl class="facts">{lines}</dl>' if lines else ""


def widths(summary: Summary, colours: Mapping[str, str]) -> str:
    """A pair of bars a group: before, pale, and after; the length is the square root of the channels."""
    longest = math.sqrt(max((before for before, _ in summary.groups.values()), default=1) or 1)
    rows = []
    for name, (before, after) in summary.groups.items():
        bars = "".join(
            f'<b class="{colours[name]}" style="width:{100 * math.sqrt(width) / longest:.1f}%"></b>'
            for width in (before, after)
        )
        of = colours[name].split()[-1]
        rows.append(
            f'<code>{breakable(name)}</code><div class="both" data-of="{of}" title="{escape(name)}: {before:g} → '
            f'{after:g}">{bars}</div><span>{format_change((before, after))}</span>'
        )
    return f'<div class="widths">{"".join(rows)}</div>'


def runs(log: Log | None, colours: Mapping[str, str]) -> Iterator[str]:
    """The charts of a training run by epoch; dotted lines are cuts."""
    if log is None or not len(log):
        return
    cuts = [each.epoch + 0.5 for each in log if each.removed and each.epoch < log[-1].epoch]
    saved = log[-1].saved
    yield figure(
        f"Time of a training step; {saved:,.0f} s saved" if saved > 0.5 else "Time of a training step",
        [Series("", [(each.epoch, each.step_time * 1e3) for each in log])],
        "epoch",
        "ms",
        cuts=cuts,
    )
    yield figure(
        "FLOPs of a sample", [Series("", [(each.epoch, each.flops) for each in log], "s1")], "epoch", "FLOPs", cuts=cuts
    )
    groups = {group: [(each.epoch, each.widths.get(group, 0)) for each in log] for group in log[0].widths}
    yield figure(
        "Channels of each group",
        [Series(name, its, colours.get(name, "s0")) for name, its in groups.items()],
        "epoch",
        "channels",
        cuts=cuts,
        legend=len(groups) <= SHOWN,
    )
    norms = {group: [(each.epoch, each.norms[group]) for each in log if group in each.norms] for group in log[0].norms}
    yield figure(
        "Median norm of the channels of each group",
        [Series(name, its, colours.get(name, "s0")) for name, its in norms.items()],
        "epoch",
        "norm",
        cuts=cuts,
        log=True,
        legend=len(norms) <= SHOWN,
    )
    for name in dict.fromkeys(name for each in log for name in each.values):
        its = [(each.epoch, each.values[name]) for each in log if name in each.values]
        yield figure(name, [Series("", its, "s2")], "epoch", name, cuts=cuts, from_zero=False)


def staircase(stairs: Staircase, summary: Summary, colours: Mapping[str, str]) -> str:
    """Time against width for one group, with the width that was chosen."""
    points = [(width, seconds * 1e3) for width, seconds in zip(stairs.widths, stairs.seconds, strict=True)]
    series = [Series("", points, colours.get(stairs.group, "s0"))]
    chosen = summary.groups.get(stairs.group, (0.0, 0.0))[1]
    if stairs.widths[0] <= chosen <= stairs.widths[-1]:
        at = float(np.interp(chosen, stairs.widths, stairs.seconds)) * 1e3
        series.append(Series("chosen", [(chosen, at)], "s1", line=False, labels=["chosen"]))
    return figure(f"Time of the layers of group {stairs.group}, by its width", series, "channels", "ms")


def tradeoff(accuracies: Mapping[str, tuple[float, float]]) -> str:
    """Accuracy against measured time."""
    series = [
        Series(name, [(seconds * 1e3, accuracy)], f"s{at % 4}", line=False, labels=[name])
        for at, (name, (seconds, accuracy)) in enumerate(accuracies.items())
    ]
    return figure("Accuracy against time", series, "ms", "accuracy", from_zero=False)


def times(summary: Summary) -> str:
    """The table of what was timed, and what saves FLOPs but hardly any time."""
    bench = summary.bench
    if bench is None:
        return ""
    rows = [
        [
            each.backend,
            str(each.batch),
            format_milliseconds(each.before.median),
            format_milliseconds(each.after.median),
            f"{each.ratio.median:.0%}",
            "" if each.efficiency is None else f"{each.efficiency:.2f}",
        ]
        for each in bench.rows
        if each.before is not None and each.after is not None and each.ratio is not None
    ]
    idle = [[name, f"{flops:.0%}", f"{seconds:.0%}"] for name, (flops, seconds) in bench.idle(summary.paths()).items()]
    return table("Time", ["backend", "batch", "before, ms", "after, ms", "left", "efficiency"], rows, True) + table(
        "Groups that save FLOPs but hardly any time", ["group", "FLOPs left", "time left"], idle, True
    )


def layers(summary: Summary) -> str:
    """The table by layer."""
    timed = summary.bench.layers if summary.bench else {}
    rows = []
    for each in summary.layers:
        row = [each.name, each.kind, *map(format_change, (each.inputs, each.outputs, each.params, each.flops))]
        seconds: Pair = timed.get(each.name, (0.0, 0.0))
        rows.append([*row, " → ".join(map(format_milliseconds, seconds))] if timed else row)
    heads = ["layer", "kind", "inputs", "outputs", "parameters", "FLOPs", "ms"]
    return table("Layers", heads if timed else heads[:-1], rows, len(rows) <= 25)


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], is_open: bool) -> str:
    """A table that folds; nothing where it has no rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<details class="fold-table"{" open" if is_open else ""}><summary>{escape(title)}</summary>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )
