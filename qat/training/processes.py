"""What the processes of a run must do alike: decide, stop, and see the same batch.

A run of several processes is one program: each must take the same steps in the same order. So
whatever depends on files or signals, which may look different from another machine, is decided
once and told to all. A run of one process takes the same paths, without messages.
"""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding


class PreemptedError(Exception):
    """The machine is wanted back; the state is saved and the same run can go on elsewhere."""


class FailedElsewhereError(ValueError):
    """The first process failed and says why."""


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def agree(decide: Callable[[], int]) -> int:
    """What the first process decides; to be called by all, which wait for it.

    Args:
        decide: returns an integer of 32 bits; called in the first process alone.

    Raises:
        FailedElsewhereError: in the other processes, where `decide` raised ValueError or OSError in
            the first, which raises that.
    """
    if jax.process_count() == 1:
        return decide()
    error: Exception | None = None
    value = 0
    if is_first():
        try:
            value = decide()
        except (ValueError, OSError) as caught:
            error = caught
    told = multihost_utils.broadcast_one_to_all(np.array([value, error is not None], np.int32))
    if error is not None:
        raise error
    if told[1]:
        raise FailedElsewhereError("the first process failed; its own line says why")
    return int(told[0])


class RowsByStep(Protocol):
    """Batches of which any rows can be had; see `qat.training.data.Batches`."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of a batch of the whole run."""
        ...

    def batch_at(self, step: int, rows: slice = ...) -> np.ndarray:
        """Rows of the batch of a step."""
        ...

    def __len__(self) -> int:
        """Number of steps."""
        ...


def place(batches: RowsByStep, step: int, sharding: Sharding) -> jax.Array:
    """A step's batch on the devices, of which each process reads what its own devices need.

    Args:
        batches: the same in every process.
        step: counted from 0.
        sharding: of a batch, over the devices of all processes.
    """
    whole_BS = batches.batch_at(step) if jax.process_count() == 1 else None

    def window(index: Any) -> np.ndarray:
        rows, columns = index
        if whole_BS is None:
            rows_BS: np.ndarray = batches.batch_at(step, rows)
        else:  # devices of one process often need the same rows
            rows_BS = whole_BS[rows]
        part: np.ndarray = rows_BS[:, columns]
        return part

    return jax.make_array_from_callback(batches.shape, sharding, window)


class Preemption:
    """Listens to SIGTERM, by which Slurm and TPU maintenance announce that they will stop a run.

    In a run of several processes JAX's coordination service listens instead, from
    `jax.distributed.initialize` on, and chooses a step that no process has reached yet; asking
    costs no communication until some process has been told. Use as a context, in the main thread.
    """

    def __init__(self) -> None:
        self._told = False
        self._asked = 0
        self._before: Any = None

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def __call__(self) -> bool:
        """Whether to stop now; to be asked before every step, by all processes alike."""
        if jax.process_count() == 1:
            return self._told
        self._asked += 1
        stop: bool = multihost_utils.reached_preemption_sync_point(self._asked)
        return stop

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._told = True
