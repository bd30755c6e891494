"""Runs on a cluster: an array of worker commands through Slurm, followed until all have ended.

Jobs outlive the driver. The same command finds those it submitted before, waits for them, and
submits what is then still missing.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.progress import Meter
from qat.sweep import slurm

_POLL_S = 10.0


def follow(jobs: slurm.Jobs, done: Callable[[], int], runs: int) -> None:
    """Waits until all jobs have ended, and says which failed.

    Args:
        jobs: submitted before.
        done: how many of the runs are finished.
        runs: how many there are.

    Raises:
        OSError: the cluster does not answer.
    """
    with Meter("Running", runs, "runs") as meter:
        before = done()
        meter.skip(before)
        while True:
            statuses = jobs.states()
            now = done()
            meter.advance(now - before, _note(statuses))
            before = now
            if all(status.ended for status in statuses):
                break
            time.sleep(_POLL_S)
        for status in statuses:
            if status.state == "failed":
                reason = status.reason or f"exit code {status.exit_code}"
                meter.say(f"a job failed ({reason}); {status.log} ends:\n{status.last_lines(3)}")


def alive(folder: Path) -> slurm.Jobs | None:
    """Jobs of a folder that have not ended.

    Raises:
        OSError: the cluster does not answer.
    """
    jobs = slurm.find(folder)
    if jobs is None or all(status.ended for status in jobs.states()):
        return None
    return jobs


def resources_of(words: Sequence[str], at_once: int) -> slurm.Resources:
    """Reads resources as a flag gives them, such as ["partition=gpu", "minutes=240"].

    Names that `slurm.Resources` does not have are options of sbatch.

    Raises:
        ValueError: not a name and a value, or a value out of range.
    """
    fields: dict[str, Any] = {"at_once": at_once or None}
    known = {field.name: field for field in dataclasses.fields(slurm.Resources)}
    extra: dict[str, str | int] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise ValueError(f"--slurm={word}: expected a name and a value, such as minutes=240")
        if name not in known or name == "extra":
            extra[name] = value
        elif known[name].type is int:
            fields[name] = int(value) if value.isdecimal() else value
        else:
            fields[name] = value
    return slurm.Resources(**fields, extra=extra)


def _note(statuses: Sequence[slurm.Status]) -> str:
    """How many jobs are in which state."""
    states = [status.state for status in statuses]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    return "jobs: " + ", ".join(f"{count} {state}" for state, count in counts.items())
