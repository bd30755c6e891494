"""The values of a number format as traced arrays, and the one kernel that rounds to them.

A format is three numbers: how many mantissa bits a value keeps, the exponent below which the
step stops shrinking, and the largest value. A symmetric b-bit integer is the case
``mantissa_bits = min_exponent = b - 2`` (its step is 1 everywhere), float32 itself is
``(23, -126, inf)``, so "unquantized" needs no branch. Held as an array, the numbers are data: one
compiled program serves all formats. Only a `Codebook`, whose values follow no rule, is a
structure of its own.

Exponents are taken from the bits of the float32 input: `log2` and `exp2` are wrong at powers of
two. Rounding itself is one float32 sum, which is exact in the sense of IEEE 754 and a third of the
price of doing it with integers; grids as wide as float32, where that sum would overflow, round
their bits. Ties go to the even *code*, which for one or more mantissa bits is the even
significand, as IEEE 754, OCP MX and ml_dtypes have it.

Stochastic rounding takes a value to either neighbour, with a probability equal to its distance
from the other, in steps.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

if TYPE_CHECKING:
    Leaf = Array
else:
    Leaf = Any  # JAX builds pytrees of shapes and of sentinels too

NAN_CODE = -(2**31)  # codes leave the most negative integer free

_MANTISSA_BITS = 23  # of float32
_BIAS = 127
_EXPONENT = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF
_SIGN = -(2**31)
_WIDEST_SHIFTED = 2.0**100  # beyond, 2**23 steps may overflow
_RANDOM_BITS = 24  # stochastic rounding keeps expectations to 2**-24 of a step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grid:
    """The numbers of a format as one array, so that precision is data in a compiled program.

    One array and not six: a model holds a grid per operand and layer, and every leaf costs the
    host time at each call of a compiled step.

    Attributes:
        numbers: float32, shape (6,), or (..., 6) to `vmap` over: the six properties in order.
    """

    numbers: Leaf

    @property
    def mantissa_bits(self) -> Int[Array, "*stack"]:
        """Mantissa bits kept by values of at least ``2**min_exponent``, int32."""
        return self.numbers[..., 0].astype(jnp.int32)

    @property
    def min_exponent(self) -> Int[Array, "*stack"]:
        """Exponent below which the step no longer shrinks, int32."""
        return self.numbers[..., 1].astype(jnp.int32)

    @property
    def min_magnitude(self) -> Float[Array, "*stack"]:
        """Smallest magnitude; 0 except for the binary grid, which has no zero."""
        return self.numbers[..., 2]

    @property
    def max_value(self) -> Float[Array, "*stack"]:
        """Largest value; infinity for "none"."""
        return self.numbers[..., 3]

    @property
    def min_value(self) -> Float[Array, "*stack"]:
        """Smallest value: ``-max_value``, but one step less for full-range integers, 0 unsigned."""
        return self.numbers[..., 4]

    @property
    def scaled(self) -> Bool[Array, "*stack"]:
        """Whether a quantizer maps the largest magnitude of a tensor to `max_value`."""
        return self.numbers[..., 5] != 0

    @property
    def largest_step(self) -> Float[Array, "*stack"]:
        """Distance between the two largest values."""
        step = power_of_two(exponent_of(self.max_value) - self.mantissa_bits)
        return jnp.where(self.min_magnitude > 0, 2 * self.min_magnitude, step)

    @property
    def wide(self) -> Bool[Array, "*stack"]:
        """Whether the range is float32's own: bf16, "none" and eight exponent bits."""
        return self.max_value > _WIDEST_SHIFTED

    def round(
        self, y: Float[Array, "..."], noise: UInt32[Array, "..."] | None
    ) -> Float[Array, "..."]:
        """See `round_to_grid`."""
        magnitude = _round_significand(_magnitude_bits(y), self, noise)
        by_bits = _as_float(magnitude | (jax.lax.bitcast_convert_type(y, jnp.int32) & _SIGN))
        use_bits = self.wide & (magnitude > 0) & (y == y)  # zero and NaN follow from the sum
        return jnp.where(use_bits, by_bits, _round_by_shifting(y, self, noise))

    def encode(
        self, y: Float[Array, "..."], noise: UInt32[Array, "..."] | None
    ) -> Int[Array, "..."]:
        """See `encode`: sign times the position of the magnitude."""
        bits = jax.lax.bitcast_convert_type(self.round(y, noise), jnp.int32)
        magnitude = bits & _MAGNITUDE
        lowest = (self.min_exponent + _BIAS) << _MANTISSA_BITS
        exponent = jnp.maximum(magnitude & _EXPONENT, lowest)
        to_integer = (self.mantissa_bits + 2 * _BIAS << _MANTISSA_BITS) - exponent
        significand = _as_float(magnitude) * _as_float(to_integer)
        binade = exponent - lowest >> _MANTISSA_BITS
        code = (binade << self.mantissa_bits) + significand.astype(jnp.int32)
        code = jnp.where(self.wide, magnitude >> _MANTISSA_BITS - self.mantissa_bits, code)
        return jnp.where(jnp.isnan(y), NAN_CODE, jnp.where(bits < 0, -code, code))

    def decode(self, codes: Int[Array, "..."]) -> Float[Array, "..."]:
        """See `decode`."""
        magnitude = jnp.abs(codes)
        binade = jnp.maximum((magnitude >> self.mantissa_bits) - 1, 0)
        significand = (magnitude - (binade << self.mantissa_bits)).astype(jnp.float32)
        # Two exact products: the power of the smallest step alone may lie below float32's range.
        value = significand * power_of_two(-self.mantissa_bits)
        value = value * power_of_two(self.min_exponent + binade)
        return jnp.where(codes == NAN_CODE, jnp.nan, jnp.where(codes < 0, -value, value))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codebook:
    """The values of a format that follow no rule, such as NF4; a code is a position.

    Attributes:
        levels: float32, (..., n), rising.
        thresholds: float32, (..., n - 1): the largest values that go to the lower neighbour.
    """

    levels: Leaf
    thresholds: Leaf

    @property
    def max_value(self) -> Float[Array, "*stack"]:
        """Largest value."""
        return self.levels[..., -1]

    @property
    def min_value(self) -> Float[Array, "*stack"]:
        """Smallest value."""
        return self.levels[..., 0]

    @property
    def scaled(self) -> Bool[Array, "*stack"]:
        """Codebooks are always scaled."""
        return jnp.ones_like(self.max_value, bool)

    @property
    def largest_step(self) -> Float[Array, "*stack"]:
        """Largest distance between neighbours."""
        return jnp.max(jnp.diff(self.levels, axis=-1), axis=-1)

    def round(
        self, y: Float[Array, "..."], noise: UInt32[Array, "..."] | None
    ) -> Float[Array, "..."]:
        """See `round_to_grid`."""
        value = jnp.full_like(y, self.levels[0])
        for above, level in zip(self._above(y, noise), self.levels[1:], strict=True):
            value = jnp.where(above, level, value)  # selects vectorize where a gather does not
        return jnp.where(jnp.isnan(y), y, value)

    def encode(
        self, y: Float[Array, "..."], noise: UInt32[Array, "..."] | None
    ) -> Int[Array, "..."]:
        """See `encode`: the position among the levels."""
        code = sum((above.astype(jnp.int32) for above in self._above(y, noise)), jnp.int32(0))
        return jnp.where(jnp.isnan(y), NAN_CODE, code)

    def decode(self, codes: Int[Array, "..."]) -> Float[Array, "..."]:
        """See `decode`."""
        value = self.levels[jnp.clip(codes, 0)]
        return jnp.where(codes == NAN_CODE, jnp.nan, value)

    def _above(self, y: Array, noise: Array | None) -> list[Array]:
        """Whether a value goes to each level but the lowest, or to one above it."""
        if noise is None:
            return [y > threshold for threshold in self.thresholds]
        fraction = _unit(noise)
        gaps = zip(self.levels[:-1], self.levels[1:], strict=True)
        return [y - low > fraction * (high - low) for low, high in gaps]


