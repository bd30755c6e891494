"""What a worker does with a run, and how it tells of it.

A run that raises is a row too, of status "failed", with the reason in `error.txt` beside it; the
worker goes on with the next. Only a file system that cannot be read or written stops it, because
then no row could be written either, or a folder that belongs to another run.

A folder may still be in use by a worker whose driver was killed: it saves and leaves, and is waited
for.

Runs that are asked for together begin as lanes of one program. Whatever they then lack is done one
run after another.
"""

import contextlib
import functools
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launch import training
from launch.lab import Lab
from launch.main import PREEMPTED
from launch.runner import ROWS, Runner, Saving, Watching
from launch.sweeps import failures, lanes
from launch.sweeps.plan import Plan
from launch.sweeps.rounding import FOLDER, Rounding
from qat.spelling import expected_one_of
from qat.training.checkpoint import claim
from qat.training.processes import PreemptedError, Preemption, is_first
from qat.training.results import rows_of, write_rows

LEAVING_S = 60.0  # within which a worker that was told to leave has saved, or is ended

_MOMENT_S = 2.0  # from telling that a run is done until asking for the next
WATCHING = Watching(tensorboard=False, wandb_project=None, profile=None, errors=False)


def tell(event: str, **fields: Any) -> None:
    """Prints what happened for whoever started the worker."""
    if is_first():
        print(json.dumps({"event": event, **fields}), flush=True)


def asked(source: Iterable[str]) -> Iterator[str]:
    """Lines as they come; where they end amid work, their sender is gone, and it is preempted."""
    lines: queue.Queue[str] = queue.Queue()
    idle = threading.Event()
    idle.set()

    def listen() -> None:
        for line in source:
            lines.put(line.strip())
        lines.put("")
        if not idle.wait(_MOMENT_S):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(LEAVING_S)
            os._exit(PREEMPTED)  # files appear whole or not at all

    threading.Thread(target=listen, daemon=True).start()
    while line := lines.get():
        idle.clear()
        yield line
        idle.set()


class Told:
    """A meter that tells its steps as tokens of a run."""

    def __init__(self, run_id: str, tokens_per_step: int):
        self._run_id, self._tokens_per_step = run_id, tokens_per_step

    def skip(self, amount: float) -> None:
        """Tells of steps that were done before."""
        tell("skipped", run=self._run_id, tokens=amount * self._tokens_per_step)

    def advance(self, amount: float, note: str = "") -> None:
        """Tells of steps done."""
        del note
        tell("trained", run=self._run_id, tokens=amount * self._tokens_per_step)


class Worker:
    """Works on runs of one sweep.

    Args:
        workdir: of the sweep.
        data_dir: where prepared text is.
        checkpoint_every: steps between checkpoints; 0 saves at the end alone.
        devices: what runs may use; all there are if None.

    Raises:
        ValueError: the folder holds no plan.
    """

    def __init__(
        self,
        workdir: Path,
        data_dir: Path,
        checkpoint_every: int,
        devices: Sequence[jax.Device] | None = None,
    ):
        self._plan, self._workdir = Plan.read(workdir), workdir
        self._lab = Lab(data_dir, devices)
        self._saving = Saving(every=checkpoint_every, keep=1, keep_every=0)

    def work(self, run_ids: Sequence[str]) -> None:
        """Does what is left of some runs, those not begun as lanes, and tells how each ended.

        Raises:
            ValueError: the plan has no such run, they do not train together, or another worker is
                at work on one.
            OSError: a file cannot be read or written.
            PreemptedError: by SIGTERM; all but what lanes did is saved.
        """
        runs = self._plan.runs
        for run_id in run_ids:
            if run_id not in runs:
                raise ValueError(expected_one_of("run", run_id, list(runs)))
        lanes.check([runs[run_id] for run_id in run_ids])
        if len(run_ids) > 1:
            _patiently(functools.partial(self._begin_together, run_ids))
        for run_id in run_ids:
            _patiently(functools.partial(self._finish, run_id))

    def _begin_together(self, run_ids: Sequence[str]) -> None:
        """As lanes; an error of theirs says nothing of any single run."""
        try:
            with Preemption() as preempted, contextlib.ExitStack() as stack:
                lanes.go_on([self._lane(run_id, preempted, stack) for run_id in run_ids])
        except (OSError, PreemptedError, training.InUseError):
            raise
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            together = ", ".join(run_ids)
            line = f"warning: runs {together} go on one after another, not as lanes: {reason}"
            print(line, file=sys.stderr, flush=True)

    def _lane(
        self, run_id: str, preempted: Callable[[], bool], stack: contextlib.ExitStack
    ) -> Runner:
        """A run in its folder, which it has until the stack is left."""
        experiment, folder = self._plan.runs[run_id], self._plan.folder(self._workdir, run_id)
        training.check(self._lab, experiment, folder)
        training.take(self._lab, experiment, folder, stack)
        looks = Rounding(self._lab, experiment, folder, self._plan.sweep)
        told = Told(run_id, experiment.tokens_at(1))
        return Runner(self._lab, experiment, folder, self._saving, preempted, WATCHING, looks, told)

    def _finish(self, run_id: str) -> None:
        """Does what is left of a run and tells how it ended."""
        folder = self._plan.folder(self._workdir, run_id)
        try:
            self._go_on(run_id, folder)
        except (OSError, PreemptedError, training.InUseError):
            raise
        except Exception as error:
            fail(self._lab, self._plan, self._workdir, run_id, error)
        if not rows_of(folder):
            fail(self._lab, self._plan, self._workdir, run_id, "it left no row")
        statuses = {row.status for each in (folder, folder / FOLDER) for row in rows_of(each)}
        worst = next(each for each in ("failed", "diverged", "ok") if each in statuses)
        tell("done", run=run_id, status=worst)

    def _go_on(self, run_id: str, folder: Path) -> None:
        experiment = self._plan.runs[run_id]
        with Preemption() as preempted:
            training.check(self._lab, experiment, folder)
            training.go_on(
                self._lab,
                experiment,
                folder,
                self._saving,
                WATCHING,
                preempted,
                Rounding(self._lab, experiment, folder, self._plan.sweep),
                lambda *_: contextlib.nullcontext(Told(run_id, experiment.tokens_at(1))),
            )


def _patiently(act: Callable[[], None]) -> None:
    """Acts, as soon as the folder of a run is free.

    Raises:
        InUseError: it stays in use for longer than a worker takes to leave.
    """
    deadline = time.monotonic() + LEAVING_S
    while True:
        try:
            return act()
        except training.InUseError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def fail(lab: Lab, plan: Plan, workdir: Path, run_id: str, error: BaseException | str) -> None:
    """Leaves a row for every budget of a run that has none, and the reason beside it.

    Raises:
        ValueError: the folder belongs to another run; nothing is written then.
    """
    experiment, folder = plan.runs[run_id], plan.folder(workdir, run_id)
    done = rows_of(folder)
    there = {row.run_id for row in done}
    budgets = (*experiment.branches, experiment.schedule)
    missing = [each for each in budgets if lab.run_id(experiment, each) not in there]
    losses = np.array([np.nan])
    rows = [lab.row(experiment, "failed", 0.0, losses, each) for each in missing]
    if is_first():
        claim(folder, training.owner(lab, experiment))
        failures.note(folder, "training", error)
        write_rows(folder / ROWS, [*done, *rows])
