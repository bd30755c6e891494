"""Runs on this machine: a pool of worker processes, each on a core, fed one run at a time.

Without an accelerator there is a worker for every core, since small models gain more from running
side by side than from sharing cores; with one there is a single worker, which has all devices. A
worker gets runs of the shape it has compiled as long as there are any, the longest first. A worker
that dies is replaced and its run tried again; a run that kills three workers is given up, and three
workers in a row that die before they have one end the sweep. Runs that are lanes of one program are
one job, tried once more together and then each alone.

Workers are process groups of their own, which Ctrl-C does not reach: whoever is to stop the pool
does so by `stop`, and workers then have a minute to save.
"""

import contextlib
import dataclasses
import json
import queue
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch import cpu
from launch.main import BAD_INPUT, PREEMPTED
from launch.sweeps.commands import Job
from launch.sweeps.working import LEAVING_S

_ATTEMPTS = 3

Event = dict[str, Any]


class _Process:
    """One worker process: what it is told, and a thread that hears it."""

    def __init__(self, command: Sequence[str], core: int, log: Path, events: "Events"):
        self.core = core
        self.job: Job | None = None
        self.left: list[str] = []  # runs of the job
        self.compiled: set[tuple[str, int]] = set()
        self._log = log
        with log.open("ab") as errors:
            self._before = errors.tell()
            self._popen = subprocess.Popen(
                [*command, f"--core={core}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                process_group=0,
            )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: "Events") -> None:
        with self._popen as popen:
            assert popen.stdout
            for line in popen.stdout:
                if (event := _event_of(line)) is not None:
                    events.put((self, event))
        events.put((self, {"event": "ended"}))

    def begin(self, job: Job) -> None:
        """Hands over a job; one that is dead already says so by itself."""
        assert self._popen.stdin
        self.job, self.left = job, list(job.runs)
        self.compiled.add(job.programs)
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._popen.stdin.write(f"{job.word}\n")
            self._popen.stdin.flush()

    def close(self) -> None:
        """Nothing more is to come."""
        assert self._popen.stdin
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.close()

    def terminate(self) -> None:
        """Asks it to save and leave."""
        self._popen.terminate()

    def kill(self) -> None:
        """Ends it at once."""
        self._popen.kill()

    @property
    def exit_code(self) -> int:
        """Once it has ended."""
        return self._popen.wait()

    def last_words(self) -> str:
        """The last line it wrote to standard error."""
        said = self._log.read_bytes()[self._before :].decode(errors="replace")
        lines = said.strip().splitlines()
        return lines[-1] if lines else f"exit code {self.exit_code}"


Events = queue.SimpleQueue[tuple[_Process | None, Event]]  # a signal handler may put into it


