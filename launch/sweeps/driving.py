"""What `launch.sweep` does: plan, skip what is finished, run the rest, merge all rows."""

import collections
import contextlib
import dataclasses
import fcntl
import importlib.util
import shlex
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import pandas as pd

from launch.experiment import Experiment
from launch.lab import Lab
from launch.main import DIVERGED, PREEMPTED
from launch.progress import Meter
from launch.runner import ROWS, Runner, Saving
from launch.sweeps import cluster, lanes, local
from launch.sweeps.commands import Job, deal, worker_command
from launch.sweeps.plan import Plan, structures
from launch.sweeps.rounding import FOLDER, UNFINISHED, Rounding
from launch.sweeps.working import WATCHING, fail
from qat.sweep import Sweep, slurm
from qat.sweep.table import collect, finished, write
from qat.training.checkpoint import DAMAGED
from qat.training.files import naming
from qat.training.results import rows_of, write_rows

_CACHE = "compiled"


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
    """
    sweep = load(path)
    lab = Lab(options.data_dir, devices=jax.devices()[:1])
    plan = Plan.of(sweep, lab)
    for line in structures(list(plan.runs.values())):
        options.say(line)
    earlier = _earlier(lab, plan, options)
    with _owned(plan, options.workdir):
        plan.write(options.workdir)
        _set_damaged_aside(plan, options.workdir)
        _forget(plan, options.workdir, options.retry)
        had = finished(earlier, {"ok", "diverged", "failed"})
        missing = [
            run_id
            for run_id, experiment in plan.runs.items()
            if not _ids(lab, experiment) <= had and _is_left(lab, plan, options.workdir, run_id)
        ]
        options.say(f"{len(plan.runs) - len(missing)} of {len(plan.runs)} runs are done already")
        if late := sum(
            bool(_runner(lab, plan, options.workdir, each).too_late()) for each in plan.runs
        ):
            options.say(f"ptq_at: {late} runs are beyond shares asked for later, left out of them")
        try:
            if missing:
                _EXECUTORS[options.executor](lab, plan, missing, options)
        finally:
            table = _merge(plan, options, earlier)
    return _summary(plan, table, options)


def _earlier(lab: Lab, plan: Plan, options: Options) -> pd.DataFrame:
    """Rows of this sweep's runs in earlier tables, without those to be tried again.

    Raises:
        OSError: a table cannot be read.
    """
    for path in options.have:
        with naming(path):
            path.open("rb").close()
    found = collect(options.have)
    for line in found.left_out:
        options.say(f"left out of --have: {line}")
    table = found.table
    ids = {run_id for each in plan.runs.values() for run_id in _ids(lab, each)}
    again = set(table.loc[table["status"].isin(list(options.retry)), "run_id"])
    return table[table["run_id"].isin(ids - again)]


def load(path: Path) -> Sweep:
    """The sweep of a Python file.

    Raises:
        ValueError: there is no such file, or no `get_sweep()` in it that returns one.
    """
    spec = importlib.util.spec_from_file_location("sweep_file", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"--sweep={path}: expected a Python file with get_sweep()")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sweep = module.get_sweep() if hasattr(module, "get_sweep") else None
    if not isinstance(sweep, Sweep):
        raise ValueError(f"--sweep={path}: expected a function get_sweep() -> qat.sweep.Sweep")
    return sweep


@contextlib.contextmanager
def _owned(plan: Plan, workdir: Path) -> Iterator[None]:
    """Keeps other drivers out of the workdir.

    Raises:
        ValueError: it holds something else, or runs that are not in the plan, or is in use.
    """
    if workdir.exists() and any(workdir.iterdir()) and not (workdir / "plan.json").exists():
        raise ValueError(f"workdir {workdir} is not empty and no sweep made it; choose another")
    if (workdir / "plan.json").exists():
        others = sorted(set(Plan.read(workdir).runs) - set(plan.runs))
        if others:
            raise ValueError(
                f"workdir {workdir} belongs to another sweep: this one lacks {len(others)} of its "
                f"runs, such as {others[0]}; choose another workdir, or add to the grid"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"workdir {workdir} is in use: the sweep is going on in it") from None
        except OSError:  # file systems without locks
            pass
        yield


def _ids(lab: Lab, experiment: Experiment) -> set[str]:
    """Of all budgets of a run."""
    budgets = (*experiment.branches, experiment.schedule)
    return {lab.run_id(experiment, schedule) for schedule in budgets}


def _is_left(lab: Lab, plan: Plan, workdir: Path, run_id: str) -> bool:
    """Whether a run has anything left to do."""
    return bool(_runner(lab, plan, workdir, run_id).milestones())


def _runner(lab: Lab, plan: Plan, workdir: Path, run_id: str) -> Runner:
    """What knows of a run's files."""
    experiment, folder = plan.runs[run_id], plan.folder(workdir, run_id)
    looks = Rounding(lab, experiment, folder, plan.sweep)
    return Runner(lab, experiment, folder, Saving(0, 1, 0), lambda: False, WATCHING, looks)


