"""A sweep resolved into runs, and the file by which its workers learn of them.

Every run is checked and named before any begins. A run's name is the hash of its resolved config
and its data, so the same run is the same in every sweep that has it.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import origin
from launch.experiment import Experiment
from launch.lab import Lab
from launch.sweeps.fitting import Fitting
from qat.sweep import Overrides, Sweep, apply
from qat.training.files import write_whole
from qat.training.results import hash_of

_FILE = "plan.json"
_PTQ = ("ptq_methods", "ptq_formats", "ptq_at", "ptq_calibration")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep does.

    Attributes:
        sweep: what it was made from.
        runs: experiments by run id, in the order of the grid.
    """

    sweep: Sweep
    runs: Mapping[str, Experiment]

    @classmethod
    def of(cls, sweep: Sweep, lab: Lab) -> "Plan":
        """Resolves every run; a `Sweep` has none twice.

        Raises:
            ValueError: a run cannot be; the message names what it overrides.
        """
        return cls(sweep, {lab.run_id(each): each for each in experiments(sweep)})

    @classmethod
    def read(cls, workdir: Path) -> "Plan":
        """The plan of a workdir.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        path = workdir / _FILE
        try:
            found = json.loads(path.read_text())
            sweep = Sweep(config={}, grid=({},), **found["sweep"])
            configs: dict[str, Any] = found["runs"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not the plan of a sweep; launch.sweep writes it") from None
        return cls(sweep, {run: Experiment.from_config(each) for run, each in configs.items()})

    def write(self, workdir: Path) -> None:
        """Leaves the plan for workers."""
        sweep = {name: getattr(self.sweep, name) for name in _PTQ}
        runs = {run_id: each.config for run_id, each in self.runs.items()}
        write_whole(workdir / _FILE, json.dumps({"sweep": sweep, "runs": runs}, indent=0) + "\n")

    def folder(self, workdir: Path, run_id: str) -> Path:
        """Of a run."""
        return workdir / "runs" / run_id

    def told(self, run_id: str) -> str:
        """A run by its id and what it overrides, in one line."""
        overrides = self.sweep.grid[list(self.runs).index(run_id)]
        return f"run {run_id} ({_told(overrides)})"


def experiments(sweep: Sweep) -> list[Experiment]:
    """The experiments of a sweep, in the order of its grid.

    Raises:
        ValueError: one cannot be trained or rounded as it should, or is there twice; the message
            names what it overrides.
    """
    found: list[Experiment] = []
    fitting, first = Fitting(sweep.ptq_formats), dict[str, int]()
    for number, overrides in enumerate(sweep.grid):
        try:
            config = origin.resolved(apply(sweep.config, overrides))
            experiment = Experiment.from_config(config)
            fitting.check(experiment)
        except ValueError as error:
            raise ValueError(f"run {_told(overrides)}: {error}") from None
        if (same := first.setdefault(_meaning(experiment), number)) != number:
            raise ValueError(
                f"runs {same + 1} and {number + 1} of the grid are the same: "
                f"{_told(sweep.grid[same])}; {_told(overrides)}"
            )
        found.append(experiment)
    return found


def _meaning(experiment: Experiment) -> str:
    """Equal for runs that differ in nothing but how policy and numbers of tokens are spelled."""
    tokens = [experiment.tokens_of(each) for each in experiment.branches]
    return hash_of(
        {
            **experiment.config,
            "policy": str(experiment.policy),
            "tokens": experiment.tokens,
            "schedule": {**experiment.config["schedule"], "branches": tokens},
        }
    )


def structures(runs: Sequence[Experiment]) -> list[str]:
    """Lines about shapes whose policies differ in structure, so that they share no program."""
    policies: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for each in runs:
        policies[each.size][each.policy.structure].add(str(each.policy))
    return [
        f"policies {', '.join(sorted(names))} ({structure}) have programs of their own"
        for groups in policies.values()
        if len(groups) > 1
        for structure, names in sorted(groups.items(), key=lambda each: -len(each[1]))[1:]
    ]


def _told(overrides: Overrides) -> str:
    """What a run overrides, in one line."""
    return ", ".join(f"{key}={value}" for key, value in overrides.items()) or "(no override)"
