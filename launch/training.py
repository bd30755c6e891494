"""A run in a folder, from claim to rows; stopped at any moment, it goes on in the same place."""

import contextlib
import fcntl
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from launch import origin
from launch.experiment import Experiment
from launch.lab import Lab
from launch.main import BAD_INPUT, DIVERGED, PREEMPTED
from launch.progress import Meter, Tally
from launch.runner import Looks, Runner, Saving, Watching
from qat.training.checkpoint import MARKER, claim
from qat.training.data import TextDataset
from qat.training.processes import (
    FailedElsewhereError,
    PreemptedError,
    Preemption,
    agree,
    is_first,
)
from qat.training.profiling import parse_window
from qat.training.results import read_rows
from qat.training.wandb import required_package


class InUseError(ValueError):
    """Another process is at work in a folder."""


def run(
    config: Mapping[str, Any], workdir: Path, data_dir: Path, saving: Saving, watching: Watching
) -> int:
    """Trains all budgets of a config that have no row yet; returns the exit code.

    Raises:
        ValueError: bad input, before anything is written.
        OSError: a file cannot be read or written.
    """
    experiment = Experiment.from_config(origin.resolved(config, workdir))
    lab = Lab(data_dir)
    dataset = check(lab, experiment, workdir)
    if dataset.unreadable_documents:
        print(f"left out {dataset.unreadable_documents} documents that are not UTF-8 text")
    if watching.profile is not None:
        parse_window(watching.profile, experiment.schedule.total_steps)
    if watching.wandb_project is not None:
        required_package(watching.wandb_project)
    try:
        with Preemption() as preempted:
            went_on = go_on(lab, experiment, workdir, saving, watching, preempted)
    except FailedElsewhereError:
        return BAD_INPUT
    except PreemptedError as stopped:
        if is_first():
            line = f"preempted, {stopped}; the same command goes on from here"
            print(line, file=sys.stderr, flush=True)
        return PREEMPTED
    if not went_on:
        print(f"{workdir} is finished already")
    return DIVERGED if agree(lambda: _tell(workdir)) else 0


def check(lab: Lab, experiment: Experiment, workdir: Path) -> TextDataset:
    """Makes sure that an experiment can run at all, before it claims a workdir.

    Raises:
        ValueError: its data, mesh, model or checkpoints do not fit together.
    """
    dataset = lab.dataset(experiment)
    lab.programs(experiment)
    if not (workdir / MARKER).exists():  # what has begun may not need them any more
        origin.check(experiment, dataset.fingerprint)
    lab.batches(experiment)
    return dataset


def go_on(
    lab: Lab,
    experiment: Experiment,
    workdir: Path,
    saving: Saving,
    watching: Watching,
    preempted: Callable[[], bool],
    looks: Looks | None = None,
    progress: Callable[[str, float, str], AbstractContextManager[Tally]] = Meter,
) -> bool:
    """Does what is left of a run in its folder; returns whether anything was.

    Args:
        lab: text and programs, which `check` has seen.
        experiment: the run.
        workdir: of the run.
        saving: when checkpoints are saved.
        watching: what to show and record.
        preempted: asked before every step whether to save and stop.
        looks: what else to measure, on the way and at the ends.
        progress: makes the meter of the steps.

    Raises:
        ValueError: the folder belongs to another run.
        InUseError: another process is at work in it.
        OSError: a file cannot be read or written.
        PreemptedError: `preempted` said so; everything is saved.
    """
    with contextlib.ExitStack() as stack:
        take(lab, experiment, workdir, stack)
        run = Runner(lab, experiment, workdir, saving, preempted, watching, looks or Looks())
        milestones = run.milestones()
        if milestones:
            run.reach(milestones, progress)
        elif watching.errors:
            run.report_errors()
        return bool(milestones)


def take(lab: Lab, experiment: Experiment, workdir: Path, stack: contextlib.ExitStack) -> None:
    """Claims the workdir of a run, and keeps others out of it until the stack is left.

    Raises:
        ValueError: it belongs to another configuration, or a run is going on in it.
    """
    words = owner(lab, experiment)
    agree(lambda: hold(workdir, words, stack))


def owner(lab: Lab, experiment: Experiment) -> dict[str, Any]:
    """What a run writes into its workdir to claim it."""
    return {**experiment.config, "data_fingerprint": lab.dataset(experiment).fingerprint}


def hold(workdir: Path, words: Mapping[str, Any], stack: contextlib.ExitStack) -> int:
    """Claims and locks, in the first process alone; returns 0.

    Raises:
        ValueError: as `take`.
    """
    claim(workdir, dict(words))
    lock = stack.enter_context((workdir / "lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which no kill can leave behind
    except BlockingIOError:
        raise InUseError(f"workdir {workdir} is in use: the same run is going on in it") from None
    except OSError:  # file systems without locks
        pass
    return 0


def _tell(workdir: Path) -> int:
    """Prints one line a row; returns how many runs diverged."""
    rows: Any = read_rows(workdir)
    for row in rows.itertuples():
        print(
            f"run {row.run_id}: {row.status}, validation loss {row.loss:.4f} "
            f"± {row.loss_se:.4f} nats/token, N = {row.params:,}, D = {row.tokens:,}, "
            f"{row.wall_s:.0f} s"
        )
    return int((rows["status"] == "diverged").sum())
