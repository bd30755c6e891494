"""A loss, or a difference of losses, by position in the context.

What quantizes a cache may cost little near the start of a sequence and more the longer it gets, or
the other way round. Its error there is the difference to the original by position, with the
standard error of that difference: give `by_position` differences.

Shapes: R sequences, T positions; position t is predicted from t + 1 tokens.
"""

import itertools

import numpy as np
from jaxtyping import Float

from qat.analysis.paired import mean_and_standard_error
from qat.spelling import expected_one_of

_SPACINGS = ("log", "equal")


def edges(positions: int, bins: int, spacing: str = "log") -> tuple[int, ...]:
    """Where bins of positions begin and end: 0 first, `positions` last.

    Args:
        positions: T.
        bins: at most so many; fewer where positions do not suffice.
        spacing: "log", each bin ends at half the next one's end; "equal".

    Raises:
        ValueError: fewer than one position or bin, or another spacing.
    """
    if positions < 1 or bins < 1:
        raise ValueError(f"{positions} positions in {bins} bins: expected at least 1 of each")
    if spacing not in _SPACINGS:
        raise ValueError(expected_one_of("spacing", spacing, _SPACINGS))
    if spacing == "log":
        inner = [positions >> halvings for halvings in range(bins)]
    else:
        inner = [positions * end // bins for end in range(bins + 1)]
    return tuple(sorted({0, *inner}))


def by_position(
    values_RT: Float[np.ndarray, "R T"], ends: tuple[int, ...]
) -> list[tuple[float, float]]:
    """Mean and standard error over sequences in each bin of positions.

    Args:
        values_RT: losses or differences of losses, nats.
        ends: as `edges` returns them.
    """
    return [
        mean_and_standard_error(values_RT[:, start:stop].mean(axis=1))
        for start, stop in itertools.pairwise(ends)
    ]
