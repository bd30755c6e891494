"""Number formats as data: one rounding kernel serves every integer and every float.

A format is three numbers: how many mantissa bits a value keeps, the exponent below which the
step stops shrinking, and the largest value. A symmetric b-bit integer is the case
``mantissa_bits = min_exponent = b - 2`` (its step is 1 everywhere), float32 itself is
``(23, -126, inf)``, so "unquantized" needs no branch. `Format` holds the numbers on the host;
`Grid` holds them as traced arrays, so that one compiled program serves all formats.

Rounding works on the bits of the float32 input with integers only. Float arithmetic would be
shorter, but `log2`/`exp2` are wrong at powers of two, backends flush subnormals and rewrite
divisions; integer shifts are exact and equal everywhere. Ties go to the even *code*, which for
one or more mantissa bits is the even significand, as IEEE 754, OCP MX and ml_dtypes have it.

Sources: OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats 1.0; IEEE 754-2019.
"""

import dataclasses
import difflib
import re
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

if TYPE_CHECKING:
    ArrayOrShape = Array
else:
    ArrayOrShape = Array | jax.ShapeDtypeStruct  # what `jax.eval_shape` builds a pytree of

_MANTISSA_BITS = 23  # of float32
_BIAS = 127
_LARGEST_FLOAT32_EXPONENT = 127
NAN_CODE = -(2**31)  # symmetric codes leave the most negative integer free


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grid:
    """The numbers of a format as one array, so that precision is data in a compiled program.

    One array and not five: a model holds a grid per operand and layer, and every leaf costs the
    host time at each call of a compiled step.

    Attributes:
        numbers: float32, shape (5,), or (..., 5) to `vmap` over: the five properties in order.
    """

    numbers: Float[ArrayOrShape, "*stack 5"]

    @property
    def mantissa_bits(self) -> Int[Array, "*stack"]:
        """Mantissa bits kept by values of at least ``2**min_exponent``, int32."""
        return self.numbers[..., 0].astype(jnp.int32)

    @property
    def min_exponent(self) -> Int[Array, "*stack"]:
        """Exponent below which the step no longer shrinks, int32."""
        return self.numbers[..., 1].astype(jnp.int32)

    @property
    def min_value(self) -> Float[Array, "*stack"]:
        """Smallest magnitude; 0 except for the binary grid, which has no zero."""
        return self.numbers[..., 2]

    @property
    def max_value(self) -> Float[Array, "*stack"]:
        """Largest magnitude; infinity for "none"."""
        return self.numbers[..., 3]

    @property
    def scaled(self) -> Bool[Array, "*stack"]:
        """Whether a quantizer maps the largest magnitude of a tensor to `max_value`."""
        return self.numbers[..., 4] != 0


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Format:
    """A number format on the host; hashable, and static when it enters a compiled program.

    Attributes:
        name: canonical spelling; ``parse_format(f.name) == f``.
        bits: storage bits per element; log2(3) for ternary.
        mantissa_bits: mantissa bits of a normal value, without the implied one.
        min_exponent: exponent of the smallest normal value.
        max_value: largest finite magnitude.
        min_value: smallest magnitude; 0 except for binary.
        scaled: False for formats used as a plain cast (bf16, fp16, none, and every ExMy with
            eight exponent bits, whose range is float32's own).
    """

    name: str
    bits: float
    mantissa_bits: int
    min_exponent: int
    max_value: float
    min_value: float = 0.0
    scaled: bool = True

    @property
    def quantizes(self) -> bool:
        """False only for "none", which keeps every value (but makes -0 a +0)."""
        return bool(np.isfinite(self.max_value))

    @property
    def magnitudes(self) -> np.ndarray:
        """All magnitudes in rising order, float32; for formats of at most 16 bits.

        A magnitude's position is its code; but binary, which has no zero, holds code 1 alone.
        """
        if self.bits > 16:
            raise ValueError(f"format {self.name!r} has too many values to list")
        codes = np.arange(2**16)
        binade = np.maximum((codes >> self.mantissa_bits) - 1, 0)
        significand = codes - (binade << self.mantissa_bits)
        exponent = np.minimum(self.min_exponent - self.mantissa_bits + binade, 1000)
        values = np.ldexp(significand.astype(np.float64), exponent)
        in_range = (values >= self.min_value) & (values <= self.max_value)
        magnitudes: np.ndarray = values[in_range].astype(np.float32)
        return magnitudes

    def grid(self) -> Grid:
        """The format's numbers as an array of shape (5,)."""
        numbers = (
            self.mantissa_bits,
            self.min_exponent,
            self.min_value,
            self.max_value,
            self.scaled,
        )
        return Grid(jnp.asarray(numbers, jnp.float32))

    def __str__(self) -> str:
        """The name alone, as it is written in policies and result rows."""
        return self.name


