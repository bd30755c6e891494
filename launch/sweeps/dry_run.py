"""What `launch.sweep --dry_run` does: says what a sweep will cost, and runs nothing of it."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax

from launch import cpu
from launch.lab import Lab
from launch.sweeps.budget import Ptq, estimate, prices_of
from launch.sweeps.calibration import calibrate
from launch.sweeps.fitting import check_source
from launch.sweeps.gathering import finished, of_plan, read_earlier
from launch.sweeps.loading import load
from launch.sweeps.plan import Plan, experiments
from launch.sweeps.report import report


def run(
    path: Path,
    workers: int,
    *,
    data_dir: Path,
    have: Sequence[Path],
    calibrate_s: float,
    chips: int,
    utilisation: float,
    prices: Sequence[str],
) -> None:
    """Prints the budget of a sweep file; see `launch.sweep` for the flags.

    Raises:
        ValueError: bad input.
        OSError: a file or folder is not there.
    """
    sweep = load(path)
    runs = experiments(sweep)
    for each in {each.config["data"]["source"]: each for each in runs}.values():
        check_source(each)
    if have:
        lab = Lab(data_dir, jax.devices()[:1])
        table, lines = read_earlier(have)
        plan = Plan(sweep, {lab.run_id(each): each for each in runs})
        done = finished(lab, plan, of_plan(table, lab, plan, retry=()))
        runs = [each for run_id, each in plan.runs.items() if run_id not in done]
        print(*lines, f"{len(done)} of {len(plan.runs)} runs are done already", sep="\n")
        if not runs:
            return
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
