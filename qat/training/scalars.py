"""What is plotted over training, and what a place to plot it has to offer.

A `Point` is a step and its numbers by name. Every step has its loss, gradient norm and learning
rate; where the speed was measured, it has that too.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from qat.training.step import Metrics
from qat.training.throughput import Speed

Point = tuple[int, Mapping[str, float]]


@runtime_checkable
class Writer(Protocol):
    """Where points go."""

    def write(self, points: Iterable[Point]) -> None:
        """Keeps points, in the order of their steps; nothing is lost once this returns."""
        ...

    def close(self) -> None:
        """Ends the plot; the writer is not used again."""
        ...


def points(step: int, metrics: Sequence[Metrics], speed: Speed | None) -> list[Point]:
    """The points of the steps since the last log.

    Args:
        step: steps taken, the last of these among them.
        metrics: of these steps, in order.
        speed: as of the last of them, if it is known.

    Returns:
        For each step ``loss`` (nats per token), ``grad_norm`` and ``learning_rate``; for the last
        ``step_ms``, ``tokens_per_s`` and, where the devices' peak is known, ``utilisation``.
    """
    first = step - len(metrics) + 1
    found = [
        (first + place, {name: float(value) for name, value in each._asdict().items()})
        for place, each in enumerate(metrics)
    ]
    if found and speed is not None:
        numbers = found[-1][1]
        numbers |= {"step_ms": 1e3 * speed.step_s, "tokens_per_s": speed.tokens_per_s}
        if speed.utilisation is not None:
            numbers["utilisation"] = speed.utilisation
    return list(found)