def round_to_grid(y: Float[Array, "..."], grid: Grid) -> Float[Array, "..."]:
    """Rounds to the nearest value of the grid, ties to the even code.

    Magnitudes above the largest value, infinity included, become the largest value; NaN stays
    NaN; a result of zero is +0.

    Args:
        y: float32, in units of the grid (already divided by its scale).
        grid: of one format, `numbers` of shape (5,).

    Returns:
        float32 of the shape of `y`.

    Raises:
        TypeError: `y` is not float32.
    """
    if y.dtype != jnp.float32:
        raise TypeError(f"round_to_grid takes float32, got {y.dtype}")
    r = _round_magnitude(y, grid)
    magnitude_bits = ((r.biased_exponent - 1) << _MANTISSA_BITS) + (r.significand << r.dropped)
    sign_bit = jax.lax.bitcast_convert_type(y, jnp.int32) & jnp.int32(-(2**31))
    bits = jnp.where(r.significand == 0, 0, magnitude_bits | sign_bit)
    return jnp.where(jnp.isnan(y), y, jax.lax.bitcast_convert_type(bits, jnp.float32))


def encode(y: Float[Array, "..."], grid: Grid) -> Int[Array, "..."]:
    """Signed codes of the rounded values: sign times position in `Format.magnitudes`.

    For integers this is the integer itself, for floats the magnitude bits of the OCP or IEEE
    encoding with a sign in front. NaN becomes `NAN_CODE`.

    Args:
        y: float32, in units of the grid.
        grid: as in `round_to_grid`.

    Returns:
        int32 of the shape of `y`.
    """
    r = _round_magnitude(y, grid)
    code = (r.binade << grid.mantissa_bits) + r.significand
    # By its bit, as in `round_to_grid`: backends that flush subnormals compare them as zeros.
    negative = jax.lax.bitcast_convert_type(y, jnp.int32) < 0
    return jnp.where(jnp.isnan(y), NAN_CODE, jnp.where(negative, -code, code))


def decode(codes: Int[Array, "..."], grid: Grid) -> Float[Array, "..."]:
    """Values of signed int32 codes, float32: the inverse of `encode` on rounded values."""
    magnitude = jnp.abs(codes)
    binade = jnp.maximum((magnitude >> grid.mantissa_bits) - 1, 0)
    significand = (magnitude - (binade << grid.mantissa_bits)).astype(jnp.float32)
    # Two exact products: the power of the smallest step alone may lie below float32's range.
    value = significand * _power_of_two(-grid.mantissa_bits)
    value = value * _power_of_two(grid.min_exponent + binade)
    return jnp.where(codes == NAN_CODE, jnp.nan, jnp.where(codes < 0, -value, value))


@dataclasses.dataclass(frozen=True)
class _RoundedMagnitude:
    """value = significand << dropped, at the input's binade; code = binade << m + significand."""

    significand: Array  # after rounding; at most 2**(mantissa_bits + 1)
    dropped: Array  # low bits of the input's 24-bit significand that rounding removed
    binade: Array  # how many binades above the lowest, 0 for subnormals of the grid
    biased_exponent: Array  # of the clipped input


def _power_of_two(exponent: Array) -> Array:
    """2**exponent, exactly, for exponents of normal float32 values."""
    return jax.lax.bitcast_convert_type((exponent + _BIAS) << _MANTISSA_BITS, jnp.float32)


