"""What the command line says: tables and JSON go to standard output, all else to standard error."""

import json
import sys
from typing import Any

from rich.console import Console, RenderableType


def print_output(*parts: RenderableType) -> None:
    """Print tables; as wide as they need where nobody looks."""
    console = Console(highlight=False, **({} if sys.stdout.isatty() else {"width": 400}))  # type: ignore[arg-type]
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str), markup=False)


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
    print_note(f"error: {' '.join(str(error).split())}")