def _set_damaged_aside(plan: Plan, workdir: Path) -> None:
    """Renames files of rows that do not read, with a warning; their runs are evaluated again."""
    for run_id in plan.runs:
        folder = plan.folder(workdir, run_id)
        for path in (folder / ROWS, folder / FOLDER / ROWS):
            if path.exists() and (reasons := collect([path]).left_out):
                path.replace(path.with_name(f"{path.name}{DAMAGED}"))
                print(f"warning: {reasons[0]}; renamed to {path.name}{DAMAGED}", file=sys.stderr)


def _forget(plan: Plan, workdir: Path, statuses: Collection[str]) -> None:
    """Drops rows of these statuses, so that their runs are tried again."""
    for run_id in plan.runs:
        folder = plan.folder(workdir, run_id)
        rows = rows_of(folder)
        kept = [row for row in rows if row.status not in statuses]
        if len(kept) < len(rows):
            write_rows(folder / ROWS, kept)


def _run_here(lab: Lab, plan: Plan, missing: Sequence[str], options: Options) -> None:
    """Runs on this machine."""
    command = [*_command(options), "--runs=-"]
    pool = local.Pool(
        command, _jobs(plan, missing, options), options.workdir / "logs", options.workers
    )
    counts: collections.Counter[str] = collections.Counter()
    tokens = sum(plan.runs[run_id].tokens for run_id in missing) / 1e6
    with Meter("Training", tokens, "million tokens") as meter:

        def on_event(event: local.Event) -> None:
            kind, run_id = event["event"], event["run"]
            if kind == "skipped":
                meter.skip(event["tokens"] / 1e6)
            elif kind == "trained":
                left = len(missing) - sum(counts.values())
                note = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
                meter.advance(event["tokens"] / 1e6, f"{note or '0 done'}, {left} left")
            elif kind == "done":
                counts[event["status"]] += 1
                if event["status"] != "ok":
                    meter.say(f"run {run_id}: {event['status']}")
            elif kind == "lost":
                meter.say(f"run {run_id}: its worker died: {event['reason']}")
                if event["given_up"]:
                    counts["failed"] += 1
                    fail(lab, plan, options.workdir, run_id, f"a worker died: {event['reason']}\n")

        pool.run(on_event)


def _emit(lab: Lab, plan: Plan, missing: Sequence[str], options: Options) -> None:
    """Prints a command for each group of runs."""
    del lab
    for hand in deal(_jobs(plan, missing, options), options.workers):
        print(shlex.join(_on(options, hand)))


def _jobs(plan: Plan, missing: Sequence[str], options: Options) -> list[Job]:
    """Runs, or those that train together as lanes."""
    groups = lanes.groups({run_id: plan.runs[run_id] for run_id in missing}, options.lanes)
    firsts = ((runs, plan.runs[runs[0]]) for runs in groups)
    return [Job(runs, each.shape, each.tokens * each.model.params) for runs, each in firsts]


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
        left[:] = [each for each in left if _is_left(lab, plan, options.workdir, each)]
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


def _merge(plan: Plan, options: Options, earlier: pd.DataFrame) -> pd.DataFrame:
    """All rows of the sweep, on the disk and returned."""
    files = [
        path
        for run_id in plan.runs
        for folder in (plan.folder(options.workdir, run_id),)
        for path in (folder / ROWS, folder / FOLDER / ROWS)
        if path.exists()
    ]
    found = collect(files)
    for line in found.left_out:
        options.say(f"left out: {line}")
    new = set(found.table["run_id"])
    table = pd.concat([earlier[~earlier["run_id"].isin(new)], found.table], ignore_index=True)
    write(table, options.workdir)
    return table


def _summary(plan: Plan, table: Any, options: Options) -> int:
    """Prints how the runs ended; returns the exit code."""
    ends = table[(table["ptq_method"] == "none") & (table["status"] != UNFINISHED)]
    counts = ends["status"].value_counts()
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    options.say(
        f"{told or 'nothing'} of {len(plan.runs)} runs; {len(table)} rows in {options.workdir}"
    )
    if len(set(plan.runs) - set(ends["run_id"])) and options.executor != "emit":
        print("preempted; the same command goes on from here", file=sys.stderr)
        return PREEMPTED
    return 0 if set(counts.index) <= {"ok"} else DIVERGED
