"""Tables: rich tables of words and numbers, for the terminal, for ``print`` and for the page."""

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table  # rich is loaded when the first table is made

Pair = tuple[float, float]  # before, after

UNITS = {"flops": "FLOPs", "params": "parameters", "memory": "memory", "channels": "channels"}


def render_text(*parts: "RenderableType") -> str:
    """Tables as plain text, as wide as they need."""
    from rich.console import Console

    file = io.StringIO()
    console = Console(file=file, width=1000, color_system=None, force_terminal=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def render_html(title: str, table: "Table", is_open: bool = True) -> str:
    """A table that folds, as HTML; nothing where it has no rows."""
    if not table.row_count:
        return ""
    head = "".join(f"<th>{escape(str(column.header))}</th>" for column in table.columns)
    rows = zip(*(column.cells for column in table.columns), strict=True)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<details class="fold-table"{" open" if is_open else ""}><summary>{escape(title)}</summary>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )


def render_facts(facts: Mapping[str, str]) -> str:
    """Words by their titles, as HTML."""
    lines = "".join(f"<dt>{escape(title)}</dt><dd>{escape(words)}</dd>" for title, words in facts.items())
    return f'<dl class="facts">{lines}</dl>' if lines else ""


def make_table(words: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> "Table":
    """A table with columns of words at the left and of numbers at the right."""
    from rich.table import Column, Table

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
