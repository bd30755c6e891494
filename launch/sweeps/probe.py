"""A worker of the calibration: compiles train steps, and times them when all workers are ready.

    python -m launch.sweeps.probe

Reads one JSON object from standard input, what to time; answers with the seconds that importing
and compiling took; waits for a number of seconds, times for that long and answers with the seconds
of a step and the share of a core it got. Every answer is a JSON object on a line. Where standard
input ends early, so does this.

Tokens are random, so that no corpus is needed, but drawn as those of a corpus are, because a small
model's step is short beside that. The state is random too, which spares compiling what makes it.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch import cpu

_SLICE_S = 0.3  # at least so long is one step function timed before the next has its turn
_WINDOWS = 256  # of random tokens


def main() -> None:
    """Answers the parent's two questions."""
    job = json.loads(sys.stdin.readline())
    cpu.stay_on([job["core"]])
    cpu.keep_freed_memory()
    import launch.lab  # noqa: F401  (takes seconds, which are part of the question)

    import_s = time.time() - job["started"]
    steps, compile_s = [], []
    for config in job["configs"]:
        steps.append(_train_step(config))
        start = time.perf_counter()
        steps[-1](1)
        compile_s.append(time.perf_counter() - start)
    print(json.dumps({"import_s": import_s, "compile_s": compile_s}), flush=True)
    if line := sys.stdin.readline():
        start, busy = time.perf_counter(), time.process_time()
        step_s = _timed(steps, json.loads(line))
        core_share = (time.process_time() - busy) / (time.perf_counter() - start)
        print(json.dumps({"step_s": step_s, "core_share": core_share}), flush=True)


def _timed(steps: Sequence[Callable[[int], None]], seconds: float) -> list[float]:
    """Seconds of a step of each function, which take turns for about so long, at least once."""
    end = time.perf_counter() + seconds
    counts, taken, spent = [1] * len(steps), [0] * len(steps), [0.0] * len(steps)
    while not all(taken) or time.perf_counter() < end:
        for index, step in enumerate(steps):
            start = time.perf_counter()
            step(counts[index])
            took = time.perf_counter() - start
            taken[index] += counts[index]
            spent[index] += took
            counts[index] *= 1 if took > _SLICE_S else 2
    return [s / n for s, n in zip(spent, taken, strict=True)]


def _train_step(config: Mapping[str, Any]) -> Callable[[int], None]:
    """What takes a number of train steps of a config and waits for the last."""
    from pathlib import Path

    import grain
    import jax
    import numpy as np

    from launch.experiment import Experiment
    from launch.lab import Lab, blank_constants
    from qat.training.data import Batches
    from qat.training.processes import place

    experiment, random = Experiment.from_config(config), np.random.default_rng(0)
    programs = Lab(Path(), jax.devices()[:1]).programs(experiment)
    constants = blank_constants(experiment)
    size, length = config["batch_size"], config["data"]["sequence_length"]
    windows = max(_WINDOWS, size)
    tokens_NS = random.integers(0, experiment.model.vocabulary, (windows, length + 1))
    order = grain.MapDataset.range(windows).seed(0).shuffle().repeat()
    batches = Batches(tokens_NS, order, size)

    abstract = jax.eval_shape(programs.init_state, np.uint32(0))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    params = jax.tree.map(
        lambda leaf: random.uniform(0.01, 0.02, leaf.shape).astype(leaf.dtype), abstract.params
    )
    state = jax.device_put(zeros._replace(params=params), programs.state_sharding)
    taken = 0

    def step(count: int) -> None:
        nonlocal state, taken
        for _ in range(count):
            tokens_BS = place(batches, taken, programs.batch_sharding)
            state, _ = programs.train_step(state, constants, experiment.schedule, tokens_BS)
            taken += 1
        jax.block_until_ready(state)

    return step


if __name__ == "__main__":
    main()
