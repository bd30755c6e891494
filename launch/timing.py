"""Fair timing of several programs in one process.

A machine's speed drifts and its caches remember. So the programs take turns, one call each a
round, and every figure is a ratio within a round: what slows a round down slows down both sides
of it. The order is a balanced Latin square (Williams 1949): over as many rounds as there are
programs, each takes every turn once and, for an even number, follows every other once.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

WARM_UP = 3  # calls of each program before the clock runs


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Time of a program relative to another's: quartiles over rounds."""

    median: float
    low: float
    high: float


def take_turns(
    calls: Sequence[Callable[[], Any]],
    rounds: int,
    on_round: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> np.ndarray:
    """Times programs in turn, each call until its result is there.

    Args:
        calls: programs; each returns what to wait for.
        rounds: how often each is timed.
        on_round: called after each round, off the clock.
        clock: seconds.

    Returns:
        Seconds, (rounds, programs).
    """
    for call in calls:
        for _ in range(WARM_UP):
            jax.block_until_ready(call())
    seconds_RP = np.zeros((rounds, len(calls)))
    for index in range(rounds):
        for program in order(index, len(calls)):
            start = clock()
            jax.block_until_ready(calls[program]())
            seconds_RP[index, program] = clock() - start
        on_round()
    return seconds_RP


def order(index: int, programs: int) -> list[int]:
    """Whose turn it is in a round: 0, 1, n-1, 2, n-2, … moved on by one each round."""
    steps = ((turn + 1) // 2 * (1 if turn % 2 else -1) for turn in range(programs))
    return [(index + step) % programs for step in steps]


def ratio(seconds_R: np.ndarray, plain_R: np.ndarray) -> Ratio:
    """How much longer a program took than another did in the same round."""
    low, median, high = np.quantile(seconds_R / plain_R, [0.25, 0.5, 0.75])
    return Ratio(float(median), float(low), float(high))


@contextmanager
def counting_compiles() -> Iterator[collections.Counter[str]]:
    """Counts what XLA compiles inside the context, by the name of the jitted function."""
    compiled: collections.Counter[str] = collections.Counter()

    def listen(event: str, duration_secs: float, **details: str | int) -> None:
        del duration_secs
        if event.endswith("backend_compile_duration"):
            compiled[str(details.get("fun_name")).removeprefix("jit(").removesuffix(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> str:
    """Aligned columns: the first `text_columns` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = [
        "  ".join(
            cell.ljust(width) if index < text_columns else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in (head, rule, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)
