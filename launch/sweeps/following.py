"""What the driver shows of its workers: a meter of all runs, a line for each that goes wrong.

Progress is counted in tokens that are trained on. A run evaluates too, at its ends and for every
rounding; the forward pass of a token counts as a third. Whatever a run has told when its worker is
gone is taken back, since the next one tells it again.
"""

import collections
from collections.abc import Sequence
from pathlib import Path

from launch.lab import Lab
from launch.progress import Meter
from launch.sweeps import failures, fitting
from launch.sweeps.budget import Ptq, evaluations, trained_tokens
from launch.sweeps.local import Event
from launch.sweeps.plan import Plan
from launch.sweeps.working import fail

_UNITS = (
    (1e10, 1e9, "billion tokens"),
    (1e7, 1e6, "million tokens"),
    (1e4, 1e3, "thousand tokens"),
)


class Following:
    """Hears the events of a pool.

    Args:
        lab: text and programs.
        plan: of the sweep.
        missing: the runs to be done.
        workdir: of the sweep.
    """

    def __init__(self, lab: Lab, plan: Plan, missing: Sequence[str], workdir: Path):
        self._lab, self._plan, self._missing, self._workdir = lab, plan, missing, workdir
        self._told: collections.Counter[str] = collections.Counter()  # tokens by run
        self._ends: collections.Counter[str] = collections.Counter()
        total = sum(map(self._work, missing))
        self._unit, name = unit_of(total)
        self.meter = Meter("Training", total / self._unit, name)

    def __call__(self, event: Event) -> None:
        """Shows what happened.

        Raises:
            ValueError: the devices of a worker do not suit a run.
        """
        kind, run_id = event["event"], event.get("run", "")
        if kind == "ready":
            self._check_devices(event["devices"])
        elif kind in ("skipped", "trained"):
            self._count(run_id, event["tokens"], trained=kind == "trained")
        elif kind == "done":
            self._end(run_id, event["status"])
        elif kind == "stopping":
            self.meter.say("workers save and leave; a second Ctrl-C does not wait for them")
        elif kind in ("lost", "left"):
            self.meter.skip(-self._told.pop(run_id, 0) / self._unit)
        if kind == "lost":
            self.meter.say(f"{self._plan.told(run_id)}: its worker died: {event['reason']}")
            if event["given_up"]:
                reason = f"a worker died: {event['reason']}"
                fail(self._lab, self._plan, self._workdir, run_id, reason)
                self._end(run_id, "failed")

    def _check_devices(self, count: int) -> None:
        for run_id in self._missing:
            try:
                fitting.check_mesh(self._plan.runs[run_id], count)
            except ValueError as error:
                raise ValueError(f"{self._plan.told(run_id)}: {error}") from None

    def _count(self, run_id: str, tokens: float, trained: bool) -> None:
        """Adds tokens of a run, never more than it has."""
        tokens = min(tokens, trained_tokens(self._plan.runs[run_id]) - self._told[run_id])
        self._told[run_id] += int(tokens)
        if trained:
            self.meter.advance(tokens / self._unit, self._note())
        else:
            self.meter.skip(tokens / self._unit)

    def _end(self, run_id: str, status: str) -> None:
        """Counts a run, with all that it did not tell."""
        self._ends[status] += 1
        left = (self._work(run_id) - self._told.pop(run_id, 0)) / self._unit
        if status == "ok":
            self.meter.advance(left, self._note())
            return
        self.meter.skip(left)
        self.meter.advance(0, self._note())
        why = ""
        if status == "failed":
            why = f": {failures.reason(self._plan.folder(self._workdir, run_id))}"
        self.meter.say(f"{self._plan.told(run_id)}: {status}{why}")

    def _work(self, run_id: str) -> float:
        """Tokens of a run, with those of its evaluations."""
        experiment, sweep = self._plan.runs[run_id], self._plan.sweep
        ptq = Ptq(sweep.ptq_methods, sweep.ptq_formats, sweep.ptq_at)
        batches = sum(evaluations(experiment, ptq)) * experiment.config["evaluation_batches"]
        return trained_tokens(experiment) + experiment.tokens_at(batches) / 3

    def _note(self) -> str:
        left = len(self._missing) - self._ends.total()
        ends = ", ".join(f"{count} {status}" for status, count in sorted(self._ends.items()))
        return f"{ends or '0 done'}, {left} left"


def unit_of(tokens: float) -> tuple[float, str]:
    """A number of tokens by which to count so many, and its name."""
    suits = ((unit, name) for least, unit, name in _UNITS if tokens >= least)
    return next(suits, (1.0, "tokens"))
