"""Checkpoints of the training state by orbax: written atomically, restored where it is wanted.

A checkpoint is the state and the configuration it belongs to. Restoring under another
configuration is refused, so that no run goes on from a state that is not its own.
"""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from qat.training.files import PARTIAL, write_whole
from qat.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run in one folder; the newest two are kept."""

    def __init__(self, folder: Path, config_hash: str):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._config_hash = config_hash

    def save(self, state: TrainState) -> None:
        """Saves the state under its own step number."""
        step = int(state.step)
        content = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            meta=ocp.args.JsonSave({"config_hash": self._config_hash}),
        )
        self._manager.save(step, args=content)

    def restore(self, abstract: TrainState, shardings: TrainState) -> TrainState | None:
        """The newest state on the given devices, or None where there is none.

        Args:
            abstract: shapes and dtypes of the state.
            shardings: where its arrays go; any mesh, not only that of the run that saved.

        Raises:
            ValueError: the checkpoint belongs to another configuration.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        found = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        if found["meta"]["config_hash"] != self._config_hash:
            raise ValueError(
                f"checkpoint {step} in {self._manager.directory} belongs to configuration "
                f"{found['meta']['config_hash']}, expected {self._config_hash}"
            )
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract._asdict(),
            shardings._asdict(),
        )
        content = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        restored: dict[str, Any] = self._manager.restore(step, args=content)["state"]
        return TrainState(**restored)

    def close(self) -> None:
        """Waits for pending writes and frees the folder."""
        self._manager.close()


def claim(workdir: Path, config: dict[str, Any]) -> None:
    """Marks a workdir as that of a configuration, once.

    Raises:
        ValueError: it belongs to another configuration, or holds files that no run made.
    """
    marker = workdir / "config.json"
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    if marker.exists():
        if marker.read_text() != text:
            raise ValueError(
                f"workdir {workdir} belongs to another run ({_difference(marker, text)}); "
                "choose another workdir or the same configuration"
            )
        return
    if workdir.exists() and any(path.suffix != PARTIAL for path in workdir.iterdir()):
        raise ValueError(f"workdir {workdir} is not empty and no run made it; choose another")
    write_whole(marker, text)


def _difference(marker: Path, text: str) -> str:
    """The first setting in which two configurations differ."""
    try:
        there = _flat(json.loads(marker.read_text()))
    except json.JSONDecodeError:
        return "its config.json is damaged"
    here = _flat(json.loads(text))
    for key in sorted({*there, *here}):
        if there.get(key) != here.get(key):
            return f"{key} is {there.get(key)!r} there, {here.get(key)!r} here"
    return "its config.json differs"


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    if not isinstance(config, dict):
        return {prefix.rstrip("."): config}
    parts = (_flat(value, f"{prefix}{key}.") for key, value in config.items())
    return {name: value for part in parts for name, value in part.items()}
