"""Tables: analyses and summaries in rich tables, for the terminal and for ``print``."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console, RenderableType
from rich.table import Column, Table

from fxprune.budget.cost import marginal
from fxprune.channels.analysis import Analysis
from fxprune.report.bench import Bench
from fxprune.report.summary import Pair, Summary, layers_of
from fxprune.rewrite.restore import Restoration

UNITS = {"flops": "FLOPs", "params": "parameters", "memory": "memory", "channels": "channels"}


def render_text(*parts: RenderableType) -> str:
    """Tables as plain text, as wide as they need."""
    console = Console(file=io.StringIO(), width=1000, color_system=None, force_terminal=False)
    for part in parts:
        console.print(part)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines)


def layers_table(summary: Summary) -> Table:
    """A row a layer: the channels that it reads and writes, its parameters and FLOPs, before and after."""
    heads = ["inputs", "outputs", "parameters", "FLOPs", "left", *["ms", "left"][: 2 * (summary.bench is not None)]]
    rows = []
    for each in summary.layers:
        row = [each.name, each.kind, *map(format_change, (each.inputs, each.outputs, each.params, each.flops))]
        row.append(format_share(each.flops))
        if summary.bench is not None:
            seconds = summary.bench.layers.get(each.name, (0.0, 0.0))
            row += [" → ".join(map(format_milliseconds, seconds)), format_share(seconds)]
        rows.append(row)
    return make_table(("layer", "kind"), heads, rows)


def totals_table(summary: Summary) -> Table:
    """A row for each cost of the whole model."""
    rows = [
        (UNITS[kind], *(format_amount(kind, value) for value in both), format_share(both))
        for kind, both in summary.totals.items()
    ]
    for each in summary.bench.rows if summary.bench is not None else ():
        if each.before is not None and each.after is not None and each.ratio is not None:
            times = (format_milliseconds(its.median) for its in (each.before, each.after))
            rows.append((f"ms, {each.backend}, batch {each.batch}", *times, f"{each.ratio.median:.0%}"))
    if summary.accuracy is not None:
        rows.append(("accuracy", *(f"{each:.1%}" for each in summary.accuracy), ""))
    return make_table(("",), ("before", "after", "left"), rows)


def bench_table(bench: Bench) -> Table:
    """A row a backend and batch size: milliseconds, what is left of them beside what is left of the FLOPs."""
    left = format_share(bench.flops)
    rows = []
    for each in bench.rows:
        if each.before is None or each.after is None or each.ratio is None:
            rows.append((each.backend, str(each.batch), each.problem or "not measured", "", "", "", ""))
            continue
        efficiency = "" if each.efficiency is None else f"{each.efficiency:.2f}"
        spread = f"{each.ratio.median:.0%} ({each.ratio.low:.0%} – {each.ratio.high:.0%})"
        times = (format_milliseconds(each.before.median), format_milliseconds(each.after.median))
        rows.append((each.backend, str(each.batch), *times, spread, left, efficiency))
    heads = ("batch", "before, ms", "after, ms", "time left (quartiles)", "FLOPs left", "efficiency")
    return make_table(("backend",), heads, rows)


def idle_table(idle: Mapping[str, tuple[float, float]], what: str = "layers") -> Table:
    """The groups or layers that saved FLOPs but hardly any time."""
    rows = [(name, f"{flops:.0%}", f"{seconds:.0%}") for name, (flops, seconds) in idle.items()]
    return make_table((f"{what} that save FLOPs but hardly any time",), ("FLOPs left", "time left"), rows)


def groups_table(analysis: Analysis) -> Table:
    """A row a group: its channels, the layers that they go through, and what one of them costs."""
    costs = {kind: marginal(analysis, kind) for kind in ("flops", "params")}
    rows = []
    for group in analysis.groups.values():
        paths = layers_of(group)
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        each = (float(np.mean(costs[kind][group.name])) for kind in costs)
        rows.append((group.name, ", ".join(paths[:3]) + more, str(group.size), *map(shorten_name, each)))
    return make_table(("group", "goes through"), ("channels", "FLOPs each", "parameters each"), rows)


def frozen_table(analysis: Analysis) -> Table:
    """A row a reason: how many axes it froze, and where it arose."""
    found: dict[str, list[Any]] = {}
    for frozen in analysis.frozen:
        found.setdefault(frozen.reason.text, []).append(frozen)
    rows = [
        (reason, ", ".join(f"{each.parameter}[{each.axis}]" for each in its[:3]), str(len(its)))
        for reason, its in found.items()
    ]
    return make_table(("frozen, because", "for example"), ("axes",), rows)


def restoration_table(restoration: Restoration) -> Table:
    """A row a layer: how far its output was from the original's, how far it is, and what was done."""
    rows = [(layer.name, layer.outcome, f"{layer.before:.2%}", f"{layer.after:.2%}") for layer in restoration.layers]
    return make_table(("layer", "outcome"), ("error, cut", "error, restored"), rows)


def make_table(words: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table with columns of words at the left and of numbers at the right."""
    columns = [Column(name, overflow="fold") for name in words]
    columns += [Column(name, justify="right", no_wrap=True) for name in numbers]
    result = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        result.add_row(*row)
    return result


def format_change(both: Pair) -> str:
    """Two numbers as "64 → 48", one where they are the same."""
    before, after = map(shorten_name, both)
    return before if both[0] == both[1] else f"{before} → {after}"


def format_share(both: Pair) -> str:
    """What is left, in percent."""
    return f"{both[1] / both[0]:.0%}" if both[0] else ""


def format_amount(kind: str, value: float) -> str:
    """A cost with its unit."""
    return f"{value / 1e6:,.1f} MB" if kind == "memory" else f"{value:,.0f}"


def format_milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, in three digits at least."""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def shorten_name(value: float) -> str:
    """A number in four digits: 512, 9.44 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{value:.0f}"
