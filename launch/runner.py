"""What is left of a run, done milestone by milestone; what is done follows from its files.

A run of several token budgets is a trunk and branches. The trunk is trained to where a branch
cools down and saved there; it stands still, so that no keep-policy touches that checkpoint, until
the branch has taken the state to its own end and its row is written. Then the trunk is read back
and goes on. So there is one state on the devices, and what is left to do follows from the files:
budgets that have a row are done, a branch with a checkpoint goes on from it, the rest is the
trunk's.

A sweep looks at its runs on the way and at their ends, to quantize what is trained so far. The
trunk stands still for these looks in the same way.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from launch.checkpoints import CHECKPOINTS
from launch.experiment import Experiment
from launch.lab import Lab, LossesOfSequences
from launch.progress import Tally
from launch.watch import throughput_of, watcher
from qat.training import curve
from qat.training.checkpoint import Checkpoints
from qat.training.loop import TrainingResult
from qat.training.processes import agree, is_first
from qat.training.profiling import parse_window, profiled
from qat.training.results import rows_of, write_rows
from qat.training.scalars import Writer
from qat.training.schedule import Schedule
from qat.training.step import Metrics, Params, TrainState
from qat.training.tensorboard import TensorBoard
from qat.training.wandb import WeightsAndBiases

ROWS = "rows.jsonl"
CURVE = "curve.csv"
_Milestone = tuple[int, int, Schedule | None]


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


class Looks:
    """What a sweep measures of a model beside its validation loss; here nothing."""

    def steps(self, schedule: Schedule) -> Sequence[int]:
        """Steps on the way of a run at which to look."""
        return ()

    def is_due(self, schedule: Schedule, step: int) -> bool:
        """Whether what is to be measured then is not there yet; a number of steps ends a budget."""
        return False

    def look(
        self, schedule: Schedule, result: TrainingResult, losses: LossesOfSequences | None = None
    ) -> None:
        """Measures, and keeps what it finds; `losses` are of validation, if they are known."""


@dataclasses.dataclass(frozen=True)
class Runner:
    """One run in its folder, which it has for itself.

    Attributes:
        lab: text and programs.
        experiment: its `schedule` is the trunk's.
        workdir: of the run; branches have folders in it.
        saving: when and what.
        preempted: whether to stop; asked before every step.
        watching: what to show and record.
        looks: what else to measure.
        meter: counts steps while there are any to train.
        counted: steps in the meter, by folder.
    """

    lab: Lab
    experiment: Experiment
    workdir: Path
    saving: Saving
    preempted: Callable[[], bool]
    watching: Watching
    looks: Looks
    meter: Tally | None = None
    counted: dict[Path, int] = dataclasses.field(default_factory=dict)

    def has_row(self, schedule: Schedule) -> bool:
        """Whether a budget is done."""
        run_id = self.lab.run_id(self.experiment, schedule)
        return bool(agree(lambda: int(run_id in {row.run_id for row in rows_of(self.workdir)})))

    def milestones(self) -> list[_Milestone]:
        """What is left to do, ordered by where it leaves the trunk: its step, then its last step.

        A budget ends its schedule; None is a look on the trunk's way.
        """
        trunk = self.experiment.schedule
        budgets = [
            (self._leaves_trunk(schedule), schedule.total_steps, schedule)
            for schedule in (*self.experiment.branches, trunk)
            if not self.has_row(schedule) or self._is_due(schedule, schedule.total_steps)
        ]
        late = self.too_late()
        steps = [step for step in self.looks.steps(trunk) if self._is_due(trunk, step)]
        ways = [(step, step, None) for step in steps if step not in late]
        return sorted([*budgets, *ways], key=lambda each: each[:2])

    def too_late(self) -> list[int]:
        """Steps at which to look that the trunk has left behind, as they were asked for later."""
        folder, trunk = self.workdir / CHECKPOINTS, self.experiment.schedule
        saved = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
        passed = [step for step in self.looks.steps(trunk) if step < max(saved, default=0)]
        return [step for step in passed if self._is_due(trunk, step)]

    def checkpoints(self, folder: Path, schedule: Schedule) -> Checkpoints:
        """Those of the trunk or of a branch."""
        identity = {
            "configuration": self.experiment.config_hash,
            "data": self.lab.dataset(self.experiment).fingerprint,
            "seed": self.experiment.config["seed"],
            "number of steps": schedule.total_steps,
        }
        keep, keep_every = self.saving.keep, self.saving.keep_every
        return Checkpoints(folder / CHECKPOINTS, identity, keep=keep, keep_every=keep_every)

    def reach(
        self,
        milestones: Sequence[_Milestone],
        progress: Callable[[str, float, str], AbstractContextManager[Tally]],
    ) -> None:
        """Trains and measures all of them."""
        budgets = [schedule for _, _, schedule in milestones if schedule is not None]
        steps = sum(schedule.total_steps - self._first_step(schedule) for schedule in budgets)
        with progress("Training", steps, "steps") as meter:
            run = dataclasses.replace(self, meter=meter)
            for step, _, schedule in milestones:
                if schedule is not None:
                    run._finish(schedule)
                else:
                    result, _ = run._trunk(step)
                    if result.status == "ok":
                        self.looks.look(self.experiment.schedule, result)

    def conclude(self, schedule: Schedule, result: TrainingResult, wall_s: float) -> None:
        """The row of a trained budget, and what else is measured at its end."""
        losses = None
        if not self.has_row(schedule):
            if result.status == "diverged" and result.losses and is_first():
                print(_divergence(self.experiment, result), file=sys.stderr, flush=True)
            losses = self._write_row(schedule, result, wall_s)
        if result.status == "ok" and self._is_due(schedule, schedule.total_steps):
            self.looks.look(schedule, result, losses)

    def _is_due(self, schedule: Schedule, step: int) -> bool:
        """Whether to look then, which is too late once the budget has diverged or failed."""

        def is_due() -> int:
            run_id = self.lab.run_id(self.experiment, schedule)
            ends = [row.status for row in rows_of(self.workdir) if row.run_id == run_id]
            return int(ends in ([], ["ok"]) and self.looks.is_due(schedule, step))

        return bool(agree(is_due))

    def _leaves_trunk(self, schedule: Schedule) -> int:
        """Step up to which a budget is the trunk's."""
        branches = schedule is not self.experiment.schedule
        return schedule.cooldown_start if branches else schedule.total_steps

    def _finish(self, schedule: Schedule) -> None:
        """From training to the row of one budget."""
        if schedule is self.experiment.schedule:
            result, wall_s = self._trunk(schedule.total_steps)
        else:
            result, wall_s = self._branch(schedule)
        self.conclude(schedule, result, wall_s)

    def _write_row(
        self, schedule: Schedule, result: TrainingResult, wall_s: float
    ) -> LossesOfSequences:
        """Evaluates, and adds the row to those of the run; returns the validation losses."""
        losses = np.array([np.nan])
        if result.status == "ok":
            params = result.state.params
            losses = self.lab.evaluate(self.experiment, params, self.experiment.policy)
            if self.watching.errors:
                self._report_errors(schedule, params)
        row = self.lab.row(self.experiment, result.status, wall_s, losses, schedule)
        if is_first():
            write_rows(self.workdir / ROWS, [*rows_of(self.workdir), row])
        return losses

    def report_errors(self) -> None:
        """Those of a finished run."""
        schedule = self.experiment.schedule
        with self.checkpoints(self.workdir, schedule) as checkpoints:
            state = self.lab.restored(self.experiment, checkpoints)
        if state is not None:
            self._report_errors(schedule, state.params)

    def _report_errors(self, schedule: Schedule, params: Params) -> None:
        """Prints every quantizer's error, and keeps it beside the budget's curve."""
        errors = self.lab.errors(self.experiment, params)
        if is_first():
            (self._folder(schedule) / "errors.txt").write_text(errors + "\n")
            print(errors)

    def _trunk(self, stop: int) -> tuple[TrainingResult, float]:
        """The trunk, trained up to a step and saved there."""
        schedule = self.experiment.schedule
        with self.checkpoints(self.workdir, schedule) as checkpoints:
            state = self.lab.restored(self.experiment, checkpoints)
            if state is None:
                state = self.lab.fresh(self.experiment)
            return self._train(self.workdir, schedule, state, checkpoints, stop)

    def _branch(self, schedule: Schedule) -> tuple[TrainingResult, float]:
        """A branch, trained to its end; the trunk first, up to where it branches off."""
        folder = self._folder(schedule)
        with self.checkpoints(folder, schedule) as checkpoints:
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
        path, first, begun = folder / CURVE, self._first_step(schedule), int(state.step)
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
                profiled(self.lab.programs(self.experiment), self._window, self.workdir / "profile")
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

    def _folder(self, schedule: Schedule) -> Path:
        """Where the curve and checkpoints of the trunk or of a branch are."""
        if schedule is self.experiment.schedule:
            return self.workdir
        return self.workdir / "branches" / str(schedule.total_steps)

    @property
    def _window(self) -> range:
        """Steps to profile."""
        profile, steps = self.watching.profile, self.experiment.schedule.total_steps
        return range(0) if profile is None else parse_window(profile, steps)

    def _first_step(self, schedule: Schedule) -> int:
        """Steps of the trunk that a budget's own curve leaves out."""
        return 0 if schedule is self.experiment.schedule else schedule.cooldown_start


def _divergence(experiment: Experiment, result: TrainingResult) -> str:
    """Where a run diverged, in a line."""
    step, loss = max(result.losses.items())
    return (
        f"diverged at step {step}: training loss {loss:.4g} nats/token; the limit is "
        f"{experiment.loss_limit:.4g}, three times that of guessing"
    )
