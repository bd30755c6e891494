"""Trains one model and writes its result row.

    python -m launch.train --config=configs/tiny.py --config.policy=w4a8 --workdir=runs/a

Any key of the config can be set on the command line. A workdir belongs to one configuration; run
the same command again to go on where it stopped.
"""

from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from launch.experiment import Experiment
from launch.lab import Lab
from launch.main import read_config, run
from launch.progress import Meter
from qat.training.checkpoint import Checkpoints, claim
from qat.training.results import read_rows, write_rows
from qat.training.step import Metrics

config_flags.DEFINE_config_file(
    "config", None, "Experiment to run (required); its keys are explained in configs/experiment.py."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints and results (required).")
_DATA_DIR = flags.DEFINE_string("data_dir", "runs/data", "Folder for prepared text.")
_CHECKPOINT_EVERY = flags.DEFINE_integer(
    "checkpoint_every", 500, "Steps between checkpoints; 0 saves at the end alone.", lower_bound=0
)


def main(argv: list[str]) -> None:
    """Trains, evaluates, writes the row, prints the loss."""
    del argv
    experiment = Experiment.from_config(read_config())
    workdir = Path(str(_WORKDIR.value))
    lab = Lab(Path(_DATA_DIR.value))
    dataset = lab.dataset(experiment)
    lab.programs(experiment)  # these two so that what cannot run claims no workdir
    lab.batches(experiment)
    if dataset.unreadable_documents:
        print(f"left out {dataset.unreadable_documents} documents that are not UTF-8 text")
    claim(workdir, {**experiment.config, "data_fingerprint": dataset.fingerprint})
    if (workdir / "rows.jsonl").exists():
        print(f"{workdir} is finished already")
        _print_rows(workdir)
        return
    checkpoints = Checkpoints(workdir / "checkpoints", experiment.config_hash)
    with Meter("Training", experiment.schedule.total_steps, "steps") as meter:
        seen = 0

        def on_log(step: int, metrics: Metrics) -> None:
            nonlocal seen
            meter.advance(step - seen)
            seen = step

        result, wall_s = lab.train(
            experiment,
            checkpoints=checkpoints,
            checkpoint_every=_CHECKPOINT_EVERY.value,
            on_log=on_log,
        )
    checkpoints.close()
    losses = lab.evaluate(experiment, result.state.params, experiment.policy)
    write_rows(workdir / "rows.jsonl", [lab.row(experiment, result, wall_s, losses)])
    _print_rows(workdir)


def _print_rows(workdir: Path) -> None:
    """One line a row."""
    rows: Any = read_rows(workdir)
    for row in rows.itertuples():
        print(
            f"run {row.run_id}: {row.status}, validation loss {row.loss:.4f} "
            f"± {row.loss_se:.4f} nats/token, N = {row.params:,}, D = {row.tokens:,}, "
            f"{row.wall_s:.0f} s"
        )


if __name__ == "__main__":
    run(main, required=("config", "workdir"))
