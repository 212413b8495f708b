"""Progress bars of any loop. Only on a terminal, and only on the first rank of a distributed run."""

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def is_visible(shown: bool | None = None) -> bool:
    """Whether bars are shown; where it is not said, they are if standard error is a terminal."""
    shown = sys.stderr.isatty() if shown is None else shown
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    return shown and first


def track_progress(items: Iterable[T], text: str) -> Iterator[T]:
    """``items``, with a bar that goes when they are through."""
    if not is_visible():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as bar

    total = len(items) if isinstance(items, Sized) else None
    yield from bar(items, text, total=total, console=Console(stderr=True), transient=True)
