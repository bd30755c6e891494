"""A run in a folder, from claim to rows; stopped at any moment, it goes on in the same place.

A run of several token budgets is a trunk and branches. The trunk is trained to where a branch
cools down and saved there; it stands still, so that no keep-policy touches that checkpoint, until
the branch has taken the state to its own end and its row is written. Then the trunk is read back
and goes on. So there is one state on the devices, and what is left to do follows from the files:
budgets that have a row are done, a branch with a checkpoint goes on from it, the rest is the
trunk's.
"""

import contextlib
import dataclasses
import fcntl
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.experiment import Experiment
from launch.lab import Lab
from launch.main import BAD_INPUT, DIVERGED, PREEMPTED
from launch.progress import Meter
from launch.watch import throughput_of, watcher
from qat.training import curve
from qat.training.checkpoint import Checkpoints, claim
from qat.training.loop import TrainingResult
from qat.training.processes import (
    FailedElsewhereError,
    PreemptedError,
    Preemption,
    agree,
    is_first,
)
from qat.training.profiling import parse_window, profiled
from qat.training.results import Row, read_rows, write_rows
from qat.training.scalars import Writer
from qat.training.schedule import Schedule
from qat.training.step import Metrics, Params, TrainState
from qat.training.tensorboard import TensorBoard
from qat.training.wandb import WeightsAndBiases, required_package

_ROWS = "rows.jsonl"


@dataclasses.dataclass(frozen=True)
class Saving:
    """When checkpoints are saved and which stay, in steps; see `launch.train`."""

    every: int
    keep: int
    keep_every: int


@dataclasses.dataclass(frozen=True)
class Watching:
    """What to show and record of a run; see `launch.train`."""

    tensorboard: bool
    wandb_project: str | None
    profile: str | None
    errors: bool


def run(
    config: Mapping[str, Any], workdir: Path, data_dir: Path, saving: Saving, watching: Watching
) -> int:
    """Trains all budgets of a config that have no row yet; returns the exit code.

    Raises:
        ValueError: bad input, before anything is written.
        OSError: a file cannot be read or written.
    """
    experiment = Experiment.from_config(config)
    lab = Lab(data_dir)
    dataset = lab.dataset(experiment)
    lab.programs(experiment)  # these two so that what cannot run claims no workdir
    lab.batches(experiment)
    if dataset.unreadable_documents:
        print(f"left out {dataset.unreadable_documents} documents that are not UTF-8 text")
    budgets = (*experiment.branches, experiment.schedule)
    steps = experiment.schedule.total_steps
    window = parse_window(watching.profile, steps) if watching.profile else range(0)
    if watching.wandb_project is not None:
        required_package(watching.wandb_project)
    try:
        with contextlib.ExitStack() as stack, Preemption() as preempted:
            owner = {**config, "data_fingerprint": dataset.fingerprint}
            agree(lambda: _take(workdir, owner, stack))
            this = _Run(lab, experiment, workdir, saving, preempted, watching, window)
            if missing := [schedule for schedule in budgets if not this.has_row(schedule)]:
                this.finish(missing)
            else:
                print(f"{workdir} is finished already")
            diverged = agree(lambda: _tell(workdir))
    except FailedElsewhereError:
        return BAD_INPUT
    except PreemptedError as stopped:
        if is_first():
            line = f"preempted, {stopped}; the same command goes on from here"
            print(line, file=sys.stderr, flush=True)
        return PREEMPTED
    return DIVERGED if diverged else 0


