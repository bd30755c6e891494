"""Runs commands on a cluster as a Slurm job array, through submitit.

Slurm is asked to do what it does well: to queue, to place, to announce a stop by SIGTERM, to start
again. submitit writes the batch script, and in the job its task becomes the command by `exec`, so
that signals and exit codes pass between Slurm and the command directly.

- *Going on.* A command that exits 75, or dies of the SIGTERM that it did not expect yet, was told
  to leave and goes back into the queue (`qat.sweep.slurm_script`). SIGTERM comes before the time
  limit and at a preemption, so a command may take longer than the limit, in several visits.
- *Never twice.* Each array has a name of its own that is written down before it is submitted.
  Jobs are found by name, so they are found again by a driver that was killed at any moment, and the
  ids of a cluster that was set up anew mean nothing.
- *How it ended* is written by the batch script beside the log, for Slurm forgets. Only where that
  is missing (killed, cancelled, disk full) its memory decides.

A folder holds one subfolder for each array: `array.json`, and for command i `i.log` with what all
its tasks and Slurm say, and `i.exit` with its exit code; the rest is submitit's. All nodes must see
the folder under the same path.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import shlex
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qat.spelling import expected_instead
from qat.sweep.slurm_script import Resources, parameters
from qat.training.files import naming, write_whole

__all__ = ["Jobs", "Resources", "State", "Status", "find", "submit"]

State = Literal["pending", "running", "preempted", "done", "failed"]

_RECORD = "array.json"
_ONE_STREAM = 'exec "$@" 2>&1'  # or srun would mix the two within lines
_COLUMNS = "JobArrayID:32,Name:64,ArrayTaskID:16,State:32,RestartCnt:12,Reason:64"
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}


@dataclasses.dataclass(frozen=True)
class Status:
    """How a command fares.

    Attributes:
        command: what was submitted.
        state: `preempted` is waiting to go on, `failed` includes cancelled and lost.
        exit_code: of the command; None while it has not ended, or where that is not known.
        log: what it printed; may not be there yet.
        reason: why it waits, or how it failed where the exit code does not say.
    """

    command: tuple[str, ...]
    state: State
    exit_code: int | None
    log: Path
    reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("done", "failed")

    def last_lines(self, count: int = 10) -> str:
        """The end of the log; empty where there is none."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])
        except FileNotFoundError:
            return ""


@dataclasses.dataclass(frozen=True)
class Jobs:
    """Submitted commands, in the order asked for; valid in any process that sees the folder."""

    members: tuple["_Member", ...]

    def states(self) -> tuple[Status, ...]:
        """One for each command.

        Raises:
            OSError: the cluster does not answer.
        """
        seen = _queue({member.array for member in self.members})
        return tuple(member.status(seen.get(member.key)) for member in self.members)

    def cancel(self) -> None:
        """Takes the commands that have not ended out of the queue; running ones get SIGTERM.

        Raises:
            OSError: the cluster does not answer.
        """
        seen = _queue({member.array for member in self.members})
        alive = [m.key for m in self.members if not m.status(seen.get(m.key)).ended]
        ids = [seen[key].job_id for key in alive]
        if ids:
            _ask("scancel", "--quiet", *ids)  # of those that end just now


def submit(
    commands: Sequence[Sequence[str]],
    folder: Path,
    resources: Resources,
    environment: Mapping[str, str] | None = None,
) -> Jobs:
    """Submits commands as one array; those that already wait or run are found again instead.

    Commands that have ended, however they did, are submitted anew.

    Args:
        commands: words of each; all different.
        folder: for scripts and logs, the same on all nodes.
        resources: of each command.
        environment: variables beside those of this process.

    Raises:
        ValueError: no command, an empty or a repeated one; or others of this folder have not ended.
        OSError: submitit or Slurm is missing or refuses.
    """
    wanted = [tuple(map(str, command)) for command in commands]
    if not wanted or not all(wanted) or len(set(wanted)) < len(wanted):
        raise ValueError(expected_instead("commands", "different ones, at least one", wanted))
    alive = _alive(folder)
    others = [shlex.join(command) for command in alive if command not in wanted]
    if others:
        raise ValueError(
            f"{folder}: {len(others)} other commands have not ended, such as {others[0]}; "
            "expected to wait for them or to cancel them first"
        )
    new = [command for command in wanted if command not in alive]
    if new:
        for member in _submit(new, folder, resources, environment or {}):
            alive[member.command] = member
    return Jobs(tuple(alive[command] for command in wanted))


