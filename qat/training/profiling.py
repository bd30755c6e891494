"""A window of training steps recorded by JAX's profiler.

The loop knows nothing of it: `profiled` gives it another train step, which starts and stops the
recording and otherwise is the old one. The trace opens in TensorBoard's profile plugin, XProf or
Perfetto; the scopes of quantized layers are named in it.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from qat.training.step import Programs

_WINDOW = re.compile(r"(\d+):(\d+)")


def parse_window(text: str, total_steps: int) -> range:
    """Reads "start:stop", steps counted from 0, the last excluded, as in Python.

    Args:
        text: such as "10:13" for steps 10, 11 and 12. Step 0 compiles.
        total_steps: of the run.

    Raises:
        ValueError: not a window, an empty one, or one that begins after the run.
    """
    match = _WINDOW.fullmatch(text)
    window = range(int(match[1]), int(match[2])) if match else range(0)
    if not window or window.start >= total_steps:
        start = min(10, max(total_steps - 1, 0))
        raise ValueError(
            f"profile {text!r}: expected start:stop with start below stop and below the run's "
            f"{total_steps} steps, such as '{start}:{min(start + 3, total_steps)}'"
        )
    return window


@contextlib.contextmanager
def profiled(programs: Programs, window: range, folder: Path) -> Iterator[Programs]:
    """The programs of a run, whose train step records a window of steps.

    Args:
        programs: of the run.
        window: steps, counted from that of the first state which the train step is given.
        folder: each recording gets a folder of its own below it, named by its time.
    """
    recorder = _Recorder(programs.train_step, window, folder)
    try:
        yield dataclasses.replace(programs, train_step=recorder)
    finally:
        recorder.stop(None)


class _Recorder:
    """A train step that counts its calls; counting on the host keeps steps from waiting."""

    def __init__(self, train_step: Any, window: range, folder: Path):
        self._train_step, self._window, self._folder = train_step, window, folder
        self._step: int | None = None
        self._recording = False

    def __call__(self, state: Any, *args: Any) -> Any:
        """One step."""
        if self._step is None:
            self._step = int(state.step)
        if self._step in self._window and not self._recording:
            jax.block_until_ready(state)  # what came before stays out of the trace
            jax.profiler.start_trace(self._folder)
            self._recording = True
        with jax.profiler.StepTraceAnnotation("train", step_num=self._step):
            result = self._train_step(state, *args)
        self._step += 1
        if self._step not in self._window:
            self.stop(result)
        return result

    def stop(self, result: Any) -> None:
        """Ends a recording, if there is one, when the result is there."""
        if self._recording:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._recording = False
