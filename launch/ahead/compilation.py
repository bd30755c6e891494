"""The real train step, compiled for devices that are not there.

Everything is abstract: the state by `jax.eval_shape`, the batch by its shape. What comes back is
what the compiler says of memory and what its program does, or by how much it does not fit.
"""

import contextlib
import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from launch.experiment import Experiment
from launch.lab import Lab, blank_constants
from qat.training.census import Census, census

_FAST = {"exec_time_optimization_effort": -1.0}
# The compiler says "Used 20.00G of 15.75G hbm" or "… (20.00G) exceeds available HBM (15.75G)".
_TOO_LARGE = re.compile(
    r"([\d.]+)([KMGT]?)(?: of |\) exceeds available HBM \()([\d.]+)([KMGT]?)(?: hbm|\))"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SECONDS_BETWEEN_LINES = 30.0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a device that a step needs.

    Attributes:
        arguments: state, constants and batch.
        outputs: state and metrics.
        aliased: outputs that take the place of arguments.
        temporaries: everything in between, at its largest.
        program: the code.
        peak: most at any moment, by the compiler's count.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    program: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step that fits.

    Attributes:
        seconds: of compiling.
        memory: needed.
        census: of matrix products and collectives.
    """

    seconds: float
    memory: Memory
    census: Census


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A step that does not fit.

    Attributes:
        seconds: of compiling.
        needed: bytes a device, by the compiler's count.
        limit: bytes that it may use.
    """

    seconds: float
    needed: int
    limit: int


def abstract_state(experiment: Experiment, devices: Sequence[jax.Device]) -> tuple[Any, Any]:
    """Shapes of the training state and their placement on the experiment's mesh.

    Raises:
        ValueError: the mesh does not fit the devices or the shapes.
    """
    programs = Lab(Path(), devices).programs(experiment)
    return jax.eval_shape(programs.init_state, jnp.uint32(0)), programs.state_sharding


def compile_step(
    experiment: Experiment,
    devices: Sequence[jax.Device],
    *,
    fast: bool = False,
    say: Callable[[str], None] = print,
) -> Compiled | TooLarge:
    """Compiles an experiment's train step.

    Args:
        experiment: its config's mesh is laid over the devices.
        devices: of a slice.
        fast: the compiler takes less trouble, and needs another amount of temporary memory.
        say: prints a line of progress.

    Raises:
        ValueError: the mesh does not fit the devices or the shapes, or the compiler refuses the
            step for another reason than memory.
    """
    programs = Lab(Path(), devices).programs(experiment)
    step: Any = programs.train_step
    state = jax.eval_shape(programs.init_state, jnp.uint32(0))
    constants = jax.eval_shape(lambda: blank_constants(experiment))
    data = experiment.config["data"]
    window = data["sequence_length"] + 1
    tokens_BS = jax.ShapeDtypeStruct((experiment.config["batch_size"], window), jnp.int32)
    lowered = step.lower(state, constants, experiment.schedule, tokens_BS)
    start = time.monotonic()
    with _ticking(say):
        try:
            compiled = lowered.compile(compiler_options=_FAST if fast else None)
        except jax.errors.JaxRuntimeError as error:
            needed, limit = _shortage(error)
            return TooLarge(time.monotonic() - start, needed, limit)
    seconds = time.monotonic() - start
    return Compiled(seconds, _memory(compiled.memory_analysis()), census(compiled.as_text()))


def _shortage(error: jax.errors.JaxRuntimeError) -> tuple[int, int]:
    """Bytes needed and bytes there are, if that is what the compiler complains of.

    Raises:
        ValueError: it complains of something else.
    """
    found = _TOO_LARGE.search(str(error))
    if found is None:
        raise ValueError(f"the compiler refuses this step: {str(error)[:500]}") from error
    needed, needed_unit, limit, limit_unit = found.groups()
    return round(float(needed) * _UNITS[needed_unit]), round(float(limit) * _UNITS[limit_unit])


def _memory(stats: Any) -> Memory:
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        program=stats.generated_code_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
    )


@contextlib.contextmanager
def _ticking(say: Callable[[str], None]) -> Iterator[None]:
    """Says every half minute that the compiler is still at it."""
    done, start = threading.Event(), time.monotonic()

    def tick() -> None:
        while not done.wait(_SECONDS_BETWEEN_LINES):
            say(f"  … compiling for {time.monotonic() - start:.0f} s")

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
