"""Watch: while a model is recorded, some functions of torch tell the recorder that they are called.

They stand replaced while anybody records, and are put back after. In threads that do not record they do what they do.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from threading import Lock, RLock
from types import ClassMethodDescriptorType
from typing import Any

from torch import nn

Handler = Callable[..., Any]  # (recorder, the function of torch, *its arguments)

RECORDER: ContextVar[Any] = ContextVar("recorder", default=None)
HANDLERS: dict[tuple[Any, str], Handler] = {}
ALONE = RLock()  # is held by what sets something for the whole process: random numbers, the default dtype
_originals: dict[tuple[Any, str], Any] = {}
_count = 0
_lock = Lock()


def handles(owner: Any, name: str) -> Callable[[Handler], Handler]:
    """Register what a recorder does when the function ``name`` of ``owner`` is called."""

    def register(handler: Handler) -> Handler:
        HANDLERS[owner, name] = handler
        return handler

    return register


def note_mode() -> None:
    """Let this thread's recorder know that Python reads or sets the mode of a module."""
    recorder = RECORDER.get()
    if recorder is not None:
        recorder.reads_mode = True


class Training:
    """``training`` of every module while anybody records: it tells the recorder that it is read, or set."""

    def __get__(self, module: Any, owner: type) -> Any:
        """Whether ``module`` is in train mode."""
        if module is None:
            raise AttributeError("training")  # a class has none
        note_mode()
        return vars(module)["training"] if "training" in vars(module) else module.__getattr__("training")

    def __set__(self, module: Any, training: bool) -> None:
        """Put it where it always is."""
        note_mode()
        vars(module)["training"] = training


@contextmanager
def watch_torch(recorder: Any) -> Iterator[None]:
    """While this holds, calls that this thread makes of the functions in ``HANDLERS`` go to their handlers."""
    count_recordings(+1)
    token = RECORDER.set(recorder)
    try:
        yield
    finally:
        RECORDER.reset(token)
        count_recordings(-1)


@contextmanager
def watch_nothing() -> Iterator[None]:
    """While this holds, this thread does not record."""
    token = RECORDER.set(None)
    try:
        yield
    finally:
        RECORDER.reset(token)


def count_recordings(change: int) -> None:
    """Replace the functions before the first recording begins, and put them back when the last one is over."""
    global _count
    with _lock:
        _count += change
        if change > 0 and _count == 1:
            for (owner, name), handler in HANDLERS.items():
                _originals[owner, name] = vars(owner)[name]
                setattr(owner, name, watched(vars(owner)[name], handler))
            nn.Module.training = Training()  # type: ignore[assignment]
        elif _count == 0:
            for (owner, name), original in _originals.items():
                setattr(owner, name, original)
            _originals.clear()
            del nn.Module.training


def watched(original: Any, handler: Handler) -> Any:
    """A function, or class method, that goes to ``handler`` where its caller is recorded."""
    function = original.__func__ if isinstance(original, classmethod) else original

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        recorder = RECORDER.get()
        return function(*args, **kwargs) if recorder is None else handler(recorder, function, *args, **kwargs)

    return classmethod(call) if isinstance(original, (classmethod, ClassMethodDescriptorType)) else call
