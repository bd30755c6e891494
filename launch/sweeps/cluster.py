"""Runs on a cluster: an array of worker commands through Slurm, followed until all have ended.

Jobs outlive the driver. The same command finds those it submitted before, waits for them, and
submits what is then still missing.
"""

import dataclasses
import difflib
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

    Names that `slurm.Resources` does not have are options of sbatch, which may be written with
    their dashes, and have to be where they look like one of ours.

    Raises:
        ValueError: not a name and a value, a name that is nearly ours, or a value out of range.
    """
    fields: dict[str, Any] = {"at_once": at_once or None}
    known = {f.name: f for f in dataclasses.fields(slurm.Resources) if f.name != "extra"}
    extra: dict[str, str | int] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name.strip("-") or not equals or not value:
            raise ValueError(f"--slurm={word}: expected a name and a value, such as minutes=240")
        if name.startswith("--"):
            extra[name.removeprefix("--")] = value
        elif name not in known:
            if near := difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.8):
                raise ValueError(
                    f"--slurm={word}: there is no {name!r}; nearest is {near[0]!r}; an option of "
                    f"sbatch is written --slurm=--{word}"
                )
            extra[name] = value
        elif known[name].type is int:
            fields[name] = int(value) if value.isdecimal() else value
        else:
            fields[name] = value
    try:
        return slurm.Resources(**fields, extra=extra)
    except ValueError as error:
        raise ValueError(f"--slurm: {error}") from None


def _note(statuses: Sequence[slurm.Status]) -> str:
    """How many jobs are in which state."""
    states = [status.state for status in statuses]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    return "jobs: " + ", ".join(f"{count} {state}" for state, count in counts.items())
