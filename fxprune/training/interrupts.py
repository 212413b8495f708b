"""Signals while a run is put back: a second control-C waits until the model is whole again."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Shield:
    """Signals that Python handles: they pass until ``hold``, and from then on wait for the end of the block."""

    def __init__(self) -> None:
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self.handlers = {number: signal.getsignal(number) for number in numbers if callable(signal.getsignal(number))}
        self.held = False
        self.waiting: list[int] = []

    def hold(self) -> None:
        """Let no more signals through."""
        self.held = True

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Stands in the place of the handlers."""
        handler = self.handlers[signal.Signals(number)]
        if self.held:
            self.waiting.append(number)
        elif callable(handler):
            handler(number, frame)


@contextmanager
def shield_undo() -> Iterator[Shield]:
    """A block that may be interrupted until it calls ``hold``; signals after that come at its end."""
    shield = Shield()
    for number in shield.handlers:
        signal.signal(number, shield.handle)
    try:
        yield shield
    finally:
        for number, handler in shield.handlers.items():
            signal.signal(number, handler)
        for waiting in shield.waiting:
            signal.raise_signal(waiting)
