"""Draws: whether a model's Python draws random numbers that are not torch's. A graph would hold what was drawn once."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fxprune.graph.places import is_users

State = tuple[Any, Any]


def read_state() -> State:
    """The states of the random numbers of Python and of numpy, if that is there."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy.random.get_state() if numpy is not None else ()


def has_drawn(before: State) -> bool:
    """Whether a number was drawn since then. What was drawn is put back."""
    now = read_state()
    arrays = (part.tobytes() if hasattr(part, "tobytes") else part for part in (*now[1], *before[1]))
    numbers = list(arrays)
    if now[0] == before[0] and numbers[: len(now[1])] == numbers[len(now[1]) :]:
        return False
    random.setstate(before[0])
    if before[1]:
        sys.modules["numpy"].random.set_state(before[1])
    return True


@contextmanager
def keep_draws() -> Iterator[None]:
    """Numbers that are drawn meanwhile are drawn again after."""
    before = read_state()
    try:
        yield
    finally:
        has_drawn(before)


def find_draw(run: Callable[[], Any]) -> str:
    """The first line of the user's code, ``file:line``, that draws a number when ``run`` is called."""
    before, last, found = read_state(), "", ""

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal last, found
        if not found and is_users(frame.f_code.co_filename):
            found = last if has_drawn(before) else ""
            last = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        return None if found else trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(old)
    return found or last
