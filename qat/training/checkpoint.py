"""Checkpoints of the training state by orbax, which survive whatever happens to the process.

Saving overlaps training: orbax copies the state to the host, so that the next step may consume it,
and writes in the background. A checkpoint appears by a rename once all of it is written and sealed
(see `qat.training.seal`); one that was damaged later is set aside, not deleted, and the one before
is used. The data need no iterator of their own in it, since a batch is a function of seed and step.

The seal also says to which run a checkpoint belongs. Restoring into another run is refused, so
that no run goes on from a state that is not its own.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from qat.training import seal
from qat.training.files import PARTIAL, write_whole
from qat.training.processes import agree, is_first
from qat.training.sharding import path_name
from qat.training.step import TrainState

DAMAGED = ".damaged"
MARKER = "config.json"  # of a workdir, see `claim`

_NONE = -1
_COMMITTED = "_CHECKPOINT_METADATA"  # which orbax completes after the seal
_UNFINISHED = ".orbax-checkpoint-tmp*"


def _to_stderr(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints of one run in one folder; a context that waits for what is being written.

    Args:
        folder: made if it is missing; shared by all processes of the run.
        identity: what the run is, name → value; a checkpoint of another identity is refused.
        keep: how many of the newest to keep, at least 1.
        keep_every: steps between those kept forever; 0 keeps none forever.
        warn: what to do with a line about a damaged checkpoint.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        *,
        keep: int = 2,
        keep_every: int = 0,
        warn: Callable[[str], None] = _to_stderr,
    ):
        if keep < 1 or keep_every < 0:
            raise ValueError(f"keep = {keep}, keep_every = {keep_every}: expected at least 1 and 0")
        self._folder, self._identity, self._warn = folder.absolute(), dict(identity), warn
        self._arrays: dict[str, str] = {}  # of what is being saved
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every, exact_interval=True))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # nothing is read before its seal is checked
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )
        with self._saving():
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.ExitStack() as stack:
            if error is not None:  # which this one's would hide
                stack.enter_context(contextlib.suppress(OSError))
            self.close()

    def save(self, state: TrainState) -> None:
        """Begins to save the state under its step number; returns when it may be consumed.

        Raises:
            OSError: this or the checkpoint before cannot be written; earlier ones are untouched.
        """
        step = int(state.step)
        content = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()))
        with self._saving():
            self._manager.wait_until_finished()  # it seals what it knows of
            self._arrays = _arrays_of(state)
            if not self._manager.save(step, args=content):
                raise ValueError(f"there is one of step {step} or later")

    def wait(self) -> None:
        """Returns when everything saved is on the disk.

        Raises:
            OSError: as `save`.
        """
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does, and frees the folder."""
        with self._saving():
            self._manager.close()

    def restore(self, abstract: TrainState, shardings: TrainState) -> TrainState | None:
        """The newest whole state on the given devices, or None where none was ever saved.

        Newer ones that are damaged are renamed to "<step>.damaged", each with a warning.

        Args:
            abstract: shapes and dtypes of the state.
            shardings: where its arrays go; any mesh and any number of processes, not only those
                of the run that saved.

        Raises:
            ValueError: the checkpoint belongs to another run or does not fit the program, or all
                are damaged.
        """
        step = agree(lambda: self._newest_whole(_arrays_of(abstract)))
        if step == _NONE:
            return None
        self._manager.reload()
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract._asdict(),
            shardings._asdict(),
        )
        content = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        restored: dict[str, Any] = self._manager.restore(step, args=content)["state"]
        return TrainState(**restored)

    def _newest_whole(self, arrays: Mapping[str, str]) -> int:
        """Its step, once it is known to hold such arrays of this run; sets newer ones aside."""
        for step in sorted(self._steps(), reverse=True):
            folder = self._folder / str(step)
            try:
                words = seal.read(folder)
                _check_commit(folder)
            except seal.BrokenError as reason:
                aside = _free(folder.with_name(folder.name + DAMAGED))
                folder.rename(aside)
                self._warn(f"checkpoint {folder} is damaged ({reason}); renamed to {aside.name}")
                continue
            _check_same(words["identity"], self._identity, f"{folder} belongs to another run: its")
            _check_same(words["arrays"], arrays, f"{folder} does not fit this program: its array")
            return step
        if damaged := sorted(path.name for path in self._folder.glob(f"*{DAMAGED}*")):
            raise ValueError(
                f"no whole checkpoint is left in {self._folder}, only {', '.join(damaged)}; "
                "expected at least one: put it back, or start again in another workdir"
            )
        return _NONE

    def _steps(self) -> list[int]:
        return [int(path.name) for path in self._folder.iterdir() if path.name.isdecimal()]

    def _seal(self) -> None:
        """Seals what is about to be renamed; orbax calls it when all processes have written."""
        if is_first():
            (unfinished,) = self._folder.glob(f"*{_UNFINISHED}")
            seal.write(unfinished, {"identity": self._identity, "arrays": self._arrays})

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """One kind of error for all that orbax and its storage raise when they cannot write."""
        try:
            yield
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise OSError(
                f"cannot save a checkpoint in {self._folder}, earlier ones are untouched: {reason}"
            ) from error


def _arrays_of(state: TrainState) -> dict[str, str]:
    """Type and shape of each array, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {path_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _check_same(there: Mapping[str, Any], here: Mapping[str, Any], what: str) -> None:
    """Raises ValueError with the first name under which a checkpoint has something else."""
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            raise ValueError(
                f"checkpoint {what} {name} is {there.get(name)!r}, expected {here.get(name)!r}"
            )


def _check_commit(folder: Path) -> None:
    """Raises BrokenError unless what orbax writes after the seal is there and reads."""
    try:
        json.loads((folder / _COMMITTED).read_text())
    except (OSError, ValueError):
        raise seal.BrokenError(f"{_COMMITTED} is missing or damaged") from None


def _free(path: Path) -> Path:
    """The path, or the first with a number behind it that nothing has."""
    taken = {each.name for each in path.parent.iterdir()}
    names = (f"{path.name}{number or ''}" for number in range(len(taken) + 1))
    return path.with_name(next(name for name in names if name not in taken))


def claim(workdir: Path, config: dict[str, Any]) -> None:
    """Marks a workdir as that of a configuration, once.

    Raises:
        ValueError: it belongs to another configuration, or holds files that no run made.
    """
    marker = workdir / MARKER
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
