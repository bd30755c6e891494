"""What `launch.sweep --dry_run` does: says what a sweep will cost, and runs nothing of it."""

import functools
from collections.abc import Sequence
from pathlib import Path

from launch import cpu
from launch.sweeps.budget import Ptq, estimate, prices_of
from launch.sweeps.calibration import calibrate
from launch.sweeps.driving import load
from launch.sweeps.plan import experiments
from launch.sweeps.report import report


def run(
    path: Path,
    workers: int,
    *,
    calibrate_s: float,
    chips: int,
    utilisation: float,
    prices: Sequence[str],
) -> None:
    """Prints the budget of a sweep file; see `launch.sweep` for the flags.

    Raises:
        ValueError: bad input.
    """
    sweep = load(path)
    runs = experiments(sweep)
    workers = workers or min(len(cpu.cores()), len(runs))
    budget = functools.partial(
        estimate,
        runs,
        workers,
        ptq=Ptq(sweep.ptq_methods, sweep.ptq_formats, sweep.ptq_at),
        chips=chips,
        utilisation=utilisation,
        prices=prices_of(prices),
    )
    budget()  # so that bad numbers need not wait for the timing
    timed = calibrate(runs, calibrate_s, workers) if calibrate_s else None
    print(report(budget(calibration=timed)))
