"""Files appear whole or not at all: what stood there before stays until the new one is on the disk."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxprune.errors import FileError, require_type

PARTIAL = ".partial-"  # and the host and number of the process that writes there


@contextmanager
def replace_file(path: str | Path, noun: str) -> Iterator[Path]:
    """Gives the path to write to; at the end of the block that file takes the place of ``path``.

    After an error within the block, the old file stands as it was. What is no plain file, such as a pipe, is written to
    as it is.

    Args:
        path: of the file.
        noun: what it is, for the error: "a plan".

    Raises:
        FileError: nothing can be written there.
    """
    require_type(path, (str, Path), "path", FileError)
    path = Path(path)
    with named_errors(path, noun):
        if path.exists() and not path.is_file():
            yield path
            return
        with replace_files(path.parent) as folder:
            yield folder / path.name


@contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """The same for all files that the block writes to the folder that it is given: they move to ``folder``.

    What runs that were killed have left half-written there is removed.

    Raises:
        OSError: nothing can be written there.
    """
    for orphan in filter(is_orphan, folder.glob(f"{PARTIAL}*")):
        shutil.rmtree(orphan, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{PARTIAL}{socket.gethostname()}-{os.getpid()}-") as partial:
        yield Path(partial)
        written = sorted(Path(partial).iterdir())
        for file in written:
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        for file in written:
            os.replace(file, folder / file.name)


def is_orphan(partial: Path) -> bool:
    """Whether a folder of half-written files is of a process of this machine that is no more."""
    host, _, number = partial.name.removeprefix(PARTIAL).rpartition("-")[0].rpartition("-")
    if os.name != "posix" or host != socket.gethostname() or not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)  # sends nothing
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


@contextmanager
def named_errors(path: Path, noun: str) -> Iterator[None]:
    """What the system refuses within is a FileError. A ValueError is a path, or a kind of file, that makes no sense."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise FileError(f"can't write {noun} to {path}: {getattr(error, 'strerror', None) or error}") from error
