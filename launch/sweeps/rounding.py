"""Post-training quantization of a run, on its way and at its end, in the visit that trains it.

Rounding to nearest is the quantizer of training applied once, so it needs no copy of the model:
evaluating the trained parameters with that quantizer on the weights is the same, bit for bit, and
one compiled program serves all formats of one structure. What else the run quantizes in training
stays as it was. Differences are paired by sequence with the run's own loss.

A run in low precision is rounded to fewer bits than it trained with, never to as many or more.

A rounding that raises is a row of status "failed", with the reason beside the run's rows; the run
and its other roundings are as they would have been.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from launch.experiment import Experiment
from launch.lab import Lab, LossesOfSequences
from launch.rounding.grid import Variant
from launch.rounding.rows import rounded
from launch.runner import ROWS, Looks
from launch.sweeps import failures
from qat.policy import Policy
from qat.quantizer import Quantizer
from qat.sweep import Sweep
from qat.training.loop import TrainingResult
from qat.training.processes import is_first
from qat.training.results import Row, rows_of, write_rows
from qat.training.schedule import Schedule
from qat.training.step import Params

FOLDER = "ptq"
UNFINISHED = "unfinished"

Measurement = tuple[int, str, str]  # of a run: tokens, method and quantizer


@dataclasses.dataclass(frozen=True)
class Rounding(Looks):
    """What a sweep wants to know of a run beside its loss.

    Attributes:
        lab: text and programs.
        experiment: the run.
        workdir: of the run; the rows go into a folder of their own in it.
        sweep: says which methods and formats, and when.
    """

    lab: Lab
    experiment: Experiment
    workdir: Path
    sweep: Sweep

    def steps(self, schedule: Schedule) -> Sequence[int]:
        """Those of the shares before the end."""
        shares = sorted(share for share in self.sweep.ptq_at if share < 1)
        return sorted({max(1, round(share * schedule.total_steps)) for share in shares})

    def is_due(self, schedule: Schedule, step: int) -> bool:
        """Whether a row is missing."""
        return bool(self._missing(schedule, step))

    def look(
        self, schedule: Schedule, result: TrainingResult, losses: LossesOfSequences | None = None
    ) -> None:
        """Evaluates every method and format whose row is missing, and adds the rows."""
        step, params = int(result.state.step), result.state.params
        plain = losses
        if plain is None:
            plain = self.lab.evaluate(self.experiment, params, self.experiment.policy)
        row = self._row(schedule, step, plain)
        rows = [self._attempt(row, *each, params, plain) for each in self._missing(schedule, step)]
        if is_first():
            moment = (row.run_id, row.tokens, row.ptq_method)
            done = [
                r for r in rows_of(self._folder) if (r.run_id, r.tokens, r.ptq_method) != moment
            ]
            before = [] if row.status == "ok" else [row]
            write_rows(self._folder / ROWS, [*done, *before, *rows])

    def wanted(self, schedule: Schedule) -> set[Measurement]:
        """What is to be measured of a budget that ends well, the trunk's on its way as well."""
        trunk = schedule is self.experiment.schedule
        steps = {*(self.steps(schedule) if trunk else ()), schedule.total_steps}
        return {
            (self.experiment.tokens_at(step), method, str(quantizer))
            for step in steps
            for method, quantizer in self._all(schedule, step)
        }

    def _all(self, schedule: Schedule, step: int) -> list[tuple[str, Quantizer]]:
        """Methods and quantizers of a moment."""
        if step == schedule.total_steps and 1 not in self.sweep.ptq_at:
            return []
        quantizers = narrower(self.experiment.policy, self.sweep.ptq_formats)
        return [(method, each) for method in self.sweep.ptq_methods for each in quantizers]

    def _missing(self, schedule: Schedule, step: int) -> list[tuple[str, Quantizer]]:
        """Methods and quantizers that have no row of this moment yet."""
        wanted = self._all(schedule, step)
        if not wanted:
            return []
        run_id = self.lab.run_id(self.experiment, schedule)
        tokens = self.experiment.tokens_at(step)
        there = {
            (row.ptq_method, row.ptq_quantizer)
            for row in rows_of(self._folder)
            if row.run_id == run_id and row.tokens == tokens
        }
        return [(method, each) for method, each in wanted if (method, str(each)) not in there]

    @property
    def _folder(self) -> Path:
        return self.workdir / FOLDER

    def _row(self, schedule: Schedule, step: int, plain: LossesOfSequences) -> Row:
        """Of the model as it is at this moment, before anything is rounded."""
        row = self.lab.row(self.experiment, "ok", 0.0, plain, schedule)
        if step == schedule.total_steps:
            return row
        flops = row.flops * step / schedule.total_steps
        tokens = self.experiment.tokens_at(step)
        return dataclasses.replace(row, tokens=tokens, flops=flops, status=UNFINISHED)

    def _attempt(
        self, row: Row, method: str, quantizer: Quantizer, params: Params, plain: LossesOfSequences
    ) -> Row:
        """The row of one method and format, whether or not it can be evaluated."""
        variant = Variant(method, quantizer)
        try:
            return self._measured(row, variant, params, plain)
        except OSError:
            raise
        except Exception as error:
            if is_first():
                what = f"{method} {quantizer} after {row.tokens} tokens"
                failures.note(self.workdir, what, error)
            nothing = np.full_like(plain, np.nan)
            return dataclasses.replace(rounded(row, variant, nothing, nothing), status="failed")

    def _measured(
        self, row: Row, variant: Variant, params: Params, plain: LossesOfSequences
    ) -> Row:
        """The row with the losses under a policy of other weights."""
        policy = dataclasses.replace(self.experiment.policy, weights=variant.weights)
        experiment = dataclasses.replace(self.experiment, policy=policy)
        losses = self.lab.evaluate(experiment, params, policy)
        row = rounded(row, variant, losses, losses - plain)
        return row if math.isfinite(row.loss) else dataclasses.replace(row, status="diverged")


def narrower(policy: Policy, spellings: tuple[str, ...]) -> list[Quantizer]:
    """Quantizers of fewer bits than a policy gives the weights in training.

    A model that computes with weights of so many bits is there already.
    """
    bits = policy.bits("weights")
    return [quantizer for quantizer, each in _quantizers(spellings) if each < bits]


@functools.cache
def _quantizers(spellings: tuple[str, ...]) -> list[tuple[Quantizer, float]]:
    """Quantizers and the bits that they leave of weights."""
    parsed = map(Quantizer.parse, spellings)
    return [(each, Policy(weights=each).bits("weights")) for each in parsed]
