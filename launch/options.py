"""Flags of the programs that train one run, and what they mean."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from launch import distributed

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


def train(config: Mapping[str, Any]) -> int:
    """Trains a config as the flags say; returns the exit code.

    Raises:
        ValueError: bad input, before anything is written.
        OSError: a file cannot be read or written.
    """
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
