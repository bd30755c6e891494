"""The training loop: steps, progress, checkpoints, and a word for how it ended.

The loop holds no state of its own. Batch and rate are functions of the step number in the state,
so a run that goes on from a checkpoint does exactly what the uninterrupted run would have done.
"""

import dataclasses
import math
from collections.abc import Callable

import jax

from qat.training.checkpoint import Checkpoints
from qat.training.data import Batches
from qat.training.schedule import Schedule
from qat.training.step import Constants, Metrics, Programs, TrainState


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        state: after the last step.
        status: "ok", or "diverged" once a loss was not finite.
        losses: training loss, nats per token, by the number of steps taken when it was logged.
    """

    state: TrainState
    status: str
    losses: dict[int, float]


def train(
    programs: Programs,
    state: TrainState,
    constants: Constants,
    schedule: Schedule,
    batches: Batches,
    *,
    log_every: int = 50,
    on_log: Callable[[int, Metrics], None] = lambda step, metrics: None,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 0,
) -> TrainingResult:
    """Trains from the state's step to the schedule's end.

    Args:
        programs: compiled for the shape of `state`.
        state: fresh or restored; consumed.
        constants: what the model needs beside its parameters.
        schedule: its `total_steps` is where training ends.
        batches: of training records, by step.
        log_every: steps between readings of the loss, which is also how soon a divergence ends
            the run.
        on_log: called with the steps taken and their metrics.
        checkpoints: where to save; None saves nothing.
        checkpoint_every: steps between checkpoints; 0 saves at the end alone.
    """
    losses: dict[int, float] = {}
    status = "ok"
    start, total = int(state.step), schedule.total_steps
    for step in range(start, total):
        tokens_BS = jax.device_put(batches.batch_at(step), programs.batch_sharding)
        state, metrics = programs.train_step(state, constants, schedule, tokens_BS)
        taken = step + 1
        if taken % log_every == 0 or taken == total:
            losses[taken] = float(metrics.loss)
            on_log(taken, metrics)
            if not math.isfinite(losses[taken]):
                status = "diverged"
                break
        if checkpoints and checkpoint_every and taken % checkpoint_every == 0 and taken < total:
            checkpoints.save(state)
    if checkpoints and int(state.step) > start and status == "ok":
        checkpoints.save(state)
    return TrainingResult(state, status, losses)
