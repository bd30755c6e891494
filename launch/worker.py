"""Runs some runs of a sweep, one after another, through programs compiled once a shape.

    python -m launch.worker --workdir=runs/sweep --runs=0a1b2c3d4e5f,…

`launch.sweep` starts workers and prints commands such as this one. With --runs=- the ids come on
standard input, one a line; when it closes, the worker ends, and where it is amid a run it saves
first, since whoever asked for it is gone. What happens is told on standard output, one JSON object
a line. Runs that are finished are skipped, others go on where they were.

Ids joined by + train together, as lanes of one program, if they were not begun; nothing is saved
before their end, so that killed lanes start again from the beginning.

Exit codes: 0 done; 2 bad input, or a file that cannot be read or written; 75 preempted by SIGTERM,
run the same command again.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from absl import flags

from launch import cpu, distributed
from launch.main import PREEMPTED, run

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep (required).")
_DATA_DIR = flags.DEFINE_string("data_dir", "runs/data", "Folder for prepared text.")
_RUNS = flags.DEFINE_string(
    "runs", "-", "Ids of runs, separated by commas; + joins lanes; - reads them."
)
_CORE = flags.DEFINE_integer("core", None, "Stay on this core if there is no accelerator.")
_CACHE_DIR = flags.DEFINE_string("cache_dir", None, "Folder for compiled programs.")
_CHECKPOINT_EVERY = flags.DEFINE_integer(
    "checkpoint_every", 0, "Steps between checkpoints; 0 saves at the end alone.", lower_bound=0
)
flags.adopt_module_key_flags(distributed)


def main(argv: list[str]) -> int:
    """Runs them; returns the exit code."""
    del argv
    before = cpu.stay_on([] if _CORE.value is None else [_CORE.value])
    distributed.start()
    import jax

    if jax.default_backend() != "cpu":
        cpu.stay_on(before)
    from launch.sweeps.working import Worker, asked, tell
    from qat.training.processes import PreemptedError

    if _CACHE_DIR.value is not None:
        cpu.keep_compiled(_CACHE_DIR.value)
    worker = Worker(Path(str(_WORKDIR.value)), Path(_DATA_DIR.value), _CHECKPOINT_EVERY.value)
    tell("ready", platform=jax.default_backend(), devices=jax.device_count())
    try:
        for lanes in asked(sys.stdin) if _RUNS.value == "-" else _named(_RUNS.value):
            worker.work(lanes.split("+"))
    except PreemptedError as stopped:
        print(f"preempted, {stopped}", file=sys.stderr, flush=True)
        return PREEMPTED
    return 0


def _named(runs: str) -> Iterable[str]:
    return [lanes for lanes in runs.split(",") if lanes]


if __name__ == "__main__":
    run(main, required=("workdir",))