AnyGrid = Grid | Codebook


def round_to_grid(
    y: Float[Array, "..."], grid: AnyGrid, noise: UInt32[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """Rounds to the nearest value of the grid, ties to the even code, or stochastically.

    Values outside the grid's range, infinity included, become its nearest end; NaN stays NaN; a
    result of zero is +0.

    Args:
        y: float32, in units of the grid (already divided by its scale).
        grid: of one format, unstacked.
        noise: uniformly random bits of the shape of `y`, for stochastic rounding: values inside
            the grid's range keep their expectation.

    Returns:
        float32 of the shape of `y`.

    Raises:
        TypeError: `y` is not float32.
    """
    if y.dtype != jnp.float32:
        raise TypeError(f"round_to_grid takes float32, got {y.dtype}")
    return grid.round(y, noise)


def encode(
    y: Float[Array, "..."], grid: AnyGrid, noise: UInt32[Array, "..."] | None = None
) -> Int[Array, "..."]:
    """Integer codes of the rounded values; NaN becomes `NAN_CODE`.

    For integers the code is the integer itself; for floats the magnitude bits of the OCP or IEEE
    encoding with a sign in front; for a codebook the position of the level.

    Args:
        y: float32, in units of the grid.
        grid: as in `round_to_grid`.
        noise: as in `round_to_grid`.

    Returns:
        int32 of the shape of `y`.
    """
    return grid.encode(y, noise)


def decode(codes: Int[Array, "..."], grid: AnyGrid) -> Float[Array, "..."]:
    """Values of int32 codes, float32: the inverse of `encode` on rounded values."""
    return grid.decode(codes)


def exponent_of(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """floor(log2 |x|) of normal float32 values, from the bits; -127 below them."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return ((bits >> _MANTISSA_BITS) & 0xFF) - _BIAS


def power_of_two(exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """2**exponent, exactly, for exponents of normal float32 values."""
    bits = (exponent + _BIAS) << _MANTISSA_BITS
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _as_float(bits: Array) -> Array:
    value: Array = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return value


def _unit(noise: Array) -> Array:
    """Random bits as float32 in [0, 1)."""
    unit: Array = (noise >> (32 - _RANDOM_BITS)).astype(jnp.float32) * 2.0**-_RANDOM_BITS
    return unit


def _magnitude_bits(x: Array) -> Array:
    bits: Array = jax.lax.bitcast_convert_type(x, jnp.int32) & _MAGNITUDE
    return bits


def _round_by_shifting(y: Array, grid: Grid, noise: Array | None) -> Array:
    """Adds and subtracts a number so large that float32 itself rounds at the grid's step.

    The number is 1.5 · 2**23 steps, the step that of the value's own binade. The clip before the
    sum also keeps compilers from fusing it with the product that made `y`. By chance, a value goes
    on to the neighbour on its other side.
    """
    # A grid without zero has two values: what is left of any other is its sign.
    two_values = grid.min_magnitude > 0
    amplified = y * jnp.where(two_values, 2.0**127, 1) + grid.min_magnitude
    clipped = _clipped(amplified, grid)
    lowest = (grid.min_exponent + _BIAS) << _MANTISSA_BITS
    exponent = jnp.maximum(jax.lax.bitcast_convert_type(clipped, jnp.int32) & _EXPONENT, lowest)
    # Without mantissa bits codes are even in every other binade: one step more there.
    alternates = (grid.mantissa_bits == 0).astype(jnp.int32)
    odd = (exponent >> _MANTISSA_BITS) & alternates
    up = (_MANTISSA_BITS - grid.mantissa_bits << _MANTISSA_BITS) + (1 << _MANTISSA_BITS - 1)
    up = up + ((grid.min_exponent + _BIAS) & alternates)
    shift = _as_float(exponent + odd + up)
    q = (clipped + shift) - shift
    if noise is None:
        return q
    error = _clipped(y, grid) - q
    step = _as_float(exponent - (grid.mantissa_bits << _MANTISSA_BITS) & _MAGNITUDE)
    step = step * jnp.where(two_values, 2, 1).astype(jnp.float32)
    goes_on = _unit(noise) * step < jnp.abs(error)
    return jnp.where(goes_on, q + jnp.where(error < 0, -step, step), q)


def _clipped(y: Array, grid: Grid) -> Array:
    """Within the grid's range, NaN as it is; unlike minimum and maximum, one instruction each."""
    y = jnp.where(y > grid.max_value, grid.max_value, y)
    return jnp.where(y < grid.min_value, grid.min_value, y)


def _round_significand(magnitude: Array, grid: Grid, noise: Array | None) -> Array:
    """Rounds bits of positive float32, for grids that share its exponents and subnormals."""
    dropped = _MANTISSA_BITS - grid.mantissa_bits
    magnitude = jnp.minimum(magnitude, _magnitude_bits(grid.max_value))
    if noise is None:
        odd = (magnitude >> dropped) & (dropped > 0).astype(jnp.int32)
        magnitude = magnitude + odd + jnp.maximum((1 << dropped >> 1) - 1, 0)
    else:
        bits = (noise >> (32 - _RANDOM_BITS)).astype(jnp.int32)
        magnitude = magnitude + (bits >> _RANDOM_BITS - dropped)
    kept: Array = magnitude & -(1 << dropped)
    return kept