def find(folder: Path) -> Jobs | None:
    """The commands submitted from a folder, each in its latest array; None if there are none.

    Raises:
        ValueError: a record is damaged.
    """
    latest: dict[tuple[str, ...], _Member] = {}
    for record in sorted(folder.glob(f"*/{_RECORD}")):
        for member in _Array.read(record.parent).members:
            latest[member.command] = member
    return Jobs(tuple(latest.values())) if latest else None


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What Slurm says of a job."""

    job_id: str
    state: str
    restarts: int
    reason: str


@dataclasses.dataclass(frozen=True)
class _Array:
    """One submission: its folder, its name in Slurm, its commands."""

    folder: Path
    name: str
    commands: tuple[tuple[str, ...], ...]

    @property
    def members(self) -> list["_Member"]:
        return [_Member(self.folder, self.name, i, c) for i, c in enumerate(self.commands)]

    def write(self) -> None:
        record = {"name": self.name, "commands": self.commands}
        write_whole(self.folder / _RECORD, json.dumps(record, indent=1))

    @classmethod
    def read(cls, folder: Path) -> "_Array":
        path = folder / _RECORD
        try:
            record = json.loads(path.read_text())
            return cls(folder, record["name"], tuple(map(tuple, record["commands"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: expected a submitted array ({error})") from None


@dataclasses.dataclass(frozen=True)
class _Member:
    """A command of an array."""

    folder: Path
    array: str
    index: int
    command: tuple[str, ...]

    @property
    def key(self) -> tuple[str, int]:
        return self.array, self.index

    def status(self, seen: _Seen | None) -> Status:
        """`seen` was asked for before: a job leaves the queue after it wrote its exit code."""
        log = self.folder / f"{self.index}.log"
        code = self._exit_code()
        if code is not None:
            return Status(self.command, "failed" if code else "done", code, log)
        if seen is None:
            return Status(self.command, "failed", None, log, "Slurm does not know it")
        if seen.state in _WAITING:
            waiting: State = "preempted" if seen.restarts else "pending"
            return Status(self.command, waiting, None, log, seen.reason)
        if seen.state in _ENDED:
            return Status(self.command, "failed", None, log, seen.state)
        if seen.state == "COMPLETED":  # and could not write its exit code
            return Status(self.command, "done", 0, log)
        return Status(self.command, "running", None, log)

    def _exit_code(self) -> int | None:
        try:
            return int((self.folder / f"{self.index}.exit").read_text())
        except FileNotFoundError:
            return None


def _alive(folder: Path) -> dict[tuple[str, ...], _Member]:
    """Those that have not ended; each in its latest array, before which nobody submits it again."""
    jobs = find(folder)
    if jobs is None:
        return {}
    pairs = zip(jobs.members, jobs.states(), strict=True)
    return {member.command: member for member, status in pairs if not status.ended}


def _queue(names: set[str]) -> dict[tuple[str, int], _Seen]:
    """What Slurm knows of arrays, by name and index."""
    chosen = ["--states=all", "--array", "--noheader", f"--name={','.join(sorted(names))}"]
    seen = {}
    for line in _ask("squeue", "--me", *chosen, f"--Format={_COLUMNS}").splitlines():
        job_id, name, index, state, restarts, *reason = line.split(maxsplit=5)
        key = name, int(index) if index.isdecimal() else 0  # a single job is no array
        seen[key] = _Seen(job_id, state, int(restarts), "".join(reason).strip())
    return seen


def _ask(*command: str) -> str:
    """What one of Slurm's programs answers.

    Raises:
        OSError: it is not there, or Slurm does not answer.
    """
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    except FileNotFoundError:
        raise OSError(f"{command[0]} is not installed: expected a machine of a cluster") from None
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]}: Slurm does not answer within 120 s") from None
    except subprocess.CalledProcessError as error:
        raise OSError(f"{command[0]}: {_one_line(error.stderr)}") from None
    return answer.stdout


def _submit(
    commands: Sequence[tuple[str, ...]],
    folder: Path,
    resources: Resources,
    environment: Mapping[str, str],
) -> list[_Member]:
    submitit = _submitit()
    array = _Array(_new_folder(folder), f"qat-{uuid.uuid4().hex}", tuple(commands))
    script = parameters(array.folder, array.name, len(commands), resources, environment)
    try:
        executor = submitit.SlurmExecutor(folder=array.folder)
        executor.update_parameters(**script)
        array.write()  # and keep: a refusal may be an answer that came too late
        with _submitting(submitit), executor.batch():
            for command in commands:
                executor.submit(os.execvp, "sh", ["sh", "-c", _ONE_STREAM, "sh", *command])
    except RuntimeError as error:
        raise OSError(f"cannot submit to Slurm: {_one_line(str(error))}") from None
    return array.members


def _new_folder(folder: Path) -> Path:
    if "%" in str(folder.absolute()):
        raise ValueError(f"{folder}: expected a folder without %, which Slurm replaces")
    new = folder.absolute() / f"{1 + len(list(folder.glob('[0-9]*'))):04d}"
    with naming(new):
        new.mkdir(parents=True)
    return new


def _submitit() -> Any:
    try:
        return importlib.import_module("submitit")
    except ImportError:
        raise OSError("submitit is not installed: expected pip install 'qat-jax[slurm]'") from None


@contextlib.contextmanager
def _submitting(submitit: Any) -> Iterator[None]:
    """A job must not inherit what another, in which this program may run, was given."""
    config = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env(), contextlib.redirect_stderr(io.StringIO()):
        os.environ.update(config)
        yield


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "no reason given"
