"""Where a quantizer's scale comes from: the ranges of groups, and the scales' own formats.

The arithmetic is chosen so that no compiler can change it. Everything is float32, whatever the
input dtype. XLA turns a division by a broadcast value into a product with its reciprocal where it
likes, so we multiply by reciprocals ourselves. Float32 scales are rounded to 20 significant bits:
that absorbs the last-bit errors of a round trip, so that the absmax scale of an already quantized
array is the same number and quantization is idempotent bit for bit, while a largest magnitude
still maps to the format's largest value. In bfloat16 and float16 that holds for symmetric formats
only: where the ends of a range are rounded to 8 or 11 bits, so is the range. Scales stay between
2^-126 and 2^126, where reciprocals are normal.

Under stochastic rounding scales are rounded up, so that no value saturates and the expectation is
kept. OCP's rule for e8m0 (floor) would saturate values above the format's largest, as MX does
when it rounds to nearest. The block scales of NVFP4 stay within the *normal* values of e4m3: below
them their relative error would exceed what a second pass can undo.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.formats import gaussian_clip, parse_format
from qat.grid import AnyGrid, Leaf, exponent_of, power_of_two, round_to_grid
from qat.groups import Axis, Groups, groups_of
from qat.quantizer import Quantizer

_SMALLEST_EXPONENT, _LARGEST_EXPONENT = -126, 126
_SMALLEST, _LARGEST = 2.0**_SMALLEST_EXPONENT, 2.0**_LARGEST_EXPONENT
_DROPPED_BITS = 4  # of a scale's 24
_BLOCK_SCALE = parse_format("e4m3")
_SMALLEST_TENSOR_SCALE = 2.0**-120  # times the smallest block scale it is still normal
_BEYOND_INTEGERS = 2.0**20
_SHRINKS, _MOST_SHRUNK = 100, 0.8  # of the search for the least squared error, as GPTQ's


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scale:
    """Scales of an array's groups, compact.

    Attributes:
        scale: float32, one number a group; in e4m3's units where there is a tensor scale.
        tensor_scale: float32 with as many axes, all of length 1; None for one-level scales.
        zero_point: float32 integers of the shape of `scale`; None without a zero point.
    """

    scale: Leaf
    tensor_scale: Leaf | None = None
    zero_point: Leaf | None = None

    @property
    def applied(self) -> Float[Array, "..."]:
        """What values are divided by: the product of the levels, which is exact."""
        return self.scale if self.tensor_scale is None else self.scale * self.tensor_scale


def scale_for(x: Float[Array, "..."], quantizer: Quantizer, axis: Axis) -> Scale:
    """Scales of `x`; no gradient flows through them.

    A NaN, or an infinity under a scaled format, makes its whole group NaN: nothing that went
    wrong is rounded to a harmless number. A fixed or learned scale knows nothing of `x`: there
    infinity saturates and NaN stays by itself.

    Args:
        x: floating-point array.
        quantizer: any but one with a learned scale.
        axis: contraction axis or axes of `x`.

    Raises:
        ValueError: as `groups_of`; or a fixed scale without its value.
    """
    groups = groups_of(x, quantizer, axis)
    split = groups.split(jax.lax.stop_gradient(x).astype(jnp.float32))
    scale = (_asymmetric if quantizer.zero_point else _symmetric)(split, groups, quantizer)
    compact, levels = groups.compact_shape, scale.tensor_scale
    return Scale(
        scale.scale.reshape(compact),
        None if levels is None else levels.reshape([1] * x.ndim),
        None if scale.zero_point is None else scale.zero_point.reshape(compact),
    )


def formatted(
    largest: Float[Array, "..."], quantizer: Quantizer, tensor_scale: Array | None = None
) -> Scale:
    """The scale that maps `largest` to the grid's largest value, in the scale's format.

    Args:
        largest: float32, not negative, one number a group in any shape.
        quantizer: without a zero point.
        tensor_scale: to be kept, where scales have two levels; None takes the one that maps the
            largest block scale to e4m3's largest value.
    """
    grid, up = quantizer.grid, quantizer.rounding == "stochastic"
    if quantizer.scale_format == "e8m0":
        exponent = exponent_of(largest) - exponent_of(grid.max_value)
        if up:
            larger = _significand(largest) > _significand(grid.max_value)
            exponent = exponent + larger.astype(jnp.int32)
        return Scale(power_of_two(jnp.clip(exponent, _SMALLEST_EXPONENT, _LARGEST_EXPONENT)))
    ideal = largest * (1 / grid.max_value)
    if quantizer.scale_format is None:
        return Scale(_short(ideal, up))
    if tensor_scale is None:
        top = jnp.float32(1 / _BLOCK_SCALE.max_value)
        tensor_scale = _short(jnp.max(ideal, keepdims=True, initial=0) * top, up)
        tensor_scale = jnp.maximum(tensor_scale, _SMALLEST_TENSOR_SCALE)
    ideal = ideal * (1 / tensor_scale)
    block_scale = round_to_grid(ideal, _BLOCK_SCALE.grid())
    if up:  # the smallest noise takes every value to the neighbour that is not the nearest
        other = round_to_grid(ideal, _BLOCK_SCALE.grid(), jnp.zeros(ideal.shape, jnp.uint32))
        block_scale = jnp.maximum(block_scale, other)
    block_scale = jnp.maximum(block_scale, 2.0**_BLOCK_SCALE.min_exponent)
    return Scale(block_scale, tensor_scale)


def _symmetric(x: Array, groups: Groups, quantizer: Quantizer) -> Scale:
    """Scales without a zero point, from a split array; shapes as `Groups.kept_shape`."""
    grid = quantizer.grid
    if quantizer.scale in ("fixed", "learned"):
        given = _given(quantizer.value, groups, quantizer)
        scale = Scale(given) if quantizer.scale == "learned" else formatted(given, quantizer)
        scaled = jnp.where(jnp.isfinite(given), scale.scale, jnp.nan)
        return dataclasses.replace(scale, scale=jnp.where(grid.scaled, scaled, 1))
    amax = _largest_magnitude(x, grid, groups)
    if quantizer.scale == "absmean":
        largest = jnp.mean(jnp.abs(x), axis=groups.reduced, keepdims=True) * grid.max_value
    elif quantizer.scale == "percentile" and x.size:
        magnitudes = _magnitudes(x, grid)
        largest = jnp.percentile(magnitudes, quantizer.percentile, groups.reduced, keepdims=True)
    elif quantizer.scale == "gaussian":
        largest = _gaussian_clip(quantizer) * _root_mean_square(x, amax, groups)
    elif quantizer.scale == "mse":
        largest = amax * _best_shrink(
            x, amax, groups, grid, lambda shrink: formatted(amax * shrink, quantizer)
        )
    else:
        largest = amax
    finite = jnp.isfinite(amax)
    scale = formatted(jnp.where(finite, largest, 0), quantizer)
    applied = jnp.where(grid.scaled, jnp.where(finite, scale.scale, jnp.nan), 1)
    levels = scale.tensor_scale
    return Scale(applied, levels if levels is None else jnp.where(grid.scaled, levels, 1))


def _asymmetric(x: Array, groups: Groups, quantizer: Quantizer) -> Scale:
    """Scales and zero points from the smallest and largest values, and zero."""
    if quantizer.scale == "fixed":
        low, high = (_given(end, groups, quantizer) for end in quantizer.value or (None, None))
        scale = _shifted(low, high, quantizer)
        finite = jnp.isfinite(low) & jnp.isfinite(high) | ~quantizer.grid.scaled
        return dataclasses.replace(scale, scale=jnp.where(finite, scale.scale, jnp.nan))
    low, high = _ends(x, groups)
    finite = jnp.isfinite(low) & jnp.isfinite(high)
    if quantizer.scale == "percentile" and x.size:
        low, high = _percentiles(x, low, high, groups, quantizer)
    elif quantizer.scale == "mse":
        whole = (low, high)
        shrink = _best_shrink(
            x,
            high - low,
            groups,
            quantizer.grid,
            lambda shrink: _shifted(whole[0] * shrink, whole[1] * shrink, quantizer),
        )
        low, high = low * shrink, high * shrink
    scale = _shifted(jnp.where(finite, low, 0), jnp.where(finite, high, 0), quantizer)
    poisoned = jnp.where(finite | ~quantizer.grid.scaled, scale.scale, jnp.nan)
    return Scale(poisoned, None, scale.zero_point)


def rounded(
    x: Array, scale: Scale, grid: AnyGrid, noise: Array | None = None
) -> tuple[Array, Array]:
    """(value, rounded value) in units of the grid, without the zero point, of a split array.

    `x` is float32 and `scale` broadcasts against it.
    """
    y = x * (1 / scale.applied)
    q = round_to_grid(shifted(y, scale, grid, noise), grid, noise)
    return y, q if scale.zero_point is None else q - scale.zero_point


def shifted(y: Array, scale: Scale, grid: AnyGrid, noise: Array | None) -> Array:
    """`y` plus the zero point, where there is one: added to the nearest integer, as ONNX does.

    By chance, an integer cannot be chosen before the sum. Compilers fuse a product and a sum into
    one operation that rounds once, or do not; a clip between them, far outside every integer,
    makes results equal everywhere.
    """
    if scale.zero_point is None:
        return y
    if noise is not None:
        return jnp.clip(y, -_BEYOND_INTEGERS, _BEYOND_INTEGERS) + scale.zero_point
    return jnp.where(grid.scaled, jnp.round(y), y) + scale.zero_point


def _shifted(low: Array, high: Array, quantizer: Quantizer) -> Scale:
    """Scale and zero point that map low … high, and 0, to all codes.

    Where both ends lie half-way between integers, rounding would lose a code and a second pass
    would shrink the range: then the next smaller scale is taken.
    """
    grid = quantizer.grid
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    steps = grid.max_value - grid.min_value
    scale = _short((high - low) * (1 / steps), False)
    if quantizer.rounding == "stochastic":
        scale, below = _unsaturated(low, high, steps, scale)
    else:
        reached = jnp.round(high * (1 / scale)) - jnp.round(low * (1 / scale))
        scale = jnp.where(reached < steps, _next_shorter(scale), scale)
        below = -jnp.round(low * (1 / scale))
    zero_point = jnp.clip(grid.min_value + below, grid.min_value, grid.max_value)
    return Scale(jnp.where(grid.scaled, scale, 1), None, jnp.where(grid.scaled, zero_point, 0))


def _unsaturated(low: Array, high: Array, steps: Array, scale: Array) -> tuple[Array, Array]:
    """The smallest scale by which neither end saturates by chance, and how many codes lie below 0.

    At `scale` the codes would be shared out in proportion to both sides, but not in whole numbers:
    either side takes the fraction.
    """
    least, most = (low < 0).astype(jnp.float32), steps - (high > 0).astype(jnp.float32)

    def step(length: Array, codes: Array) -> Array:
        return jnp.where(codes > 0, length * (1 / jnp.maximum(codes, 1)), 0)

    def rounded_by(whole: Callable[[Array], Array]) -> tuple[Array, Array]:
        below = jnp.clip(whole(-low * (1 / scale)), least, most)
        return _short(jnp.maximum(step(-low, below), step(high, steps - below)), True), below

    (fewer_scale, fewer), (more_scale, more) = rounded_by(jnp.floor), rounded_by(jnp.ceil)
    better = fewer_scale < more_scale
    return jnp.where(better, fewer_scale, more_scale), jnp.where(better, fewer, more)


def _next_shorter(scale: Array) -> Array:
    """The next smaller float32 of 20 significant bits, within the range of scales."""
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32) - (1 << _DROPPED_BITS)
    return jnp.maximum(jax.lax.bitcast_convert_type(bits, jnp.float32), _SMALLEST)


def _short(scale: Array, up: bool) -> Array:
    """Positive float32 to 20 significant bits, nearest even or up, within the range of scales."""
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    odd = (bits >> _DROPPED_BITS) & 1
    carry = (1 << _DROPPED_BITS) - 1 if up else (1 << _DROPPED_BITS - 1) - 1 + odd
    bits = (bits + carry) >> _DROPPED_BITS << _DROPPED_BITS
    return jnp.clip(jax.lax.bitcast_convert_type(bits, jnp.float32), _SMALLEST, _LARGEST)


def _significand(x: Array) -> Array:
    """Bits below the exponent, which order as the significands do."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFF


