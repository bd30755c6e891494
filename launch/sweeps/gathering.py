"""The rows of a sweep: those of earlier tables, those of its runs, and what they add up to.

A run is finished when every row that it is to have is there, those of its roundings included. What
an earlier table has of a run that is not finished saves nothing, for there is no checkpoint to
round: the run is trained again. In a table of several sources a result stands before an attempt
that failed, row by row.
"""

import collections
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import pandas as pd

from launch.experiment import Experiment
from launch.lab import Lab
from launch.runner import ROWS, Runner, Saving
from launch.sweeps import failures
from launch.sweeps.plan import Plan
from launch.sweeps.rounding import FOLDER, Measurement, Rounding
from launch.sweeps.working import WATCHING
from qat.sweep.table import Collected, collect, measured, union, write
from qat.training.checkpoint import DAMAGED
from qat.training.files import naming
from qat.training.results import rows_of, write_rows

_WORST = ("failed", "diverged", "ok")


def read_earlier(paths: Sequence[Path]) -> tuple[pd.DataFrame, list[str]]:
    """The rows of earlier tables, and lines about what of them is not heeded.

    Raises:
        ValueError: a table cannot be read, or holds no row.
        OSError: it cannot be opened.
    """
    for path in paths:
        with naming(path):
            path.open("rb").close()
        alone = collect([path])
        if alone.table.empty:
            reason = alone.left_out[0] if alone.left_out else f"{path}: no row in it"
            raise ValueError(f"--have: {reason}")
    found = collect(paths)
    lines = [f"--have: ignored {line}" for line in found.ignored]
    return found.table, [*lines, *_left_out(found, "left out of --have")]


def of_plan(table: pd.DataFrame, lab: Lab, plan: Plan, retry: Collection[str]) -> pd.DataFrame:
    """The rows of a plan's runs, without those to be tried again."""
    ids = {run_id for each in plan.runs.values() for run_id in ids_of(lab, each)}
    return table[table["run_id"].isin(ids) & ~table["status"].isin(list(retry))]


def finished(lab: Lab, plan: Plan, table: pd.DataFrame) -> set[str]:
    """Runs all of whose rows are in a table."""
    found = measured(table)
    return {run_id for run_id in plan.runs if _is_finished(lab, plan, run_id, found)}


def _is_finished(
    lab: Lab, plan: Plan, run_id: str, found: Mapping[str, Mapping[Measurement, str]]
) -> bool:
    """Whether every budget has its row, and, if it ended well, those of its roundings."""
    experiment = plan.runs[run_id]
    rounding = Rounding(lab, experiment, Path(), plan.sweep)
    for schedule in (*experiment.branches, experiment.schedule):
        rows = found.get(lab.run_id(experiment, schedule), {})
        end = rows.get((experiment.tokens_of(schedule), "none", "none"))
        if end is None or (end == "ok" and not rounding.wanted(schedule) <= set(rows)):
            return False
    return True


def ids_of(lab: Lab, experiment: Experiment) -> set[str]:
    """Of all budgets of a run."""
    budgets = (*experiment.branches, experiment.schedule)
    return {lab.run_id(experiment, schedule) for schedule in budgets}


def is_left(lab: Lab, plan: Plan, workdir: Path, run_id: str) -> bool:
    """Whether a run has anything left to do in a workdir."""
    return bool(runner(lab, plan, workdir, run_id).milestones())


def runner(lab: Lab, plan: Plan, workdir: Path, run_id: str) -> Runner:
    """What knows of a run's files."""
    experiment, folder = plan.runs[run_id], plan.folder(workdir, run_id)
    looks = Rounding(lab, experiment, folder, plan.sweep)
    return Runner(lab, experiment, folder, Saving(0, 1, 0), lambda: False, WATCHING, looks)


def set_damaged_aside(lab: Lab, plan: Plan, workdir: Path) -> None:
    """Renames files of rows that do not read, or have rows of another run, with a warning.

    Their runs are evaluated again.
    """
    for run_id, experiment in plan.runs.items():
        for path in _files(plan, workdir, run_id):
            found = collect([path])
            others = set(found.table["run_id"]) - ids_of(lab, experiment)
            reasons = [*found.left_out, *(f"{path}: a row of another run, {o}" for o in others)]
            if reasons:
                path.replace(path.with_name(f"{path.name}{DAMAGED}"))
                print(f"warning: {reasons[0]}; renamed to {path.name}{DAMAGED}", file=sys.stderr)


def forget(plan: Plan, workdir: Path, statuses: Collection[str]) -> None:
    """Drops rows of these statuses, so that what they are of is tried again."""
    for run_id in plan.runs if statuses else ():
        for path in _files(plan, workdir, run_id):
            rows = rows_of(path.parent)
            kept = [row for row in rows if row.status not in statuses]
            if len(kept) < len(rows):
                write_rows(path, kept)
        if "failed" in statuses:
            failures.forget(plan.folder(workdir, run_id))


def merge(plan: Plan, workdir: Path, earlier: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """All rows of the sweep, on the disk and returned, and lines about what is left out."""
    found = collect(path for run_id in plan.runs for path in _files(plan, workdir, run_id))
    table = union([found.table, earlier])
    write(table, workdir)
    return table, _left_out(found, "left out")


def ends(lab: Lab, plan: Plan, table: pd.DataFrame) -> collections.Counter[str]:
    """How many runs ended how; one with branches as the worst of them."""
    own = table[table["ptq_method"] == "none"]
    found, counts = measured(own), collections.Counter[str]()
    for experiment in plan.runs.values():
        statuses = [
            found.get(lab.run_id(experiment, each), {}).get(
                (experiment.tokens_of(each), "none", "none")
            )
            for each in (*experiment.branches, experiment.schedule)
        ]
        if None not in statuses:
            counts[next(each for each in _WORST if each in statuses)] += 1
    return counts


def _files(plan: Plan, workdir: Path, run_id: str) -> list[Path]:
    """Those of a run's rows that are there."""
    folder = plan.folder(workdir, run_id)
    return [path for path in (folder / ROWS, folder / FOLDER / ROWS) if path.exists()]


def _left_out(found: Collected, words: str) -> list[str]:
    """A line about all rows that are left out."""
    count = len(found.left_out)
    others = f" and {count - 1} others" if count > 1 else ""
    return [f"{words}: {found.left_out[0]}{others}"] if count else []
