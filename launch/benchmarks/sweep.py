"""The suite "sweep": runs an hour of `launch.sweep` against a loop over `launch.train`.

The loop starts a process for each run, which imports, compiles, trains and evaluates with all
cores. It is timed on a sample spread over the grid, with the text prepared beforehand for both; the
sweep is timed whole, with nothing compiled before. Two runs of the sample are made once more on
one core, as the sweep makes them: their losses must be the sweep's, bit for bit.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import cpu, timing
from launch.experiment import Experiment
from launch.lab import Lab
from launch.progress import Meter
from launch.sweeps.loading import load
from launch.sweeps.plan import Plan
from qat.training.results import rows_of

Row = dict[str, Any]

SWEEP = Path("configs/sweeps/benchmark.py")
_SAMPLE = 6  # runs of the loop
_CHECKED = 2  # of them, on one core


def run(path: Path = SWEEP) -> list[Row]:
    """Measures and prints.

    Args:
        path: sweep file.

    Returns:
        A row for each way.

    Raises:
        OSError: a program failed.
    """
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        lab = Lab(place / "data")
        plan = Plan.of(load(path), lab)
        sample = list(plan.runs)[:: max(1, len(plan.runs) // _SAMPLE)][:_SAMPLE]
        flags = [f"--sweep={path.absolute()}", f"--workdir={place / 'sweep'}"]
        sweep_s = _time("launch.sweep", [*flags, f"--data_dir={place / 'data'}"])
        loop_s = [_train(place, "loop", run_id, plan.runs[run_id]) for run_id in _told(sample)]
        before = cpu.stay_on(cpu.cores()[:1])
        for run_id in sample[:_CHECKED]:
            _train(place, "one_core", run_id, plan.runs[run_id])
        cpu.stay_on(before)
        differences = [
            abs(_loss(place / way / run_id) - _loss(plan.folder(place / "sweep", run_id)))
            for way, ids in (("loop", sample), ("one_core", sample[:_CHECKED]))
            for run_id in ids
        ]
    rows: list[Row] = [
        {"way": "loop of processes", "runs": len(sample), "seconds": sum(loop_s)},
        {"way": "sweep", "runs": len(plan.runs), "seconds": sweep_s},
    ]
    for row in rows:
        row["runs_per_hour"] = 3600 * row["runs"] / row["seconds"]
        row["ratio"] = row["runs_per_hour"] / rows[0]["runs_per_hour"]
        row["difference_all_cores"] = max(differences[: len(sample)])
        row["difference_one_core"] = max(differences[len(sample) :])
    print(f"\n{_table(rows)}")
    return rows


def _told(sample: Sequence[str]) -> Any:
    """The sample, with a meter beside it."""
    with Meter("Looping", len(sample), "runs") as meter:
        for run_id in sample:
            yield run_id
            meter.advance(1)


def _train(place: Path, way: str, run_id: str, experiment: Experiment) -> float:
    """One run by a process of its own; the seconds it takes."""
    config = place / f"{run_id}.py"
    config.write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({dict(experiment.config)!r})\n"
    )
    flags = [f"--config={config}", f"--workdir={place / way / run_id}", "--checkpoint_every=0"]
    return _time("launch.train", [*flags, f"--data_dir={place / 'data'}", "--notensorboard"])


def _time(program: str, flags: Sequence[str]) -> float:
    """Seconds of a program.

    Raises:
        OSError: it failed.
    """
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", program, *flags], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise OSError(f"{program} ended with exit code {done.returncode}: {done.stderr.strip()}")
    return time.perf_counter() - start


def _loss(folder: Path) -> float:
    (row,) = rows_of(folder)
    return row.loss


def _table(rows: Sequence[Row]) -> str:
    head = ("way", "runs", "seconds", "runs/hour", "ratio", "largest difference of losses")
    lines = [
        (
            row["way"],
            f"{row['runs']}",
            f"{row['seconds']:.1f}",
            f"{row['runs_per_hour']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['difference_one_core']:g}, {row['difference_all_cores']:g} on all cores",
        )
        for row in rows
    ]
    return timing.table(head, lines, text_columns=1)
