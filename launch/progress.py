"""Progress of long work: a bar with the time left on a terminal, plain lines otherwise."""

import sys
import threading
import time
from types import TracebackType
from typing import Protocol, Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 15.0


class Tally(Protocol):
    """What is told of units of work as they are done."""

    def skip(self, amount: float) -> None:
        """Hears of work that was done before."""
        ...

    def advance(self, amount: float, note: str = "") -> None:
        """Hears of work done."""
        ...


class Meter:
    """Counts units of work as they are done; safe to use from several threads."""

    def __init__(self, title: str, total: float, unit: str = ""):
        self._title, self._total, self._unit = title, total, unit
        self._done = self._before = 0.0
        self._start = self._last_line = time.monotonic()
        self._complete = False
        self._lock = threading.Lock()
        self._first: tuple[float, float] | None = None  # when, and how much was done by then
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        if sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self._unit),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(compact=True, elapsed_when_finished=False),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self._bar = Progress(*columns)
            self._task = self._bar.add_task(self._title, total=self._total, note="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def skip(self, amount: float) -> None:
        """Adds work that was done before, which says nothing of the time left."""
        with self._lock:
            self._done += amount
            self._before += amount
            if self._bar:
                self._bar.reset(self._task, completed=int(self._done))

    def advance(self, amount: float, note: str = "") -> None:
        """Adds work done; shows it, and the note beside it."""
        with self._lock:
            self._done += amount
            if self._bar:
                self._bar.update(self._task, advance=amount, note=note)
                return
            now = time.monotonic()
            if self._first is None:
                self._first = (now, self._done - self._before)
            before, self._complete = self._complete, self._done >= self._total * (1 - 1e-9)
            if now - self._last_line >= _SECONDS_BETWEEN_LINES or before < self._complete:
                self._last_line = now
                parts = [f"{self._done:.0f}/{self._total:.0f} {self._unit}"]
                parts += [f"{now - self._start:.0f} s", *self._time_left(now), note]
                print(f"{self._title}: {', '.join(filter(None, parts))}", flush=True)

    def _time_left(self, now: float) -> list[str]:
        """At the pace since the first work was done, as what came before was preparation."""
        here = self._done - self._before
        assert self._first
        began, before = self._first
        left = self._total - self._done
        if self._complete:
            return ["0 s left"]
        return [f"{(now - began) / (here - before) * left:.0f} s left"] if here > before else []

    def say(self, line: str) -> None:
        """Prints a line beside the bar."""
        if self._bar:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)
