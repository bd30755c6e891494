"""The workdir of a program of laws: refused at once if it is another's, made when all is computed.

Fits take seconds and their input may be bad until the last of them is done, so nothing is written
before; but a folder that cannot be written to in the end should be refused in the beginning.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.training import hold
from qat.training.checkpoint import claim


def check(workdir: Path, identity: Mapping[str, Any]) -> None:
    """Raises ValueError if the folder has files of something else; writes nothing."""
    if workdir.exists() and any(workdir.iterdir()):
        claim(workdir, dict(identity))


@contextlib.contextmanager
def writing(workdir: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """Claims the folder, and keeps others out of it meanwhile.

    Raises:
        ValueError: it belongs to something else, or is in use.
    """
    with contextlib.ExitStack() as stack:
        hold(workdir, identity, stack)
        yield
