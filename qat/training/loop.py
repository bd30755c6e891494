"""The training loop: steps, progress, checkpoints, and a word for how it ended.

The loop holds no state of its own. Batch and rate are functions of the step number in the state,
so a run that goes on from a checkpoint does exactly what the uninterrupted run would have done.

The device never waits for the host: what a step reports is read while the step after it runs. Only
a checkpoint reads all, since it has to wait for the state anyway; so every metric is reported
before a checkpoint that covers it is begun.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax

from qat.training.checkpoint import Checkpoints
from qat.training.processes import PreemptedError, RowsByStep, place
from qat.training.schedule import Schedule
from qat.training.step import Constants, Metrics, Programs, TrainState

OnLog = Callable[[int, Sequence[Metrics]], None]


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        state: after the last step.
        status: "ok", or "diverged" once a loss was not finite or above the limit.
        losses: training loss of every step this process took, nats per token, by the number of
            steps then taken; the one that diverged is the last.
    """

    state: TrainState
    status: str
    losses: dict[int, float]


def train(
    programs: Programs,
    state: TrainState,
    constants: Constants,
    schedule: Schedule,
    batches: RowsByStep,
    *,
    stop: int | None = None,
    loss_limit: float = math.inf,
    log_every: int = 50,
    on_log: OnLog = lambda step, metrics: None,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 0,
    preempted: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Trains from the state's step to the schedule's end.

    Args:
        programs: compiled for the shape of `state`.
        state: fresh or restored; consumed.
        constants: what the model needs beside its parameters.
        schedule: its `total_steps` is where training ends.
        batches: of training records, by step.
        stop: steps after which to end earlier; None is the schedule's end.
        loss_limit: nats per token; a step with a larger loss has diverged.
        log_every: steps between readings of the metrics, which is also how soon a divergence ends
            the run.
        on_log: called with a number of steps taken and the metrics of those since the last call,
            float32 scalars on the host; every step is reported once.
        checkpoints: where to save; None saves nothing.
        checkpoint_every: steps between checkpoints; 0 saves at the end alone.
        preempted: asked before every step whether to save and stop.

    Raises:
        PreemptedError: `preempted` said so; everything is saved.
        ValueError: the state is beyond where to stop.
        OSError: a checkpoint cannot be written.
    """
    start, end = int(state.step), schedule.total_steps if stop is None else stop
    if start > end:
        raise ValueError(f"the state is at step {start}: expected at most {end}, where to stop")
    losses: dict[int, float] = {}
    unread: list[Metrics] = []  # of the last steps taken

    sound = functools.partial(is_sound, loss_limit=loss_limit)

    def report(taken: int, running: int) -> bool:
        """Reads all steps but the newest `running`; whether none diverged."""
        first = taken - len(unread) + 1
        metrics = _read(unread, len(unread) - running, sound)
        losses.update({first + index: float(each.loss) for index, each in enumerate(metrics)})
        if metrics:
            on_log(first + len(metrics) - 1, metrics)
        return not metrics or sound(metrics[-1])

    for taken in range(start, end + 1):
        stops = taken == end or preempted()
        due = stops or (checkpoint_every > 0 and taken % checkpoint_every == 0)
        saves = checkpoints is not None and due and taken > start
        reads_all = stops or saves
        if (reads_all or taken % log_every == 0) and not report(taken, 0 if reads_all else 1):
            return TrainingResult(state, "diverged", losses)
        if checkpoints and saves:
            checkpoints.save(state)
        if stops:
            break
        tokens_BS = place(batches, taken, programs.batch_sharding)
        state, metrics = programs.train_step(state, constants, schedule, tokens_BS)
        unread.append(metrics)
    if checkpoints:
        checkpoints.wait()
    if taken < end:
        raise PreemptedError(f"stopped after {taken} of {end} steps")
    return TrainingResult(state, "ok", losses)


def is_sound(metrics: Metrics, loss_limit: float) -> bool:
    """Whether a step, on the host, has not diverged."""
    return math.isfinite(metrics.loss) and float(metrics.loss) <= loss_limit


def _read(unread: list[Metrics], count: int, sound: Callable[[Metrics], bool]) -> list[Metrics]:
    """Takes the oldest off the list and waits for them; ends with the first that diverged."""
    metrics: list[Metrics] = jax.device_get(unread[:count])
    del unread[:count]
    healthy = [sound(each) for each in metrics]
    return metrics[: healthy.index(False) + 1] if False in healthy else metrics
