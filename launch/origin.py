"""The checkpoint a run begins with or learns from, and how a config names it.

`init` and `teacher` of a config are folders of finished runs. What they stand for are the
parameters in them, so a fingerprint of these becomes part of the config before anything else is
done: `runs/full` turns into `runs/full@1f2e3d4c5b6a`, and with it the run's identity covers the
numbers it began with. A run that has begun keeps the fingerprint it began with, and needs the
folder of `init` no more once it has a checkpoint of its own.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from launch.experiment import ORIGINS, Experiment
from models.task import language_model
from models.transformer import TransformerConfig
from qat.spelling import nearest
from qat.training import seal
from qat.training.sharding import path_name
from qat.training.step import Params

_PINNED = re.compile(r"(.+)@([0-9a-f]{12})")
_FREE = ("dtype", "unroll", "remat", "mlp_width")  # of a model; its arrays show the last


@dataclasses.dataclass(frozen=True)
class Origin:
    """A trained model.

    Attributes:
        name: its folder, as it was given.
        config: of the run that trained it.
        model: shape.
        params: nested dict of float32 arrays, on the host.
        data_fingerprint: of the text it was trained on.
    """

    name: str
    config: Mapping[str, Any]
    model: TransformerConfig
    params: Params
    data_fingerprint: str

    @functools.cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that identify the parameters."""
        total = hashlib.blake2b(digest_size=6)
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.params)
        for path, leaf in leaves:
            array = np.ascontiguousarray(leaf)
            total.update(f"{path_name(path)} {array.dtype} {array.shape}\n".encode())
            total.update(array.data)
        return total.hexdigest()

    def check_fits(self, experiment: Experiment, data_fingerprint: str) -> None:
        """Makes sure that an experiment's model has this one's shape and reads the same ids.

        Raises:
            ValueError: it has another shape or tokenizer.
        """
        task = language_model(experiment.model, experiment.policy)
        wanted = jax.eval_shape(task.init, jax.random.key(0))
        there = {**dataclasses.asdict(self.model), **_shapes(self.params)}
        here = {**dataclasses.asdict(experiment.model), **_shapes(wanted)}
        for name in [*here, *there]:
            if name not in _FREE and there.get(name) != here.get(name):
                raise ValueError(
                    f"checkpoint {self.name} does not fit: {name} is {there.get(name)} there, "
                    f"{here.get(name)} here"
                )
        theirs, ours = self.config["data"]["tokenizer"], experiment.config["data"]["tokenizer"]
        learned = theirs.startswith("bpe:") and self.data_fingerprint != data_fingerprint
        if theirs != ours or learned:
            raise ValueError(
                f"checkpoint {self.name} does not fit: its tokenizer is {theirs!r}"
                + (", learned from other text" if theirs == ours else f", here {ours!r}")
            )


def open_run(folder: str) -> Origin:
    """The parameters at the end of a finished run of `launch.train`.

    Raises:
        ValueError: the folder is not that of a run, or the run is not finished, diverged or is
            damaged.
    """
    path = Path(folder).expanduser()
    try:
        config = json.loads((path / "config.json").read_text())
        data_fingerprint = config.pop("data_fingerprint")
        experiment = Experiment.from_config(config)
    except (OSError, ValueError, KeyError, TypeError):
        beside = [str(each.parent) for each in path.parent.glob("*/config.json")]
        near = f"; nearest is {nearest(path, beside)!r}" if beside else ""
        raise ValueError(f"checkpoint {folder!r}: expected the workdir of a run{near}") from None
    step = path / "checkpoints" / str(experiment.schedule.total_steps)
    if not step.is_dir():
        raise ValueError(
            f"checkpoint {folder!r}: the run has no state after its last step "
            f"({step.name}); expected one that is finished and has not diverged"
        )
    try:
        seal.read(step)
    except seal.BrokenError as reason:
        raise ValueError(f"checkpoint {step} is damaged: {reason}") from None
    task = language_model(experiment.model, experiment.policy)
    shapes = {"params": jax.eval_shape(task.init, jax.random.key(0))}
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    wanted = ocp.args.PyTreeRestore(shapes, restore_args=on_host, partial_restore=True)
    params = ocp.PyTreeCheckpointer().restore(step / "state", args=wanted)["params"]
    return Origin(folder, config, experiment.model, params, data_fingerprint)


def resolved(config: Mapping[str, Any], workdir: Path | None = None) -> dict[str, Any]:
    """The config with the fingerprint of every checkpoint that it names.

    Args:
        config: as given.
        workdir: of the run; if it has begun, what it began with is not read again.

    Raises:
        ValueError: a checkpoint cannot be read.
    """
    found, begun = dict(config), _begun(workdir)
    for name in ORIGINS:
        folder = config.get(name)
        if folder and not _PINNED.fullmatch(folder):
            kept = _PINNED.fullmatch(begun.get(name, ""))
            known = kept is not None and kept[1] == folder
            found[name] = begun[name] if known else f"{folder}@{_fingerprint(folder)}"
    return found


def opened(pinned: str) -> Origin:
    """The checkpoint of a resolved config's `init` or `teacher`.

    Raises:
        ValueError: it cannot be read, or its parameters are others by now.
    """
    match = _PINNED.fullmatch(pinned)
    origin = open_run(match[1] if match else pinned)
    if match and origin.fingerprint != match[2]:
        raise ValueError(
            f"checkpoint {match[1]!r} holds other parameters by now: fingerprint "
            f"{origin.fingerprint}, expected {match[2]}"
        )
    return origin


def student_of(folder: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run that trains a checkpoint's student.

    Args:
        folder: the checkpoint.
        config: as `configs.distill` has it; what it leaves open is the checkpoint's own.

    Raises:
        ValueError: there is no such checkpoint, or the config is not such.
    """
    if "writing" not in config:
        raise ValueError(
            "the config has no 'writing': expected one like configs/distill.py; for soft labels of "
            "other text, launch.train --config.teacher"
        )
    checkpoint = open_run(folder)
    theirs = checkpoint.config
    pinned = f"{folder}@{checkpoint.fingerprint}"
    return {
        **config,
        **dict.fromkeys(ORIGINS, pinned),
        "model": theirs["model"],
        "scaling": theirs["scaling"],
        "data": {**theirs["data"], **{name: own for name, own in config["data"].items() if own}},
        "learning_rate": config["learning_rate"] or theirs["learning_rate"] / 10,
    }


def check(experiment: Experiment, data_fingerprint: str) -> None:
    """Makes sure that a run can begin with what it names.

    Raises:
        ValueError: a checkpoint does not fit, or a teacher is not in full precision.
    """
    named = {name: experiment.config[name] for name in ORIGINS if name in experiment.config}
    for pinned in dict.fromkeys(named.values()):
        origin = opened(pinned)
        origin.check_fits(experiment, data_fingerprint)
        if pinned == named.get("teacher") and origin.config["policy"] != "none":
            raise ValueError(
                f"teacher {origin.name!r} was trained with policy {origin.config['policy']!r}: "
                "expected one in full precision, 'none'"
            )


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """Of each array, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {path_name(path): leaf.shape for path, leaf in leaves}


@functools.cache
def _fingerprint(folder: str) -> str:
    """Of a checkpoint that many runs of a sweep may name."""
    return open_run(folder).fingerprint


def _begun(workdir: Path | None) -> Mapping[str, Any]:
    """The resolved config of a run that has begun; empty of one that has not."""
    try:
        config = json.loads((workdir / "config.json").read_text()) if workdir else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