def _largest_magnitude(x: Array, grid: AnyGrid, groups: Groups) -> Array:
    """Of each group, negative ones in proportion to the grid's ends; infinite where one is NaN."""
    magnitudes = _or_infinite(_magnitudes(x, grid))
    return jnp.max(magnitudes, axis=groups.reduced, keepdims=True, initial=0)


def _ends(x: Array, groups: Groups) -> tuple[Array, Array]:
    """Smallest and largest value of each group, and zero; infinite where one is NaN."""
    x = _or_infinite(x)
    low = jnp.min(x, axis=groups.reduced, keepdims=True, initial=0)
    return low, jnp.max(x, axis=groups.reduced, keepdims=True, initial=0)


def _or_infinite(x: Array) -> Array:
    """`x` with infinity for NaN, which XLA's reductions on CPU drop in some shapes."""
    return jnp.where(x < jnp.inf, x, jnp.inf)


def _magnitudes(x: Array, grid: AnyGrid) -> Array:
    """|x|, negative ones in proportion to the grid's ends."""
    return jnp.abs(x) * jnp.where(x < 0, _negative_weight(grid), 1)


def _negative_weight(grid: AnyGrid) -> Array:
    """What a negative magnitude counts for: 1 unless the grid's ends differ, 0 if unsigned."""
    high, low = grid.max_value, grid.min_value
    return jnp.where(low == -high, 1, jnp.where(low < 0, high / -low, 0))


