"""What `launch.sweep` does: plan, skip what is finished, run the rest, merge all rows."""

import contextlib
import dataclasses
import fcntl
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import pandas as pd

from launch.lab import Lab
from launch.main import DIVERGED, PREEMPTED, stopping
from launch.sweeps import cluster, failures, lanes, local
from launch.sweeps.commands import Job, deal, worker_command
from launch.sweeps.following import Following
from launch.sweeps.gathering import (
    ends,
    finished,
    forget,
    ids_of,
    is_left,
    merge,
    of_plan,
    read_earlier,
    runner,
    set_damaged_aside,
)
from launch.sweeps.loading import load
from launch.sweeps.plan import Plan, structures
from qat.sweep import slurm
from qat.training.files import PARTIAL

_CACHE = "compiled"
_MOST_TOLD = 3  # failures of earlier visits, or of other machines


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of `launch.sweep`."""

    workdir: Path
    data_dir: Path
    executor: str = "local"
    workers: int = 0
    have: tuple[Path, ...] = ()
    retry: frozenset[str] = frozenset()
    checkpoint_every: int = 0
    resources: slurm.Resources = dataclasses.field(default_factory=slurm.Resources)
    lanes: int = 1

    def say(self, line: str) -> None:
        """Prints a line, beside the commands where these are all of the output."""
        print(line, file=sys.stderr if self.executor == "emit" else sys.stdout, flush=True)


def run(path: Path, options: Options) -> int:
    """Runs a sweep file; returns the exit code.

    Raises:
        ValueError: bad input, before anything is written.
        OSError: a file cannot be read or written.
        StoppedError: by SIGTERM or Ctrl-C, once workers on this machine have saved.
    """
    sweep = load(path)
    table, lines = read_earlier(options.have)
    lab = Lab(options.data_dir, devices=jax.devices()[:1])
    plan = Plan.of(sweep, lab)
    for line in (*lines, *structures(list(plan.runs.values()))):
        options.say(line)
    earlier = of_plan(table, lab, plan, options.retry)
    with _owned(plan, options.workdir):
        plan.write(options.workdir)
        set_damaged_aside(lab, plan, options.workdir)
        forget(plan, options.workdir, options.retry)
        missing = _missing(lab, plan, options, earlier)
        options.say(f"{len(plan.runs) - len(missing)} of {len(plan.runs)} runs are done already")
        _tell_of_roundings(lab, plan, options, earlier, missing)
        try:
            if missing:
                _EXECUTORS[options.executor](lab, plan, missing, options)
        finally:
            table, lines = merge(plan, options.workdir, earlier)
            for line in lines:
                options.say(line)
        _tell_of_failures(plan, options, missing)
        return _summary(lab, plan, table, options, left=_missing(lab, plan, options, earlier))


def _missing(lab: Lab, plan: Plan, options: Options, earlier: pd.DataFrame) -> list[str]:
    """Runs that lack a row which can still be had, in the order of the grid."""
    had = finished(lab, plan, earlier)
    return [each for each in plan.runs if each not in had and _left(lab, plan, options, each)]


def _left(lab: Lab, plan: Plan, options: Options, run_id: str) -> bool:
    return is_left(lab, plan, options.workdir, run_id)


def _tell_of_roundings(
    lab: Lab, plan: Plan, options: Options, earlier: pd.DataFrame, missing: Sequence[str]
) -> None:
    """Says which roundings cannot be had, and what others cost."""
    late = [run_id for run_id in plan.runs if runner(lab, plan, options.workdir, run_id).too_late()]
    if late:
        options.say(f"ptq_at: {len(late)} runs are beyond shares asked for later, left out of them")
    own = set(earlier.loc[earlier["ptq_method"] == "none", "run_id"])
    again = [
        run_id
        for run_id in missing
        if ids_of(lab, plan.runs[run_id]) <= own and not _is_begun(plan, options, run_id)
    ]
    if again:
        options.say(f"--have: {len(again)} runs lack roundings there and are trained again")


def _tell_of_failures(plan: Plan, options: Options, missing: Sequence[str]) -> None:
    """Says why runs failed, but for those of which it has been said in this visit."""
    told = set(missing) if options.executor == "local" else set[str]()
    folders = {each: plan.folder(options.workdir, each) for each in plan.runs if each not in told}
    failed = [each for each, folder in folders.items() if (folder / failures.FILE).exists()]
    for run_id in failed[:_MOST_TOLD]:
        options.say(f"{plan.told(run_id)}: failed: {failures.reason(folders[run_id])}")


def _is_begun(plan: Plan, options: Options, run_id: str) -> bool:
    return plan.folder(options.workdir, run_id).exists()


@contextlib.contextmanager
def _owned(plan: Plan, workdir: Path) -> Iterator[None]:
    """Keeps other drivers out of the workdir.

    Raises:
        ValueError: it holds something else, or runs that are not in the plan, or is in use.
    """
    _check_ours(plan, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"workdir {workdir} is in use: the sweep is going on in it") from None
        except OSError:  # file systems without locks
            pass
        _check_ours(plan, workdir)  # another driver may have been faster
        yield


def _check_ours(plan: Plan, workdir: Path) -> None:
    """Raises ValueError for a folder of something else; a driver may have died before its plan."""
    if (workdir / "plan.json").exists():
        others = sorted(set(Plan.read(workdir).runs) - set(plan.runs))
        if others:
            raise ValueError(
                f"workdir {workdir} belongs to another sweep: this one lacks {len(others)} of its "
                f"runs, such as {others[0]}; choose another workdir, or add to the grid"
            )
    elif workdir.exists() and any(
        path.name != "lock" and path.suffix != PARTIAL for path in workdir.iterdir()
    ):
        raise ValueError(f"workdir {workdir} is not empty and no sweep made it; choose another")


def _run_here(lab: Lab, plan: Plan, missing: Sequence[str], options: Options) -> None:
    """Runs on this machine."""
    command = [*_command(options), "--runs=-"]
    pool = local.Pool(
        command, _jobs(plan, missing, options), options.workdir / "logs", options.workers
    )
    follow = Following(lab, plan, missing, options.workdir)
    with stopping(pool.stop), follow.meter:
        pool.run(follow)


def _emit(lab: Lab, plan: Plan, missing: Sequence[str], options: Options) -> None:
    """Prints a command for each group of runs."""
    del lab
    for hand in deal(_jobs(plan, missing, options), options.workers):
        print(shlex.join(_on(options, hand)))


def _jobs(plan: Plan, missing: Sequence[str], options: Options) -> list[Job]:
    """Runs, or those that train together as lanes."""
    groups = lanes.groups({run_id: plan.runs[run_id] for run_id in missing}, options.lanes)
    firsts = ((runs, plan.runs[runs[0]]) for runs in groups)
    return [Job(runs, each.shape, each.tokens * each.model.active_params) for runs, each in firsts]


def _command(options: Options) -> list[str]:
    """Of a worker, but for its runs."""
    flags = {
        "cache_dir": (options.data_dir / _CACHE).absolute(),
        "checkpoint_every": options.checkpoint_every,
    }
    return worker_command(options.workdir, options.data_dir, flags)


def _run_on_cluster(lab: Lab, plan: Plan, missing: Sequence[str], options: Options) -> None:
    """Follows what was submitted before, then submits what is left, and follows that."""
    folder, left = options.workdir / "slurm", list(missing)

    def done() -> int:
        left[:] = [each for each in left if _left(lab, plan, options, each)]
        return len(missing) - len(left)

    if earlier := cluster.alive(folder):
        cluster.follow(earlier, done, len(missing))
    if done() < len(missing):
        hands = deal(_jobs(plan, left, options), options.workers)
        jobs = slurm.submit([_on(options, hand) for hand in hands], folder, options.resources)
        cluster.follow(jobs, done, len(missing))


def _on(options: Options, hand: Sequence[Job]) -> list[str]:
    """The command of a worker for some runs."""
    return [*_command(options), f"--runs={','.join(job.word for job in hand)}"]


_EXECUTORS = {"local": _run_here, "slurm": _run_on_cluster, "emit": _emit}


def _summary(
    lab: Lab, plan: Plan, table: pd.DataFrame, options: Options, left: Sequence[str]
) -> int:
    """Prints how the runs ended; returns the exit code."""
    counts = ends(lab, plan, table)
    told = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    bad = sum((table["ptq_method"] != "none") & table["status"].isin(["failed", "diverged"]))
    words = [
        f"{told or '0 done'} of {len(plan.runs)} runs",
        *([f"{bad} roundings failed"] if bad else []),
        *([f"{len(left)} runs are left"] if left else []),
        f"{len(table)} rows in {options.workdir}",
    ]
    options.say("; ".join(words))
    if left and options.executor != "emit":
        print("preempted; the same command goes on from here", file=sys.stderr)
        return PREEMPTED
    return DIVERGED if bad or set(counts) - {"ok"} else 0
