"""The garbage collector rests while graphs are made and walked.

That makes many objects, which all stay, and each full collection looks at every object of the process, torch's own
included: a fifth of the time, for nothing.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_rests() -> Iterator[None]:
    """Nothing is collected inside. What is no longer referred to goes at once, as always, but for cycles."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
