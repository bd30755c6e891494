"""What laws of formats read, from the formats that rows name.

Rows say "e4m3" or "int4"; Sun et al. count bits of exponent and mantissa, Panferov et al. 2025
(arXiv 2506.01863) want the mean squared error of rounding standard normal values at the best scale.
That error is a property of the format alone: an integral over the normal density, taken here on a
fine grid of values, and the scale is the best of a fine grid of scales.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qat.formats import Format, parse_format
from qat.grid import round_to_grid

# Arrays end in their axes: S scales, X values.
Floats = NDArray[np.float64]

_OPERANDS = ("weight", "activation", "kv")
_VALUES, _SCALES = 4001, 400
_FARTHEST = 8.0  # of the largest value that a format keeps, in standard deviations


def with_format_columns(rows: pd.DataFrame) -> pd.DataFrame:
    """Adds what the laws "sun" and "capacity" read of formats.

    Args:
        rows: with any of weight_format, activation_format and kv_format, whose entries are names of
            formats, "none" for unquantized.

    Returns:
        The rows with ``exponent_bits`` and ``mantissa_bits`` of the weights' format (8 and 7, those
        of bfloat16, where it is none), and ``weight_error``, ``activation_error`` and ``kv_error``.
        Columns that are there already stay as they are.

    Raises:
        ValueError: for a name that is no format.
    """
    found: dict[str, list[float]] = {}
    for operand in _OPERANDS:
        if f"{operand}_format" in rows:
            names = rows[f"{operand}_format"].fillna("none")
            found[f"{operand}_error"] = [gaussian_error(name) for name in names]
            if operand == "weight":
                bits = [_bits(name) for name in names]
                found["exponent_bits"] = [exponent for exponent, _ in bits]
                found["mantissa_bits"] = [mantissa for _, mantissa in bits]
    return rows.assign(**{name: x for name, x in found.items() if name not in rows})


@functools.cache
def gaussian_error(name: str) -> float:
    """Mean squared error of rounding standard normal values to a format at its best scale.

    Args:
        name: of the format; the error of "none" is 0.

    Raises:
        ValueError: for a name that is no format.
    """
    parsed = parse_format(name)
    return _errors(parsed)[1] if parsed.quantizes else 0.0


def best_clip(name: str) -> float:
    """The largest value a format keeps at the scale of `gaussian_error`, in standard deviations."""
    parsed = parse_format(name)
    return _errors(parsed)[0] if parsed.quantizes else np.inf


def _errors(parsed: Format) -> tuple[float, float]:
    """Largest value kept and mean squared error, at the best scale."""
    grid = parsed.grid()
    # Equal steps, weighted: equal shares of probability would leave the tails to a few values.
    value_X = np.linspace(-_FARTHEST, _FARTHEST, _VALUES)
    density_X = np.exp(-(value_X**2) / 2)
    share_X = density_X / density_X.sum()
    clip_S = np.geomspace(0.3, _FARTHEST, _SCALES)
    if not parsed.scaled:
        clip_S = np.array([parsed.max_value])
    scale_S1 = (clip_S / parsed.max_value)[:, None]
    rounded_SX = np.asarray(round_to_grid(jnp.asarray(value_X / scale_S1, jnp.float32), grid))
    error_S = ((rounded_SX * scale_S1 - value_X) ** 2) @ share_X
    best = int(error_S.argmin())
    return float(clip_S[best]), float(error_S[best])


def _bits(name: str) -> tuple[int, int]:
    """Bits of exponent and mantissa; of an integer all but the sign are its mantissa."""
    parsed = parse_format(name)
    if not parsed.quantizes:
        return 8, 7
    mantissa = int(parsed.bits) - 1 if parsed.is_integer else parsed.mantissa_bits
    return int(parsed.bits) - 1 - mantissa, mantissa
