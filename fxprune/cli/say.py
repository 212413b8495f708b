"""What the command line says: tables and JSON go to standard output, all else to standard error."""

import json
import re
import sys
from dataclasses import replace
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Column, Table

LEAST = 24  # of what a table's first column shows of a name in one line


def print_output(*parts: RenderableType) -> None:
    """Print tables; as wide as they need where nobody looks, and without some columns where a terminal is narrow."""
    console = Console(highlight=False, **({} if sys.stdout.isatty() else {"width": 400}))  # type: ignore[arg-type]
    for part in parts:
        table, dropped = fit_table(part, console.width) if isinstance(part, Table) else (part, [])
        console.print(table, soft_wrap=isinstance(part, str), markup=False)
        if dropped:
            print_note(f"without {', '.join(dropped)}, for which {console.width} columns are too few; see --json")


def fit_table(table: Table, width: int) -> tuple[Table, list[str]]:
    """A table that fits into ``width``, and the columns that are left out for it: not the first, and the left ones."""
    columns, dropped = list(table.columns), []
    while len(columns) > 2 and sum(map(measure_column, columns)) + 2 * (len(columns) - 1) > width:
        dropped.append(str(columns.pop(1).header))
    heads = [replace(column, min_width=min(LEAST, measure_column(column)), _cells=[]) for column in columns[:1]]
    fitted = Table(*heads, *(replace(column, _cells=[]) for column in columns[1:]), box=None, pad_edge=False)
    fitted.header_style = table.header_style
    for row in zip(*(column.cells for column in columns), strict=True):
        fitted.add_row(*row)
    return fitted, dropped


def measure_column(column: Column) -> int:
    """How wide a column must be at least: as its numbers are, and of words as far as they are not folded."""
    longest = max(cell_len(str(cell)) for cell in (column.header, *column.cells))
    return longest if column.no_wrap else min(longest, LEAST)


def show_json(data: Any) -> None:
    """Print JSON."""
    print(json.dumps(data, indent=1))


def print_note(text: str) -> None:
    """Say something that the user should know."""
    print(text, file=sys.stderr)


def print_progress(text: str) -> None:
    """Say what goes on; only on a terminal."""
    if sys.stderr.isatty():
        print_note(f"… {text}")


def print_error(error: Exception) -> None:
    """Say what went wrong, in one line."""
    print_note(f"error: {speak_options(' '.join(str(error).split()))}")


def speak_options(message: str) -> str:
    """A message with options as they are typed: ``--minimum 2`` for ``minimum=2``."""
    names = re.sub(r"\b(minimum|tolerance|keep|round_to)=", lambda found: f"--{found[1].replace('_', '-')} ", message)
    return names.replace("dynamic_batch=False", "--fixed-batch").replace("verify=False", "--no-verify")
