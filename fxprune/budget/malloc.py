"""Memory that the C library keeps while something is timed.

On Linux, glibc gives large tensors back to the system as soon as they are freed. The next forward pass takes them anew,
and each page costs a fault: half the time of a small network on large images, more for some widths than for others, and
never twice the same.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

# of malloc.h, with the largest values that glibc's own adjustment reaches
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
USUAL = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}
KEEPING = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}


@contextmanager
def memory_kept() -> Iterator[None]:
    """What is freed inside stays with the process until the end. Without effect where another allocator is at work.

    Settings of the user's own, ``MALLOC_..._`` or ``GLIBC_TUNABLES`` in the environment, are left alone.
    """
    libc = None if chosen_by_the_user() else glibc()
    if libc is None:
        yield
        return
    for option, value in KEEPING.items():
        libc.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in USUAL.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)


def glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version, libc.mallopt, libc.malloc_trim  # noqa: B018  # looked up, or AttributeError
    except (OSError, TypeError, AttributeError):  # TypeError: Windows has no library without a name
        return None
    return libc


def chosen_by_the_user() -> bool:
    """Whether the environment says how glibc's malloc is to behave."""
    named = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    return named or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
