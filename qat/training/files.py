"""Files that appear whole or not at all, whenever the process is killed or the disk is full."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes beside the file and renames; makes the folder if it is missing. Text is UTF-8.

    Raises:
        OSError: the file cannot be written; the one before is untouched.
    """
    encoded = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    with naming(path):
        try:
            with partial.open("w") as file:
                write_through(file.fileno(), encoded)
        except OSError:
            partial.unlink(missing_ok=True)  # a full disk needs the room
            raise
        partial.replace(path)


def write_through(descriptor: int, content: bytes) -> None:
    """Writes all of it and returns when it lies on the disk.

    Raises:
        OSError: it does not.
    """
    written = 0
    while written < len(content):
        written += os.write(descriptor, content[written:])
    os.fsync(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets errors of reading and writing say which file they are about."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