class Pool:
    """Worker processes and what is left for them.

    Args:
        command: of a worker, but for its core.
        jobs: what is to be done.
        logs: folder for what workers write to standard error.
        workers: at most; 0 is as many as this machine has cores, or one for its accelerators.
    """

    def __init__(self, command: Sequence[str], jobs: Sequence[Job], logs: Path, workers: int = 0):
        self._command, self._logs, self._most = list(command), logs, workers
        self._waiting = sorted(jobs, key=lambda job: -job.cost)
        self._events: Events = queue.SimpleQueue()
        self._running: list[_Process] = []
        self._attempts: Counter[str] = Counter()
        self._stillborn = 0  # workers in a row
        self._stopping = False
        self._deadline: float | None = None  # of workers that were told to stop
        logs.mkdir(parents=True, exist_ok=True)

    def run(self, on_event: Callable[[Event], None]) -> None:
        """Does all jobs; returns when no worker is left.

        Args:
            on_event: hears of everything: "ready" (with how many `devices` a worker has),
                "trained", "skipped", "done" as workers tell it; "lost" (a run whose worker died;
                `given_up` says whether it is tried again); "left" (one whose worker was told to
                leave); "stopping".

        Raises:
            OSError: a worker could not read or write a file, or none begins; the others were
                stopped.
        """
        cores = cpu.cores()
        self._start(cores[0])
        try:
            while self._running:
                process, event = self._hear()
                kind = event["event"]
                if kind == "ready" and process:
                    on_event(event)
                    self._stillborn = 0
                    if len(self._running) == 1 and event["platform"] == "cpu":
                        self._start_others(cores)
                    self._next(process)
                elif kind == "done" and process:
                    self._done(process, event, on_event)
                elif kind == "ended" and process:
                    self._bury(process, on_event)
                elif kind == "overdue":
                    self._end_all()
                else:
                    if kind == "stopping":
                        self._ask_all()
                    on_event(event)
        finally:
            for process in self._running:
                process.terminate()

    def stop(self) -> None:
        """Lets `run` return soon: workers save and leave, nothing is begun. For signal handlers."""
        self._events.put((None, {"event": "stopping"}))

    def _hear(self) -> tuple[_Process | None, Event]:
        """The next event."""
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        try:
            return self._events.get(timeout=left)
        except queue.Empty:
            return None, {"event": "overdue"}

    def _ask_all(self) -> None:
        """Asks all workers to leave."""
        self._stopping, self._deadline = True, time.monotonic() + LEAVING_S
        self._waiting.clear()
        for process in self._running:
            process.terminate()

    def _end_all(self) -> None:
        """Ends workers that were asked to leave and have not."""
        self._deadline = None
        for process in self._running:
            process.kill()

    def _done(self, process: _Process, event: Event, on_event: Callable[[Event], None]) -> None:
        """Takes a run off a worker's list."""
        process.left.remove(event["run"])
        on_event(event)
        if not process.left:
            process.job = None
            self._next(process)

    def _start(self, core: int) -> None:
        log = self._logs / f"worker{core}.txt"
        self._running.append(_Process(self._command, core, log, self._events))

    def _start_others(self, cores: Sequence[int]) -> None:
        """One for every further core."""
        wanted = min(self._most or len(cores), len(self._waiting))
        for index in range(1, wanted):
            self._start(cores[index % len(cores)])

    def _next(self, process: _Process) -> None:
        """Gives a worker its next run, or lets it go."""
        if not self._waiting:
            process.close()
            return
        job = min(self._waiting, key=lambda job: self._rank(process, job))
        self._waiting.remove(job)
        process.begin(job)

    def _rank(self, process: _Process, job: Job) -> tuple[bool, int, float]:
        """Compiled shapes first, then those that fewest others have, then the longest runs."""
        others = sum(job.programs in p.compiled for p in self._running if p is not process)
        compiled = job.programs in process.compiled
        return not compiled, 0 if compiled else others, -job.cost

    def _bury(self, process: _Process, on_event: Callable[[Event], None]) -> None:
        """Takes a worker that ended off the list; its job, if it had one, is tried again.

        Raises:
            OSError: it had bad input, or is one of several that died before they began.
        """
        self._running.remove(process)
        process.close()
        code, job = process.exit_code, process.job
        if code == BAD_INPUT:
            raise OSError(process.last_words().removeprefix("error: "))
        if self._stopping or (job is None and code == 0):
            return
        if code == PREEMPTED and job is not None:
            for run in process.left:
                on_event({"event": "left", "run": run})
            self._waiting.append(dataclasses.replace(job, runs=tuple(process.left)))
        elif job is not None:
            self._try_again(job, process, on_event)
        elif code != PREEMPTED:
            self._stillborn += 1
            if self._stillborn >= _ATTEMPTS:
                raise OSError(f"a worker ended by itself: {process.last_words()}")
        if self._waiting:
            self._start(process.core)

    def _try_again(self, job: Job, process: _Process, on_event: Callable[[Event], None]) -> None:
        """Puts back what a worker died of, unless it died of it too often."""
        again, reason = [], process.last_words()
        for run in process.left:
            self._attempts[run] += 1
            given_up = self._attempts[run] >= _ATTEMPTS
            on_event({"event": "lost", "run": run, "given_up": given_up, "reason": reason})
            again += [] if given_up else [run]
        together = all(self._attempts[run] < 2 for run in again)
        parts = [tuple(again)] if together else [(run,) for run in again]
        self._waiting += [dataclasses.replace(job, runs=part) for part in parts if part]


def _event_of(line: str) -> Event | None:
    """What a worker tells; None for anything else that reached its output, or is torn by a kill."""
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        return None
    return event if isinstance(event, dict) and "event" in event else None
