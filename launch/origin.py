"""The checkpoint a run begins with or learns from, and how a config names it.

`init` and `teacher` of a config are folders of trained models, as `launch.checkpoints` opens them.
What they stand for are the parameters in them, so a fingerprint of these becomes part of the config
before anything else is done: `runs/full` turns into `runs/full@1f2e3d4c5b6a`, and with it the run's
identity covers the numbers it began with. A run that has begun keeps the fingerprint it began with,
and needs the parameters of `init` no more once it has a checkpoint of its own.

A config that follows its checkpoint, as `configs.finetune` does, has no shape, and leaves open what
else the checkpoint says. The checkpoint fills it in, so the run's config says all there is.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from configs import experiment as defaults
from launch.checkpoints import Checkpoint, open_checkpoint
from launch.experiment import ORIGINS, Experiment, has_shape
from models.task import language_model
from models.transformer import TransformerConfig
from qat.training.sharding import path_name
from qat.training.step import Params
from qat.training.tokenizer import parse_tokenizer

_PINNED = re.compile(r"(.+)@([0-9a-f]{12})")
_SHAPE = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
_FREE = ("dtype", "unroll", "remat", "balance", "mlp_width")  # of a model; arrays show the last


def resolved(config: Mapping[str, Any], workdir: Path | None = None) -> dict[str, Any]:
    """The config with the fingerprint of every checkpoint that it names, and nothing left open.

    Args:
        config: as given.
        workdir: of the run; if it has begun, what it began with is not read again, and what is
            left open is as it was then.

    Raises:
        OSError: a file cannot be read.
        ValueError: a checkpoint cannot be opened, or does not say what is left open.
    """
    found, begun = dict(config), _begun(workdir)
    for name in ORIGINS:
        given = config.get(name)
        if given and not _split(given)[1]:
            known = _split(begun.get(name, ""))[0] == given
            found[name] = begun[name] if known else f"{given}@{_summary(given)[0]}"
    shaping = next((name for name in ORIGINS if found.get(name)), None)
    if shaping is None or has_shape(config):
        return found
    pinned = found[shaping]
    known = begun.get(shaping) == pinned
    folder, _ = _split(pinned)
    return _filled(found, begun if known else _summary(folder)[1], folder)


def opened(pinned: str) -> Checkpoint:
    """The checkpoint of a resolved config's `init` or `teacher`.

    Raises:
        OSError: a file cannot be read.
        ValueError: it cannot be opened, or its parameters are others by now.
    """
    folder, fingerprint = _split(pinned)
    checkpoint = open_checkpoint(Path(folder))
    if fingerprint and checkpoint.fingerprint != fingerprint:
        raise ValueError(
            f"checkpoint {folder!r} holds other parameters by now: fingerprint "
            f"{checkpoint.fingerprint}, expected {fingerprint}"
        )
    return checkpoint


def student_of(folder: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run that trains a checkpoint's student; `resolved` fills it in.

    Raises:
        ValueError: the config is not like `configs.distill`.
    """
    if "writing" not in config:
        raise ValueError(
            "the config has no 'writing': expected one like configs/distill.py; for soft labels of "
            "other text, launch.train --config.teacher"
        )
    return {**config, **dict.fromkeys(ORIGINS, folder)}


def check(experiment: Experiment, data_fingerprint: str) -> None:
    """Makes sure that a run can begin with what it names.

    Raises:
        OSError: a file cannot be read.
        ValueError: a checkpoint does not fit, or a teacher is not in full precision.
    """
    named = {name: experiment.config[name] for name in ORIGINS if name in experiment.config}
    for pinned in dict.fromkeys(named.values()):
        checkpoint = opened(pinned)
        _check_fits(checkpoint, experiment, data_fingerprint)
        if pinned == named.get("teacher") and str(checkpoint.policy) != "none":
            raise ValueError(
                f"teacher {checkpoint.name!r} was trained with policy {str(checkpoint.policy)!r}: "
                "expected one in full precision, 'none'"
            )


def _check_fits(checkpoint: Checkpoint, experiment: Experiment, data_fingerprint: str) -> None:
    """Raises ValueError unless an experiment's model has this shape and reads the same ids."""
    task = language_model(experiment.model, experiment.policy)
    there = _facts(checkpoint.config, checkpoint.params)
    here = _facts(experiment.model, jax.eval_shape(task.init, jax.random.key(0)))
    for name in [*here, *there]:
        if name not in _FREE and there.get(name) != here.get(name):
            raise ValueError(
                f"checkpoint {checkpoint.name} does not fit: {name} is {there.get(name)} there, "
                f"{here.get(name)} here"
                + ("; configs/finetune.py takes the shape from there" if name in _SHAPE else "")
            )
    theirs, ours = checkpoint.tokenizer_name, experiment.config["data"]["tokenizer"]
    learned = theirs.startswith("bpe:") and checkpoint.data_fingerprint != data_fingerprint
    if learned or parse_tokenizer(theirs).identity != parse_tokenizer(ours).identity:
        raise ValueError(
            f"checkpoint {checkpoint.name} does not fit: its tokenizer is {theirs!r}"
            + (", learned from other text" if theirs == ours else f", here {ours!r}")
        )


def _facts(model: TransformerConfig, params: Params) -> dict[str, Any]:
    """All that decides what a model computes, but for the values, by name."""
    spelled_out = {"head_width": model.channels, "attention_scale": model.score_scale}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    shapes = {path_name(path): leaf.shape for path, leaf in leaves}
    return {**dataclasses.asdict(model), **spelled_out, **shapes}


@functools.cache
def _summary(folder: str) -> tuple[str, Mapping[str, Any]]:
    """Fingerprint of a checkpoint, and what it fills in; many runs of a sweep may name it."""
    checkpoint = open_checkpoint(Path(folder))
    if checkpoint.experiment is not None:
        config = checkpoint.experiment.config
        return checkpoint.fingerprint, {**config, "learning_rate": config["learning_rate"] / 10}
    config = defaults.get_config().to_dict()
    model = dataclasses.asdict(checkpoint.config)
    told = [name for name in _SHAPE if name in config["model"] or model[name] != _SHAPE[name]]
    fraction = config["data"]["validation_fraction"]
    data = {"tokenizer": checkpoint.tokenizer_name, "validation_fraction": fraction}
    return checkpoint.fingerprint, {
        "model": {name: model[name] for name in told},
        "scaling": config["scaling"],
        "data": data,
    }


def _filled(config: Mapping[str, Any], other: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """A config whose empty values are another's.

    Raises:
        ValueError: the other does not have them either.
    """
    found = {
        **config,
        "scaling": other["scaling"],
        "learning_rate": config["learning_rate"] or other.get("learning_rate"),
        **{part: {**other[part], **_given(config.get(part, {}))} for part in ("model", "data")},
    }
    needed = {"learning_rate": found["learning_rate"]}
    needed |= {f"data.{key}": found["data"].get(key) for key in ("source", "sequence_length")}
    if missing := [f"--config.{key}" for key, value in needed.items() if not value]:
        raise ValueError(
            f"checkpoint {folder!r} was converted, and does not say how it was trained: expected "
            + ", ".join(missing)
        )
    return found


def _given(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if value}


def _split(name: str) -> tuple[str, str]:
    """Folder and fingerprint of a checkpoint's name; "" where there is none."""
    match = _PINNED.fullmatch(name)
    return (match[1], match[2]) if match else (name, "")


def _begun(workdir: Path | None) -> Mapping[str, Any]:
    """The resolved config of a run that has begun; empty of one that has not."""
    try:
        config = json.loads((workdir / "config.json").read_text()) if workdir else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
