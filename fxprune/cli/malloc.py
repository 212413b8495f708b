"""Memory that the C library keeps while something is timed.

On Linux, glibc gives large tensors back to the system as soon as they are freed. The next forward pass takes them anew,
and each page costs a fault: half the time of a small network on large images, more for some widths than for others, and
never twice the same. glibc can't be told to forget what it was told, so only a process of our own is changed.
"""

import ctypes
import os

KEEPING = {-4: 0, -1: -1}  # of malloc.h: M_MMAP_MAX, none; M_TRIM_THRESHOLD, never


def keep_freed_memory() -> None:
    """What is freed stays with the process from now on. Without effect where another allocator is at work.

    Settings of the user's own, ``MALLOC_..._`` or ``GLIBC_TUNABLES`` in the environment, are left alone.
    """
    libc = None if is_chosen_by_user() else find_glibc()
    if libc is None:
        return
    for option, value in KEEPING.items():
        libc.mallopt(option, value)


def find_glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version, libc.mallopt  # noqa: B018  # looked up, or AttributeError
    except (OSError, TypeError, AttributeError):  # TypeError: Windows has no library without a name
        return None
    return libc


def is_chosen_by_user() -> bool:
    """Whether the environment says how glibc's malloc is to behave."""
    named = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    return named or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
