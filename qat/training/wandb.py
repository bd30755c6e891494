"""Weights & Biases, for those who have it: the same points as anywhere else.

The package is imported when it is asked for and no dependency. Its own settings hold, such as
``WANDB_MODE=offline``. A run that goes on after a stop goes on there under the same id; points are
plotted over their own step, so that repeated steps fall on the old ones.
"""

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qat.training.scalars import Point


class WeightsAndBiases:
    """Sends scalars to a project; see `qat.training.scalars.Writer`.

    Args:
        project: name there.
        run_id: identifies the run, also when it goes on.
        config: of the run, to be shown.
        folder: for the files that the package keeps; made if it is missing.

    Raises:
        ValueError: the package is not installed, or does not let the run begin.
    """

    def __init__(self, project: str, run_id: str, config: Mapping[str, Any], folder: Path):
        wandb = required_package(project)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                id=run_id,
                resume="allow",
                config=dict(config),
                dir=str(folder),
            )
        except wandb.errors.Error as error:
            raise ValueError(f"wandb project {project!r}: {error}") from None
        self._run.define_metric("*", step_metric="step")

    def write(self, points: Iterable[Point]) -> None:
        """Hands points to the package, which sends them when it can."""
        for step, numbers in points:
            self._run.log({"step": step, **numbers})

    def close(self) -> None:
        """Waits until everything is sent or, offline, stored."""
        self._run.finish()


def required_package(project: str) -> Any:
    """The package, for this project; to be called early by programs that will need it.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError:
        raise ValueError(
            f"wandb project {project!r}: the package wandb is not installed; "
            f"expected 'pip install wandb', or no project"
        ) from None
