"""Trains one model and writes its result row.

    python -m launch.train --config=configs/tiny.py --config.policy=w4a8 --workdir=runs/a

Any key of the config can be set on the command line. A workdir belongs to one configuration; run
the same command again to go on where it stopped, however it stopped. It holds `rows.jsonl` with
the results, `curve.csv` with loss, gradient norm and learning rate of every step, and
`checkpoints`; the branches of a warm-up–stable–decay run have a folder each in `branches`.

Exit codes: 0 done; 2 bad input; 3 done, and the run diverged; 75 preempted by SIGTERM, run the
same command again; 130 stopped by Ctrl-C.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from launch import distributed
from launch.main import read_config, run

config_flags.DEFINE_config_file(
    "config", None, "Experiment to run (required); its keys are explained in configs/experiment.py."
)
flags.adopt_module_key_flags(distributed)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints and results (required).")
_DATA_DIR = flags.DEFINE_string("data_dir", "runs/data", "Folder for prepared text.")
_CHECKPOINT_EVERY = flags.DEFINE_integer(
    "checkpoint_every", 500, "Steps between checkpoints; 0 saves at the end alone.", lower_bound=0
)
_KEEP = flags.DEFINE_integer("keep", 2, "How many of the newest checkpoints stay.", lower_bound=1)
_KEEP_EVERY = flags.DEFINE_integer(
    "keep_every", 0, "Steps between checkpoints that stay forever; 0 is none.", lower_bound=0
)
_TENSORBOARD = flags.DEFINE_bool("tensorboard", True, "Whether to write TensorBoard's files.")
_WANDB_PROJECT = flags.DEFINE_string(
    "wandb_project", None, "Project of Weights & Biases to plot in; needs the package wandb."
)
_PROFILE = flags.DEFINE_string(
    "profile", None, "Steps to record with JAX's profiler, start:stop, such as 10:13."
)
_ERRORS = flags.DEFINE_bool("errors", False, "Whether to print every quantizer's error at the end.")


def main(argv: list[str]) -> int:
    """Trains, evaluates, writes the rows, prints the loss; returns the exit code."""
    del argv
    config = read_config()
    distributed.start()
    from launch import runner, training

    return training.run(
        config,
        workdir=Path(str(_WORKDIR.value)),
        data_dir=Path(_DATA_DIR.value),
        saving=runner.Saving(_CHECKPOINT_EVERY.value, _KEEP.value, _KEEP_EVERY.value),
        watching=runner.Watching(
            _TENSORBOARD.value, _WANDB_PROJECT.value, _PROFILE.value, _ERRORS.value
        ),
    )


if __name__ == "__main__":
    run(main, required=("config", "workdir"))
