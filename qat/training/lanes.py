"""Many runs as one program: lanes, each with its own parameters, numbers, schedule and batches.

A model that is too small to fill a device trains beside others of its shape: their states are
stacked, and the train step of one is mapped over the stack. Nothing passes between lanes, so each
trains as it would alone, but for the order in which a compiler adds up. A lane that diverges is
carried along, and what it computes from then on is nobody's.

All lanes take the same number of steps. The loop holds no state of its own and reads metrics a
step late, as `qat.training.loop` does; it saves nothing.

Shapes: L lanes, B sequences, S tokens of a record.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Int32

from qat.training.loop import is_sound
from qat.training.processes import PreemptedError, RowsByStep
from qat.training.schedule import Schedule
from qat.training.step import Constants, Metrics, Programs, TrainState

Tree = TypeVar("Tree")
OnLaneLog = Callable[[int, int, Sequence[Metrics]], None]


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Where lanes stand.

    Attributes:
        state: stacked along a first axis L.
        step: number of steps taken.
        statuses: of each lane, "ok", or "diverged" once a loss was not finite or above the limit.
    """

    state: TrainState
    step: int
    statuses: tuple[str, ...]


def begin(programs: Programs, seeds: Sequence[int]) -> Lanes:
    """Lanes before the first step, each as a run of its seed begins.

    Args:
        programs: of lanes.
        seeds: of each lane, below 2**32; the mesh's axis `run` divides their number.
    """
    state = programs.init_state(np.asarray(seeds, np.uint32))
    return Lanes(state, 0, ("ok",) * len(seeds))


def stack(trees: Sequence[Tree]) -> Tree:
    """Constants or schedules of all lanes as one; numbers become arrays of 32 bits.

    Args:
        trees: pytrees of one structure, whose leaves have one shape and dtype each.
    """
    stacked: Tree = jax.tree.map(
        lambda *leaves: np.stack([_number(leaf) for leaf in leaves]), *trees
    )
    return stacked


def lane_of(state: TrainState, lane: int, shardings: TrainState) -> TrainState:
    """The state of one lane, as a program of one run takes it.

    Args:
        state: stacked.
        lane: which.
        shardings: of a state of one run, on the same devices.
    """
    return _taken(tuple(jax.tree.leaves(shardings)), jax.tree.structure(shardings))(state, lane)


@functools.cache
def _taken(shardings: tuple[Sharding, ...], structure: Any) -> Callable[..., TrainState]:
    """Takes a lane out of a stack; compiled once for all lanes."""
    return jax.jit(
        lambda state, lane: jax.tree.map(lambda leaf: leaf[lane], state),
        out_shardings=jax.tree.unflatten(structure, shardings),
    )


def spread(lanes: int, devices: int) -> int:
    """Over how many parts of the devices to spread lanes, so that few are idle or shared.

    The smallest divisor of the devices with a part for every lane, or all devices if those are
    fewer. Whoever has other numbers of lanes than multiples of it fills up with copies.

    Args:
        lanes: at least 1.
        devices: groups of devices of which each can hold a run, at least 1.
    """
    wanted = min(lanes, devices)
    return next(n for n in range(wanted, devices + 1) if devices % n == 0)


def train_lanes(
    programs: Programs,
    lanes: Lanes,
    constants: Constants,
    schedules: Schedule,
    batches: Sequence[RowsByStep],
    *,
    stop: int,
    loss_limit: float,
    log_every: int = 50,
    on_log: OnLaneLog = lambda lane, step, metrics: None,
    preempted: Callable[[], bool] = lambda: False,
) -> Lanes:
    """Trains all lanes up to a step, or until none is left that has not diverged.

    Args:
        programs: of lanes.
        lanes: where to go on; consumed.
        constants: of all lanes, see `stack`.
        schedules: of all lanes, see `stack`.
        batches: of each lane; what several lanes share is read once.
        stop: steps after which to end.
        loss_limit: nats per token; a step with a larger loss has diverged.
        log_every: steps between readings of the metrics.
        on_log: called with a lane, its number of steps taken and the metrics of those since the
            last call, float32 scalars on the host; the step that diverged is a lane's last.
        preempted: asked before every step whether to stop.

    Raises:
        PreemptedError: `preempted` said so; nothing is saved.
    """
    state, statuses = lanes.state, lanes.statuses
    unread: list[Metrics] = []  # of the last steps taken, stacked
    for taken in range(lanes.step, stop + 1):
        stops = taken == stop or preempted()
        if unread and (stops or taken % log_every == 0):
            count = len(unread) - (0 if stops else 1)
            read, unread = jax.device_get(unread[:count]), unread[count:]
            statuses = _report(read, taken - len(unread), statuses, loss_limit, on_log)
        if stops or "ok" not in statuses:
            break
        tokens_LBS = place_lanes(batches, taken, programs.batch_sharding)
        state, metrics = programs.train_step(state, constants, schedules, tokens_LBS)
        unread.append(metrics)
    if taken < stop and "ok" in statuses:
        raise PreemptedError(f"stopped after {taken} of {stop} steps, which are lost")
    return Lanes(state, taken, statuses)


def _report(
    metrics: Sequence[Metrics],
    step: int,
    statuses: Sequence[str],
    loss_limit: float,
    on_log: OnLaneLog,
) -> tuple[str, ...]:
    """Tells of each lane's steps, the last of which is `step`; how the lanes are then."""
    after = list(statuses)
    for lane, status in enumerate(statuses):
        if status != "ok" or not metrics:
            continue
        own = [Metrics(*(number[lane] for number in each)) for each in metrics]
        sound = [is_sound(each, loss_limit) for each in own]
        if False in sound:
            own = own[: sound.index(False) + 1]
            after[lane] = "diverged"
        on_log(lane, step - len(metrics) + len(own), own)
    return tuple(after)


def place_lanes(
    batches: Sequence[RowsByStep], step: int, sharding: Sharding
) -> Int32[Array, "L B S"]:
    """A step's batches on the devices, of which each process reads what its own devices need.

    Args:
        batches: of each lane, the same in every process.
        step: counted from 0.
        sharding: of stacked batches.
    """

    def window(index: Any) -> np.ndarray:
        lanes, rows, columns = index
        own = batches[lanes]
        read = {each: each.batch_at(step, rows)[:, columns] for each in dict.fromkeys(own)}
        return np.stack([read[each] for each in own])

    return jax.make_array_from_callback((len(batches), *batches[0].shape), sharding, window)


def _number(leaf: Any) -> Any:
    """As `jax.jit` takes a number of Python."""
    if isinstance(leaf, int | float):
        return np.asarray(leaf, np.float32 if isinstance(leaf, float) else np.int32)
    return leaf
