"""Number formats on the host: what a name such as "int4" or "e4m3" means.

`Format` holds the numbers that `qat.grid` rounds by; `parse_format` reads every integer and every
ExMy by rule and a few by name. A format whose values follow no rule lists them (`codebook`).

Sources: OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats 1.0; IEEE 754-2019;
NF4 from Dettmers et al., QLoRA (arXiv 2305.14314).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qat.grid import AnyGrid, Codebook, Grid
from qat.spelling import nearest

_LARGEST_FLOAT32_EXPONENT = 127
# Quantiles of the normal distribution, rescaled to ±1, with an exact zero.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Format:
    """A number format; hashable, and static when it enters a compiled program.

    Attributes:
        name: canonical spelling; ``parse_format(f.name) == f`` unless it is a user's own.
        bits: storage bits per element; log2(3) for ternary.
        mantissa_bits: mantissa bits of a normal value, without the implied one.
        min_exponent: exponent of the smallest normal value.
        max_value: largest finite value.
        min_value: smallest finite value; None for ``-max_value``.
        min_magnitude: smallest magnitude; 0 except for binary.
        scaled: False for formats used as a plain cast (bf16, fp16, none, and every ExMy with
            eight exponent bits, whose range is float32's own).
        levels: all values in rising order where they follow no rule (see `codebook`), else None.
    """

    name: str
    bits: float
    mantissa_bits: int
    min_exponent: int
    max_value: float
    min_value: float | None = None
    min_magnitude: float = 0.0
    scaled: bool = True
    levels: tuple[float, ...] | None = None

    @property
    def lowest(self) -> float:
        """Smallest finite value."""
        return -self.max_value if self.min_value is None else self.min_value

    @property
    def quantizes(self) -> bool:
        """False only for "none", which keeps every value (but makes -0 a +0)."""
        return bool(np.isfinite(self.max_value))

    @property
    def is_integer(self) -> bool:
        """Whether the values are consecutive integers, which a zero point may shift."""
        whole = self.min_exponent == self.mantissa_bits and not self.min_magnitude
        return whole and self.levels is None and self.max_value < 2.0 ** (self.mantissa_bits + 1)

    @property
    def magnitudes(self) -> np.ndarray:
        """All magnitudes in rising order, float32; for formats of at most 16 bits.

        A magnitude's position is its code; but binary, which has no zero, holds code 1 alone.
        """
        if self.bits > 16:
            raise ValueError(f"format {self.name!r} has too many values to list")
        if self.levels is not None:
            raise ValueError(f"codebook {self.name!r} has levels, and no magnitudes by rule")
        codes = np.arange(2**16)
        binade = np.maximum((codes >> self.mantissa_bits) - 1, 0)
        significand = codes - (binade << self.mantissa_bits)
        exponent = np.minimum(self.min_exponent - self.mantissa_bits + binade, 1000)
        values = np.ldexp(significand.astype(np.float64), exponent)
        largest = max(self.max_value, -self.lowest)
        in_range = (values >= self.min_magnitude) & (values <= largest)
        magnitudes: np.ndarray = values[in_range].astype(np.float32)
        return magnitudes

    @property
    def values(self) -> np.ndarray:
        """All values in rising order, float32; for formats of at most 16 bits."""
        if self.levels is not None:
            return np.asarray(self.levels, np.float32)
        positive = self.magnitudes
        values = np.union1d(-positive, positive) + 0.0  # no negative zero
        inside: np.ndarray = values[(values >= self.lowest) & (values <= self.max_value)]
        return inside

    def grid(self) -> AnyGrid:
        """The format's values as data for a compiled program."""
        if self.levels is not None:
            levels = np.asarray(self.levels, np.float32)
            return Codebook(jnp.asarray(levels), jnp.asarray(_thresholds(levels)))
        numbers = (
            self.mantissa_bits,
            self.min_exponent,
            self.min_magnitude,
            self.max_value,
            self.lowest,
            self.scaled,
        )
        return Grid(jnp.asarray(numbers, jnp.float32))

    def __str__(self) -> str:
        """The name alone, as it is written in policies and result rows."""
        return self.name


def codebook(name: str, levels: Sequence[float] | np.ndarray) -> Format:
    """A format of any finite values; all codebooks of one length share a compiled program.

    Args:
        name: for reports and stored tensors.
        levels: at least two different values, in any order; rounded to float32. A quantizer's
            scale maps the largest magnitude of a group to the end it lies on.

    Raises:
        ValueError: fewer than two levels, equal or non-finite ones, or none above zero.
    """
    with np.errstate(over="ignore"):  # infinity is refused
        rising = np.sort(np.asarray(levels, np.float32))
    if rising.ndim != 1 or rising.size < 2 or not np.isfinite(rising).all():
        raise ValueError(f"codebook {name!r}: expected two or more finite levels, got {levels!r}")
    if not (np.diff(rising) > 0).all() or rising[-1] <= 0:
        raise ValueError(
            f"codebook {name!r}: expected different levels, some above 0, got {levels!r}"
        )
    bits = int(np.ceil(np.log2(rising.size)))
    values = tuple(float(level) for level in rising)
    return Format(name, bits, 0, 0, values[-1], values[0], levels=values)


@functools.lru_cache
def gaussian_clip(fmt: Format) -> float:
    """The value, in units of the standard deviation, that `max_value` should stand for.

    It minimises the mean squared error of rounding a normal variable (Panferov et al., QuEST,
    arXiv 2502.05003, tabulate it for integers); 1 for formats without a scale.
    """
    if not fmt.scaled:
        return 1.0
    values = fmt.values.astype(np.float64) / fmt.max_value
    clips = np.geomspace(0.5, 16, 64)
    for _ in range(5):  # zoom in on the best, since the error of floats has several minima
        errors = [_gaussian_error(values * clip) for clip in clips]
        best = int(np.argmin(errors))
        clips = np.linspace(clips[max(best - 1, 0)], clips[min(best + 1, clips.size - 1)], 12)
    return float(clips[np.argmin([_gaussian_error(values * clip) for clip in clips])])


def _gaussian_error(levels: np.ndarray) -> float:
    """Mean squared error of rounding a standard normal variable to the nearest level."""
    middles = (levels[1:] + levels[:-1]) / 2
    density = np.exp(-(middles**2) / 2) / np.sqrt(2 * np.pi)
    density = np.concatenate([[0.0], density, [0.0]])
    below = np.asarray([0.5 * math.erfc(-m / math.sqrt(2)) for m in middles])
    probability = np.diff(np.concatenate([[0.0], below, [1.0]]))
    return float(1 + levels**2 @ probability + 2 * levels @ np.diff(density))


def _thresholds(levels: np.ndarray) -> np.ndarray:
    """Largest float32 values that go to the lower of two levels; middles to the even position."""
    middles = (levels[1:].astype(np.float64) + levels[:-1]) / 2
    rounded = middles.astype(np.float32)
    below = np.nextafter(rounded, np.float32(-np.inf))
    smallest_normal = np.finfo(np.float32).tiny  # others are zero to many backends
    below = np.where(rounded == 0, -smallest_normal, below)
    upper_is_even = np.arange(levels.size - 1) % 2 == 1
    goes_up = (rounded > middles) | ((rounded == middles) & upper_is_even)
    thresholds: np.ndarray = np.where(goes_up, below, rounded)
    return thresholds


def _integer(bits: int) -> Format:
    """Symmetric integers -(2**(b-1) - 1) … 2**(b-1) - 1."""
    return Format(f"int{bits}", bits, bits - 2, bits - 2, 2.0 ** (bits - 1) - 1)


def _full_range(bits: int) -> Format:
    """Two's complement: -2**(b-1) … 2**(b-1) - 1."""
    fmt = _integer(bits)
    return dataclasses.replace(fmt, name=f"int{bits}full", min_value=-(2.0 ** (bits - 1)))


def _unsigned(bits: int) -> Format:
    """Integers 0 … 2**b - 1."""
    return Format(f"uint{bits}", bits, bits - 1, bits - 1, 2.0**bits - 1, min_value=0.0)


def _float(exponent_bits: int, mantissa_bits: int) -> Format:
    """IEEE bias, subnormals, every code finite; capped where float32 ends."""
    bias = 2 ** (exponent_bits - 1) - 1
    top_exponent = min(2**exponent_bits - 1 - bias, _LARGEST_FLOAT32_EXPONENT)
    return Format(
        f"e{exponent_bits}m{mantissa_bits}",
        1 + exponent_bits + mantissa_bits,
        mantissa_bits,
        1 - bias,
        2.0**top_exponent * (2 - 2.0**-mantissa_bits),
        scaled=exponent_bits < 8,
    )


def _ieee(exponent_bits: int, mantissa_bits: int) -> Format:
    """IEEE bias and the topmost exponent kept for infinity and NaN."""
    fmt = _float(exponent_bits, mantissa_bits)
    top_exponent = 2 ** (exponent_bits - 1) - 1
    largest = 2.0**top_exponent * (2 - 2.0**-mantissa_bits)
    return dataclasses.replace(fmt, name=f"{fmt.name}ieee", max_value=largest)


def _named_formats() -> dict[str, Format]:
    """The formats that are not the plain reading of an integer or ExMy name."""
    e4m3, e5m2 = _float(4, 3), _float(5, 2)
    return {
        "none": Format("none", 32, 23, -126, float("inf"), scaled=False),
        "bf16": Format("bf16", 16, 7, -126, 2.0**127 * (2 - 2.0**-7), scaled=False),
        "fp16": Format("fp16", 16, 10, -14, 65504.0, scaled=False),
        "ternary": dataclasses.replace(_integer(2), name="ternary", bits=float(np.log2(3))),
        "nf4": codebook("nf4", _NF4),
        "binary": Format("binary", 1, 0, 0, 1.0, min_magnitude=1.0),
        "e4m3": dataclasses.replace(e4m3, max_value=448.0),
        "e5m2": dataclasses.replace(e5m2, max_value=57344.0),
        "e4m3fnuz": dataclasses.replace(e4m3, name="e4m3fnuz", min_exponent=-7, max_value=240.0),
        "e4m3b11fnuz": dataclasses.replace(
            e4m3, name="e4m3b11fnuz", min_exponent=-10, max_value=30.0
        ),
        "e5m2fnuz": dataclasses.replace(e5m2, name="e5m2fnuz", min_exponent=-15, max_value=57344.0),
    }


_NAMED = _named_formats()
_ALIASES = {
    "int1": "binary",  # a symmetric 1-bit integer would hold nothing but zero
    "fp32": "none",
    "f32": "none",
    "bfloat16": "bf16",
    "float16": "fp16",
    "e4m3fn": "e4m3",
    "e2m1fn": "e2m1",
    "e2m3fn": "e2m3",
    "e3m2fn": "e3m2",
}
# What people call them elsewhere, without saying which exactly: for error messages.
_MEANT = {
    "fp8": "e4m3",
    "float8": "e4m3",
    "f8": "e4m3",
    "bf8": "e5m2",
    "fp6": "e2m3",
    "float6": "e2m3",
    "fp4": "e2m1",
    "float4": "e2m1",
    "f4": "e2m1",
    "float32": "none",
}
_INTEGER = re.compile(r"(u?int)(0|[1-9]\d*)(full)?")
_FLOAT = re.compile(r"e([1-9]\d*)m(\d+)(ieee)?")
_LEVELS = re.compile(r"codebook\((.*)\)")
_EXAMPLE = "codebook(-1,0,1)"


def parse_format(name: str) -> Format:
    """Reads a format by name.

    Integers ``int1 … int16`` (symmetric; ``int1`` is ``binary``, ±1), ``int2full … int16full``
    (two's complement), ``uint1 … uint16``, floats ``ExMy`` with x = 1…8 exponent and y = 0…10
    mantissa bits, ``ternary``, ``binary``, ``nf4``, ``bf16``, ``fp16``, ``none``, and a codebook
    by its levels, ``codebook(-1,0,0.5)``. ``e4m3`` and ``e5m2`` have the OCP meaning (largest
    values 448 and 57344); every other ExMy has IEEE bias and all codes finite, which for e2m1,
    e2m3 and e3m2 is OCP's meaning too. Suffixes: ``ieee`` keeps the topmost exponent for infinity
    and NaN; ``e4m3fnuz``, ``e4m3b11fnuz`` and ``e5m2fnuz`` are the variants without negative zero.

    Raises:
        ValueError: unknown name; the message has the nearest valid spelling. As `codebook`.
    """
    key = _ALIASES.get(name.strip().lower(), name.strip().lower())
    if key in _NAMED:
        return _NAMED[key]
    if match := _INTEGER.fullmatch(key):
        return _parsed_integer(name, match[1], int(match[2]), bool(match[3]))
    if match := _FLOAT.fullmatch(key):
        return _parsed_float(name, int(match[1]), int(match[2]), bool(match[3]))
    if match := _LEVELS.fullmatch(key):
        return _parsed_codebook(name, match[1])
    integers = [f"{kind}{b}" for kind in ("int", "uint") for b in range(1, 17)]
    others = ("int4full", "int8full", "e2m1", "e3m2", "e2m3", _EXAMPLE)
    closest = _MEANT.get(key, nearest(key, [*_NAMED, *_ALIASES, *integers, *others]))
    raise ValueError(
        f"unknown format {name!r}: expected int1…int16, int2full…, uint1…uint16, ExMy, ternary, "
        f"binary, nf4, bf16, fp16, {_EXAMPLE} or none; nearest is {closest!r}"
    )


def _parsed_integer(name: str, kind: str, bits: int, full: bool) -> Format:
    fewest = 2 if full or kind == "int" else 1
    suffix = "full" if full else ""
    if not fewest <= bits <= 16 or (full and kind == "uint"):
        closest = f"{kind}{min(max(bits, 1 + full), 16)}{suffix if kind == 'int' else ''}"
        raise ValueError(f"format {name!r}: integers have 1 to 16 bits, nearest is {closest!r}")
    if kind == "uint":
        return _unsigned(bits)
    return _full_range(bits) if full else _integer(bits)


def _parsed_float(name: str, exponent_bits: int, mantissa_bits: int, ieee: bool) -> Format:
    if exponent_bits > 8 or mantissa_bits > 10:
        typed_twice = mantissa_bits >= 20  # as e4m33
        mantissa = int(str(mantissa_bits)[0]) if typed_twice else min(mantissa_bits, 10)
        closest = f"e{min(exponent_bits, 8)}m{mantissa}"
        raise ValueError(f"format {name!r}: ExMy has x = 1…8 and y = 0…10, nearest is {closest!r}")
    if ieee and exponent_bits < 2:
        raise ValueError(
            f"format {name!r}: an IEEE format needs 2 exponent bits or more, "
            f"nearest is 'e2m{mantissa_bits}ieee'"
        )
    return (_ieee if ieee else _float)(exponent_bits, mantissa_bits)


def _parsed_codebook(name: str, text: str) -> Format:
    try:
        fmt = codebook(name, [float(level) for level in text.split(",")])
    except (ValueError, OverflowError) as error:
        raise ValueError(f"format {name!r}: {error}; expected such as {_EXAMPLE!r}") from None
    levels = [np.format_float_positional(np.float32(level), trim="-") for level in fmt.values + 0.0]
    return dataclasses.replace(fmt, name=f"codebook({','.join(levels)})")
