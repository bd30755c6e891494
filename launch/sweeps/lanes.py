"""Runs of a sweep as lanes of one program, each in its own folder as if it were alone.

Lanes are runs that share compiled programs and take the same number of steps; what they learn from
and at which precision, rate and seed is data. They train side by side from the beginning to the
end, stand still together for what a sweep measures on the way, and save nothing before the end: a
group that is killed starts again. At the end each has its checkpoint, then its row, by the code
that a run alone goes through. On a mesh they are spread over devices, a run on each if there are
enough; the places that are left over train copies of the last lane, of which nothing is kept.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from launch.experiment import Experiment
from launch.runner import CURVE, Runner
from models.task import constants_for
from qat.training import curve
from qat.training.lanes import Lanes, begin, lane_of, stack, train_lanes
from qat.training.loop import TrainingResult
from qat.training.processes import is_first
from qat.training.step import Metrics


def groups(runs: Mapping[str, Experiment], most: int) -> list[tuple[str, ...]]:
    """Ids of runs by which train together, but for those that train alone.

    Groups of a kind differ in size by one at most, so that few programs are compiled.

    Args:
        runs: experiments by run id.
        most: runs in a group; 1 is every run alone.
    """
    kinds: dict[object, list[str]] = defaultdict(list)
    for run_id, experiment in runs.items():
        kinds[run_id if experiment.alone else _kind(experiment)].append(run_id)
    counts = {kind: -(-len(ids) // most) for kind, ids in kinds.items()}
    return [
        tuple(ids[i :: counts[kind]]) for kind, ids in kinds.items() for i in range(counts[kind])
    ]


def check(runs: Sequence[Experiment]) -> None:
    """Makes sure that runs can be lanes of one program; one alone always can.

    Raises:
        ValueError: their shapes or numbers of steps differ, or one trains alone.
    """
    if len(runs) > 1 and (len({_kind(each) for each in runs}) > 1 or runs[0].alone):
        raise ValueError(
            f"{len(runs)} runs cannot train together: expected one shape, one number of steps and "
            "neither branches nor checkpoints to begin with; separate them by commas"
        )


def go_on(runs: Sequence[Runner]) -> None:
    """Trains and measures those of the runs that were not begun, if there are several.

    Args:
        runs: in folders that they have for themselves, each with a meter; `check` has passed.

    Raises:
        ValueError: a folder's files are not those of its run.
        OSError: a file cannot be read or written.
        PreemptedError: their `preempted` said so; nothing is saved.
    """
    lanes = [run for run in runs if _is_fresh(run)]
    if len(lanes) > 1:
        _train(lanes)


def _kind(experiment: Experiment) -> tuple[str, int, bool]:
    """What runs that train together have in common."""
    return experiment.shape, experiment.schedule.total_steps, experiment.alone


def _is_fresh(run: Runner) -> bool:
    """Whether nothing of a run is done that could be gone on from."""
    schedule = run.experiment.schedule
    if run.has_row(schedule):
        return False
    with run.checkpoints(run.workdir, schedule) as checkpoints:
        return run.lab.restored(run.experiment, checkpoints) is None


def _train(runs: Sequence[Runner]) -> None:
    """All runs to their ends, standing still where any is to be measured."""
    if is_first():
        for run in runs:
            curve.rewind(run.workdir / CURVE, 0)
    end = runs[0].experiment.schedule.total_steps
    wall_s = 0.0
    for stop, lanes, seconds in _stretches(runs):
        wall_s += seconds / len(runs)
        if stop == end:
            _save(runs, lanes)
        for lane, run in enumerate(runs):
            _measure(run, stop, _result(run, lanes, lane), wall_s)


def _stretches(runs: Sequence[Runner]) -> Iterator[tuple[int, Lanes, float]]:
    """Where to stand still, how the lanes are there, and the seconds since the last stop.

    What is yielded is consumed by the next stretch.
    """
    first, lab = runs[0].experiment, runs[0].lab
    axis = lab.lane_axis(first, len(runs))
    padded = [*runs, *[runs[-1]] * (-len(runs) % axis)]
    experiments = [run.experiment for run in padded]
    constants = stack([constants_for(each.model, each.policy) for each in experiments])
    schedules = stack([each.schedule for each in experiments])
    batches = {each.config["seed"]: lab.batches(each)[0] for each in experiments}
    programs = lab.programs(first, run=axis)

    def on_log(lane: int, step: int, metrics: Sequence[Metrics]) -> None:
        if lane < len(runs):
            if is_first():
                curve.append(runs[lane].workdir / CURVE, step, metrics)
            if meter := runs[lane].meter:
                meter.advance(len(metrics))

    lanes = begin(programs, [each.config["seed"] for each in experiments])
    for stop in sorted({step for run in runs for step, _, _ in run.milestones()}):
        start = time.perf_counter()
        lanes = train_lanes(
            programs,
            lanes,
            constants,
            schedules,
            [batches[each.config["seed"]] for each in experiments],
            stop=stop,
            loss_limit=first.loss_limit,
            on_log=on_log,
            preempted=runs[0].preempted,
        )
        yield stop, lanes, time.perf_counter() - start


def _result(run: Runner, lanes: Lanes, lane: int) -> TrainingResult:
    """How a lane's training ended, as if it had been alone; its losses are in its curve."""
    shardings = run.lab.programs(run.experiment).state_sharding
    return TrainingResult(lane_of(lanes.state, lane, shardings), lanes.statuses[lane], {})


def _save(runs: Sequence[Runner], lanes: Lanes) -> None:
    """A checkpoint of each run that has not diverged, before any is measured."""
    for lane, run in enumerate(runs):
        result = _result(run, lanes, lane)
        if result.status == "ok":
            with run.checkpoints(run.workdir, run.experiment.schedule) as checkpoints:
                checkpoints.save(result.state)


def _measure(run: Runner, stop: int, result: TrainingResult, wall_s: float) -> None:
    """What a run is to have measured after so many steps."""
    for step, _, schedule in run.milestones():
        if step == stop and schedule is not None:
            run.conclude(schedule, result, wall_s)
        elif step == stop and result.status == "ok":
            run.looks.look(run.experiment.schedule, result)