@dataclasses.dataclass(frozen=True)
class _Run:
    """What everything below needs to know.

    Attributes:
        lab: text and programs.
        experiment: its `schedule` is the trunk's.
        workdir: of the run; branches have folders in it.
        saving: when and what.
        preempted: whether to stop; asked before every step.
        watching: what to show and record.
        window: steps to profile.
        meter: counts steps while there are any to train.
        counted: steps in the meter, by folder.
    """

    lab: Lab
    experiment: Experiment
    workdir: Path
    saving: Saving
    preempted: Preemption
    watching: Watching
    window: range
    meter: Meter | None = None
    counted: dict[Path, int] = dataclasses.field(default_factory=dict)

    def has_row(self, schedule: Schedule) -> bool:
        """Whether a budget is done."""
        run_id = self.lab.run_id(self.experiment, schedule)
        return bool(agree(lambda: int(run_id in set(read_rows(self.workdir)["run_id"]))))

    def finish(self, missing: Sequence[Schedule]) -> None:
        """Trains and evaluates budgets, the shortest first."""
        steps = sum(schedule.total_steps - self._first_step(schedule) for schedule in missing)
        with Meter("Training", steps, "steps") as meter:
            run = dataclasses.replace(self, meter=meter)
            for schedule in missing:
                run._finish(schedule)

    def _finish(self, schedule: Schedule) -> None:
        """From training to the row of one budget."""
        if schedule is self.experiment.schedule:
            result, wall_s = self._trunk(schedule.total_steps)
        else:
            result, wall_s = self._branch(schedule)
        losses = np.array([np.nan])
        if result.status == "ok":
            params = result.state.params
            losses = self.lab.evaluate(self.experiment, params, self.experiment.policy)
            if self.watching.errors:
                self._report_errors(schedule, params)
        row = self.lab.row(self.experiment, result, wall_s, losses, schedule)
        if is_first():
            done: Any = read_rows(self.workdir).to_dict("records")
            rows = [*(Row(**fields) for fields in done), row]
            write_rows(self.workdir / _ROWS, rows)

    def _report_errors(self, schedule: Schedule, params: Params) -> None:
        """Prints every quantizer's error, and keeps it beside the budget's curve."""
        errors = self.lab.errors(self.experiment, params)
        if is_first():
            (self._folder(schedule) / "errors.txt").write_text(errors + "\n")
            print(errors)

    def _trunk(self, stop: int) -> tuple[TrainingResult, float]:
        """The trunk, trained up to a step and saved there."""
        schedule = self.experiment.schedule
        with self._checkpoints(self.workdir, schedule) as checkpoints:
            state = self.lab.restored(self.experiment, checkpoints)
            if state is None:
                state = self.lab.fresh(self.experiment)
            return self._train(self.workdir, schedule, state, checkpoints, stop)

    def _branch(self, schedule: Schedule) -> tuple[TrainingResult, float]:
        """A branch, trained to its end; the trunk first, up to where it branches off."""
        folder = self._folder(schedule)
        with self._checkpoints(folder, schedule) as checkpoints:
            state = self.lab.restored(self.experiment, checkpoints)
            if state is None:
                trunk, wall_s = self._trunk(schedule.cooldown_start)
                if trunk.status != "ok":
                    return trunk, wall_s  # as a run of that budget alone would have
                state = trunk.state
            return self._train(folder, schedule, state, checkpoints, schedule.total_steps)

    def _train(
        self,
        folder: Path,
        schedule: Schedule,
        state: TrainState,
        checkpoints: Checkpoints,
        stop: int,
    ) -> tuple[TrainingResult, float]:
        """One stretch of training, whose curve lies in the same folder."""
        path, first, begun = folder / "curve.csv", self._first_step(schedule), int(state.step)
        if is_first() and (lost := begun - first - curve.rewind(path, begun)):
            print(f"warning: {path} lacks {lost} steps up to {begun}", file=sys.stderr, flush=True)

        assert self.meter
        self.meter.skip(begun - self.counted.setdefault(folder, first))
        with contextlib.ExitStack() as stack:
            writers = self._writers(folder, schedule, stack) if is_first() else []
            watch = watcher(self.meter, throughput_of(self.experiment), writers)

            def on_log(step: int, metrics: Sequence[Metrics]) -> None:
                if is_first():
                    curve.append(path, step, metrics)
                watch(step, metrics)
                self.counted[folder] = step

            programs = stack.enter_context(
                profiled(self.lab.programs(self.experiment), self.window, self.workdir / "profile")
            )
            return self.lab.train(
                self.experiment,
                state,
                schedule,
                programs,
                stop=stop,
                on_log=on_log,
                checkpoints=checkpoints,
                checkpoint_every=self.saving.every,
                preempted=self.preempted,
            )

    def _writers(
        self, folder: Path, schedule: Schedule, stack: contextlib.ExitStack
    ) -> list[Writer]:
        """Where to plot one stretch of training."""
        writers: list[Writer] = []
        if self.watching.tensorboard:
            writers.append(TensorBoard(folder / "tensorboard"))
        if self.watching.wandb_project is not None:
            run_id = self.lab.run_id(self.experiment, schedule)
            config = self.experiment.config
            writers.append(
                WeightsAndBiases(self.watching.wandb_project, run_id, config, folder / "wandb")
            )
        for writer in writers:
            stack.callback(writer.close)
        return writers

    def _checkpoints(self, folder: Path, schedule: Schedule) -> Checkpoints:
        """Those of the trunk or of a branch."""
        identity = {
            "configuration": self.experiment.config_hash,
            "data": self.lab.dataset(self.experiment).fingerprint,
            "seed": self.experiment.config["seed"],
            "number of steps": schedule.total_steps,
        }
        keep, keep_every = self.saving.keep, self.saving.keep_every
        return Checkpoints(folder / "checkpoints", identity, keep=keep, keep_every=keep_every)

    def _folder(self, schedule: Schedule) -> Path:
        """Where the curve and checkpoints of the trunk or of a branch are."""
        if schedule is self.experiment.schedule:
            return self.workdir
        return self.workdir / "branches" / str(schedule.total_steps)

    def _first_step(self, schedule: Schedule) -> int:
        """Steps of the trunk that a budget's own curve leaves out."""
        return 0 if schedule is self.experiment.schedule else schedule.cooldown_start


def _take(workdir: Path, owner: Mapping[str, Any], stack: contextlib.ExitStack) -> int:
    """Claims the workdir, and keeps other runs out of it until the stack is left.

    Raises:
        ValueError: it belongs to another configuration, or a run is going on in it.
    """
    claim(workdir, dict(owner))
    lock = stack.enter_context((workdir / "lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which no kill can leave behind
    except BlockingIOError:
        raise ValueError(f"workdir {workdir} is in use: the same run is going on in it") from None
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
