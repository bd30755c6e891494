"""The loss curve of a run: one line a step, in a file that looks as if no kill had happened.

Lines are only ever appended, and before the checkpoint that covers them appears. A run that goes
on from a checkpoint first drops the lines after it, a half-written last one among them, and then
writes the very same lines again, because training is a function of state and step. Numbers are the
shortest decimals that read back as the same float32.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qat.training.files import naming, write_through, write_whole
from qat.training.step import Metrics

HEADER = ",".join(("step", *Metrics._fields))


def append(path: Path, step: int, metrics: Sequence[Metrics]) -> None:
    """Adds steps to a curve that `rewind` has prepared.

    Args:
        path: of the curve.
        step: steps taken after the last of `metrics`.
        metrics: of successive steps, float32 scalars on the host.

    Raises:
        OSError: there is no such curve, or it cannot be written.
    """
    first = step - len(metrics) + 1
    lines = (_line(first + index, each) for index, each in enumerate(metrics))
    with naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            write_through(descriptor, "".join(lines).encode())
        finally:
            os.close(descriptor)


def rewind(path: Path, step: int) -> int:
    """Prepares a curve for what follows after a step: drops everything later, or begins it.

    Returns:
        How many steps it then holds.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: it is not a curve.
    """
    text = path.read_text(errors="replace") if path.exists() else f"{HEADER}\n"
    header, _, body = text.partition("\n")
    if not HEADER.startswith(header):  # a torn header is a beginning
        raise ValueError(f"{path} is not a loss curve: expected a first line {HEADER!r}")
    kept = [line for taken, line in _whole_lines(body) if taken <= step]
    begun = "\n".join((HEADER, *kept)) + "\n"
    if not path.exists() or begun != text:
        write_whole(path, begun)
    return len(kept)


def read(path: Path) -> dict[int, Metrics]:
    """The metrics of each step, by the number of steps then taken; a torn last line is left out.

    Raises:
        OSError: the file cannot be read.
    """
    _, _, body = path.read_text(errors="replace").partition("\n")
    lines = _whole_lines(body)
    return {step: _metrics(line) for step, line in lines}


def _line(step: int, metrics: Metrics) -> str:
    return ",".join((str(step), *(str(np.float32(number)) for number in metrics))) + "\n"


def _metrics(line: str) -> Metrics:
    numbers: Any = map(np.float32, line.split(",")[1:])
    return Metrics(*numbers)


def _whole_lines(body: str) -> Iterator[tuple[int, str]]:
    """Step and text of every line that ends and reads as numbers."""
    for line in body.split("\n")[:-1]:
        step, *numbers = line.split(",")
        if step.isascii() and step.isdigit() and len(numbers) == len(Metrics._fields):
            yield int(step), line