def _root_mean_square(x: Array, amax: Array, groups: Groups) -> Array:
    """Of each group, without overflow."""
    amax = jnp.clip(amax, _SMALLEST, _LARGEST)
    unit = jnp.square(x * (1 / amax))
    return amax * jnp.sqrt(jnp.mean(unit, axis=groups.reduced, keepdims=True))


def _gaussian_clip(quantizer: Quantizer) -> Array:
    if quantizer.value is None:
        return jnp.asarray(gaussian_clip(quantizer.host_format()), jnp.float32)
    return jnp.asarray(quantizer.value, jnp.float32)


def _percentiles(
    x: Array, low: Array, high: Array, groups: Groups, quantizer: Quantizer
) -> tuple[Array, Array]:
    """The percentile from either end, on the same side of zero."""
    tail = 100 - quantizer.percentile
    ends = jnp.percentile(x, jnp.asarray([tail, 100 - tail]), groups.reduced, keepdims=True)
    return jnp.clip(ends[0], low, 0), jnp.clip(ends[1], 0, high)


def _best_shrink(
    x: Array, size: Array, groups: Groups, grid: AnyGrid, scale_at: Callable[[Array], Scale]
) -> Array:
    """The factor, of 100, by which a range shrinks for the least squared error, for each group."""
    unit = 1 / jnp.clip(size, _SMALLEST, _LARGEST)

    def better(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        shrink = 1 - i.astype(jnp.float32) * (_MOST_SHRUNK / _SHRINKS)
        scale = scale_at(shrink)
        error = rounded(x, scale, grid)[1] * scale.applied - x
        total = jnp.sum(jnp.square(error * unit), axis=groups.reduced, keepdims=True)
        return jnp.where(total < best[0], total, best[0]), jnp.where(
            total < best[0], shrink, best[1]
        )

    start = jnp.full_like(size, jnp.inf), jnp.ones_like(size)
    _, shrink = jax.lax.fori_loop(0, _SHRINKS, better, start)
    return jnp.asarray(shrink)


def _given(value: Any, groups: Groups, quantizer: Quantizer) -> Array:
    """A scale or range that comes with the quantizer, beside a split array."""
    if value is None:
        raise ValueError(
            f"a {quantizer.scale} scale needs its value: Quantizer(…, scale={quantizer.scale!r}, "
            f"value=…), or a layer of qat.nnx or qat.linen, which holds it"
        )
    value = jnp.asarray(value, jnp.float32)
    assert isinstance(value, jax.Array)
    if value.ndim == 0:
        return jnp.full(groups.kept_shape, value)
    if value.shape != groups.compact_shape:
        raise ValueError(
            f"value of shape {value.shape}: expected a scalar or {groups.compact_shape}"
        )
    return value.reshape(groups.kept_shape)