def _round_magnitude(y: Array, grid: Grid) -> _RoundedMagnitude:
    """Clips |y| to the grid's range and rounds its significand to the grid's step."""
    smallest = jax.lax.bitcast_convert_type(grid.min_value, jnp.int32)
    largest = jax.lax.bitcast_convert_type(grid.max_value, jnp.int32)
    bits = jax.lax.bitcast_convert_type(y, jnp.int32) & 0x7FFFFFFF
    bits = jnp.minimum(jnp.maximum(bits, smallest), largest)  # magnitudes order like their bits
    biased = jnp.maximum(bits >> _MANTISSA_BITS, 1)  # subnormals share the exponent of 1
    implied_one = jnp.where(bits >> _MANTISSA_BITS == 0, 0, 1 << _MANTISSA_BITS)
    significand = (bits & ((1 << _MANTISSA_BITS) - 1)) | implied_one

    above_lowest = biased - _BIAS - grid.min_exponent
    binade = jnp.maximum(above_lowest, 0)
    dropped = _MANTISSA_BITS - grid.mantissa_bits + binade - above_lowest
    dropped = jnp.minimum(dropped, _MANTISSA_BITS + 2)  # beyond this everything rounds to zero
    kept = significand >> dropped
    odd = ((binade << grid.mantissa_bits) + kept) & 1
    remainder = significand - (kept << dropped)
    kept = kept + (2 * remainder + odd > 1 << dropped).astype(jnp.int32)
    return _RoundedMagnitude(kept, dropped, binade, biased)


def _integer(bits: int) -> Format:
    """Symmetric integers -(2**(b-1) - 1) … 2**(b-1) - 1."""
    return Format(f"int{bits}", bits, bits - 2, bits - 2, 2.0 ** (bits - 1) - 1)


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
        "binary": Format("binary", 1, 0, 0, 1.0, min_value=1.0),
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
_INTEGER = re.compile(r"int([1-9]\d*)")
_FLOAT = re.compile(r"e([1-9]\d*)m(\d+)(ieee)?")


def parse_format(name: str) -> Format:
    """Reads a format by name.

    Integers ``int1 … int16`` (symmetric; ``int1`` is ``binary``, ±1), floats ``ExMy`` with
    x = 1…8 exponent and y = 0…10 mantissa bits, ``ternary``, ``binary``, ``bf16``, ``fp16`` and
    ``none``. ``e4m3`` and ``e5m2`` have the OCP meaning (largest values 448 and 57344); every
    other ExMy has IEEE bias and all codes finite, which for e2m1, e2m3 and e3m2 is OCP's meaning
    too. Suffixes: ``ieee`` keeps the topmost exponent for infinity and NaN; ``e4m3fnuz``,
    ``e4m3b11fnuz`` and ``e5m2fnuz`` are the variants without negative zero.

    Raises:
        ValueError: unknown name; the message has the nearest valid spelling.
    """
    key = _ALIASES.get(name.strip().lower(), name.strip().lower())
    if key in _NAMED:
        return _NAMED[key]
    if match := _INTEGER.fullmatch(key):
        if 2 <= int(match[1]) <= 16:
            return _integer(int(match[1]))
        raise ValueError(f"format {name!r}: integers have 1 to 16 bits, nearest is 'int16'")
    if match := _FLOAT.fullmatch(key):
        exponent_bits, mantissa_bits = int(match[1]), int(match[2])
        if exponent_bits > 8 or mantissa_bits > 10:
            nearest = f"e{min(exponent_bits, 8)}m{min(mantissa_bits, 10)}"
            raise ValueError(
                f"format {name!r}: ExMy has x = 1…8 and y = 0…10, nearest is {nearest!r}"
            )
        if match[3] and exponent_bits < 2:
            raise ValueError(
                f"format {name!r}: an IEEE format needs 2 exponent bits or more, "
                f"nearest is 'e2m{mantissa_bits}ieee'"
            )
        return (
            _ieee(exponent_bits, mantissa_bits)
            if match[3]
            else _float(exponent_bits, mantissa_bits)
        )
    known = [*_NAMED, *_ALIASES, *(f"int{b}" for b in range(1, 17)), "e2m1", "e3m2", "e2m3"]
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"unknown format {name!r}: expected int1…int16, ExMy, ternary, binary, bf16, fp16 or none; "
        f"nearest is {nearest!r}"
    )
