"""Post-training quantization of a run, on its way and at its end, in the visit that trains it.

Rounding to nearest is the quantizer of training applied once, so it needs no copy of the model:
evaluating the trained parameters with that quantizer on the weights is the same, bit for bit, and
one compiled program serves all formats of one structure. What else the run quantizes in training
stays as it was. Differences are paired by sequence with the run's own loss.

A run in low precision is rounded to fewer bits than it trained with, never to as many or more.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from launch.experiment import Experiment
from launch.lab import Lab, LossesOfSequences
from launch.runner import ROWS, Looks
from qat.policy import Policy
from qat.quantizer import Quantizer
from qat.sweep import Sweep
from qat.training.loop import TrainingResult
from qat.training.processes import is_first
from qat.training.results import Row, rows_of, write_rows
from qat.training.schedule import Schedule
from qat.training.step import Params, mean_and_standard_error

FOLDER = "ptq"
UNFINISHED = "unfinished"


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
        rows = [self._rounded(row, *each, params, plain) for each in self._missing(schedule, step)]
        if is_first():
            moment = (row.run_id, row.tokens, row.ptq_method)
            done = [
                r for r in rows_of(self._folder) if (r.run_id, r.tokens, r.ptq_method) != moment
            ]
            before = [] if row.status == "ok" else [row]
            write_rows(self._folder / ROWS, [*done, *before, *rows])

    def _missing(self, schedule: Schedule, step: int) -> list[tuple[str, Quantizer]]:
        """Methods and quantizers that have no row of this moment yet."""
        run_id = self.lab.run_id(self.experiment, schedule)
        tokens = self.experiment.tokens_at(step)
        there = {
            (row.ptq_method, row.ptq_quantizer)
            for row in rows_of(self._folder)
            if row.run_id == run_id and row.tokens == tokens
        }
        quantizers = narrower(self.experiment.policy, self.sweep.ptq_formats)
        wanted = [(method, each) for method in self.sweep.ptq_methods for each in quantizers]
        return [(method, each) for method, each in wanted if (method, str(each)) not in there]

    def _policy(self, quantizer: Quantizer) -> Policy:
        """That of the run with other weights."""
        return dataclasses.replace(self.experiment.policy, weights=quantizer)

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

    def _rounded(
        self, row: Row, method: str, quantizer: Quantizer, params: Params, plain: LossesOfSequences
    ) -> Row:
        """The row of one method and format."""
        policy = self._policy(quantizer)
        experiment = dataclasses.replace(self.experiment, policy=policy)
        losses = self.lab.evaluate(experiment, params, policy)
        loss, loss_se = mean_and_standard_error(losses)
        delta, delta_se = mean_and_standard_error(losses - plain)
        return dataclasses.replace(
            row,
            ptq_method=method,
            ptq_bits=policy.bits("weights"),
            ptq_format=policy.format_name("weights"),
            ptq_quantizer=str(quantizer),
            loss=loss,
            loss_se=loss_se,
            ptq_delta=delta,
            ptq_delta_se=delta_se,
        )


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
