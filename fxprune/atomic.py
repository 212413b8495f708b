"""Files appear whole or not at all: what stood there before stays until the new one is on the disk."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxprune.errors import FileError, require_type


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

    Raises:
        OSError: nothing can be written there.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        yield Path(partial)
        written = sorted(Path(partial).iterdir())
        for file in written:
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        for file in written:
            os.replace(file, folder / file.name)


@contextmanager
def named_errors(path: Path, noun: str) -> Iterator[None]:
    """What the system refuses within is a FileError. A ValueError is a path, or a kind of file, that makes no sense."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise FileError(f"can't write {noun} to {path}: {getattr(error, 'strerror', None) or error}") from error
