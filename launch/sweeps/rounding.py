"""Post-training quantization of a run, on its way and at its end, in the visit that trains it.

Rounding to nearest is the quantizer of training applied once, so it needs no copy of the model:
evaluating the trained parameters with that quantizer on the weights is the same, bit for bit, and
one compiled program serves all formats of one structure. Other methods leave their weights in a
copy of the parameters, calibrated on training text that is the same for all runs of one length.
What else the run quantizes in training stays as it was. Differences are paired by sequence with the
run's own loss.

A run in low precision is rounded to fewer bits than it trained with, never to as many or more.

A rounding that raises is a row of status "failed", with the reason beside the run's rows; the run
and its other roundings are as they would have been.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int32

import qat.ptq
from launch.experiment import Experiment
from launch.lab import Lab, LossesOfSequences, placed_like
from launch.rounding.fitting import SKIP, running_policy
from launch.rounding.grid import Variant
from launch.rounding.rows import rounded
from launch.runner import ROWS, Looks
from launch.sweeps import failures
from models.task import model_of
from models.transformer import split
from qat.policy import Policy
from qat.quantizer import Quantizer
from qat.sweep import Sweep
from qat.training.data import train_batches
from qat.training.loop import TrainingResult
from qat.training.processes import is_first
from qat.training.results import Row, hash_of, rows_of, write_rows
from qat.training.schedule import Schedule
from qat.training.step import Params

FOLDER = "ptq"
UNFINISHED = "unfinished"
_BATCH = 8  # calibration sequences that are in memory at once

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
        """The row with the losses of rounded weights."""
        policy = dataclasses.replace(self.experiment.policy, weights=variant.weights)
        if variant.method != "rtn":
            policy = running_policy(self.experiment.policy, variant) or Policy()
            params = self._quantized(variant, params, policy)
        experiment = dataclasses.replace(self.experiment, policy=policy)
        losses = self.lab.evaluate(experiment, params, policy)
        row = rounded(row, variant, losses, losses - plain)
        row = dataclasses.replace(row, ptq_calibration=self._calibrated_on(variant))
        return row if math.isfinite(row.loss) else dataclasses.replace(row, status="diverged")

    def _quantized(self, variant: Variant, params: Params, policy: Policy) -> Params:
        """Parameters whose weights a method has rounded."""
        whole = multihost_utils.process_allgather(params, tiled=True)
        model = model_of(self.experiment.model, policy, whole)
        batches = self._calibration if variant.needs_text else ()
        result, _ = qat.ptq.quantize(model, variant.method, str(variant.weights), batches, SKIP)
        return placed_like(split(result)[1], params)

    @functools.cached_property
    def _calibration(self) -> list[Int32[jax.Array, "B T"]]:
        """Inputs from the text the run is trained on, the same for every seed."""
        dataset = self.lab.dataset(self.experiment)
        there, wanted = len(dataset.train.records), self.sweep.ptq_calibration
        if there < wanted:
            raise ValueError(f"ptq_calibration = {wanted}: the training text has {there} sequences")
        tokens_NT = train_batches(dataset, wanted, seed=0).batch_at(0)[:, :-1]
        size = next(n for n in range(min(_BATCH, wanted), 0, -1) if wanted % n == 0)
        return [jnp.asarray(part) for part in tokens_NT.reshape(-1, size, tokens_NT.shape[1])]

    def _calibrated_on(self, variant: Variant) -> str:
        """As `launch.ptq` tells it in rows."""
        if not variant.needs_text:
            return "none"
        tokens = hash_of({"tokens": [np.asarray(batch).tolist() for batch in self._calibration]})
        length = self._calibration[0].shape[1]
        source = self.experiment.config["data"]["source"]
        return f"{source}/train {self.sweep.ptq_calibration}×{length} {tokens}"


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
