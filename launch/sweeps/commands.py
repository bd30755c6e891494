"""Worker commands: what a run is to a scheduler, and how runs are dealt to a number of commands.

Runs of one shape stay together, since a worker compiles once a shape; a shape with much work is
dealt to several workers, so that they end at about the same time.
"""

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_LONGEST = 1000  # ids in one command: operating systems limit an argument to 128 KiB


@dataclasses.dataclass(frozen=True)
class Job:
    """A run, or several that train together, as a scheduler sees them.

    Attributes:
        runs: their ids.
        shape: runs of one shape share compiled programs, and so do as many together.
        work: how long one takes, in any unit.
    """

    runs: tuple[str, ...]
    shape: str
    work: float

    @property
    def programs(self) -> tuple[str, int]:
        """Identifies what a worker compiles for it."""
        return self.shape, len(self.runs)

    @property
    def cost(self) -> float:
        """How long it takes."""
        return self.work * len(self.runs)

    @property
    def word(self) -> str:
        """How a worker is told of it."""
        return "+".join(self.runs)


def worker_command(workdir: Path, data_dir: Path, options: Mapping[str, Any]) -> list[str]:
    """The command of a worker, but for its runs."""
    flags = {"workdir": workdir.absolute(), "data_dir": data_dir.absolute(), **options}
    told = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    return [sys.executable, "-m", "launch.worker", *told]


def deal(jobs: Sequence[Job], hands: int) -> list[list[Job]]:
    """Jobs in about that many lists, each of one shape, of about equal work.

    Args:
        jobs: in any order.
        hands: at least one a shape is dealt; 0 is one a shape.
    """
    shapes: dict[str, list[Job]] = defaultdict(list)
    for job in sorted(jobs, key=lambda job: -job.cost):
        shapes[job.shape].append(job)
    total = sum(job.cost for job in jobs)
    dealt: list[list[Job]] = []
    for group in shapes.values():
        share = sum(job.cost for job in group) / total
        parts = max(1, round(hands * share), -(-sum(len(job.runs) for job in group) // _LONGEST))
        dealt += _parts(group, min(parts, len(group)))
    return dealt


def _parts(jobs: Sequence[Job], count: int) -> list[list[Job]]:
    """The longest first, each to whoever has least."""
    parts: list[list[Job]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for job in jobs:
        least = loads.index(min(loads))
        parts[least].append(job)
        loads[least] += job.cost
    return parts
