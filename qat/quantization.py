"""Scale, round, scale back: the same for training and for storage.

`fake_quant` returns the quantized value in the input's own dtype with a straight-through
gradient (Bengio et al., arXiv 1308.3432); `quantize` stores integer codes and scales. Both take
their scales from `qat.scales` and their rounding from `qat.grid`, and agree bit for bit.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.formats import Format
from qat.grid import NAN_CODE, Leaf, decode, encode
from qat.groups import Axis, Groups, Tile, as_tuple, groups_of
from qat.noise import fold, random_bits, words_of
from qat.quantizer import Quantizer, ScaleFormat
from qat.scales import Scale, rounded, scale_for, shifted

if TYPE_CHECKING:
    from qat.storage import PackedTensor

_ROUNDED_OFF = 2.0**-19
_STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized array: integer codes and their scales.

    Attributes:
        codes: of the shape of the array; the smallest of int8, int16, int32 (unsigned formats and
            codebooks: uint8, uint16) that holds them.
        scale: one or two levels and an optional zero point; see `Scale`.
        format: of the codes.
        tile: neighbours along each trailing axis that share a scale; leading axes are a stack.
        scale_format: of the scales; None is float32.
        dtype: name of the dtype of the array that was quantized.
    """

    codes: Leaf
    scale: Scale
    format: Format = dataclasses.field(metadata=_STATIC)
    tile: Tile = dataclasses.field(metadata=_STATIC)
    scale_format: ScaleFormat | None = dataclasses.field(metadata=_STATIC)
    dtype: str = dataclasses.field(metadata=_STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes held in memory by codes and scales; `pack` takes fewer."""
        return int(sum(leaf.nbytes for leaf in jax.tree.leaves(self)))

    def __repr__(self) -> str:
        """Format and shapes, without the numbers."""
        shape = getattr(self.codes, "shape", None)
        scales = getattr(getattr(self.scale, "scale", None), "shape", None)
        return f"QTensor({self.format}, shape={shape}, scales={scales}, dtype={self.dtype})"

    def pack(self) -> "PackedTensor":
        """The same array at the true width of its codes and scales."""
        from qat.storage import pack

        return pack(self)

    def dequantize(self) -> Float[Array, "..."]:
        """The array in its original dtype; equal to `fake_quant` of it bit for bit.

        Raises:
            ValueError: the axes of a stack do not lead, as after `jax.vmap` with other `out_axes`.
        """
        stack = (1,) * (self.codes.ndim - len(self.tile))
        groups = Groups(self.codes.shape, stack + self.tile)
        if groups.compact_shape != self.scale.scale.shape:
            raise ValueError(
                f"codes of shape {self.codes.shape} with scales of shape {self.scale.scale.shape} "
                f"for tiles {self.tile}: expected {groups.compact_shape}; a stack's axes come first"
            )
        codes = self.codes.astype(jnp.int32)
        if not self.format.scaled:  # under a scale, the scale says what is not a number
            codes = jnp.where(codes == jnp.iinfo(self.codes.dtype).min, NAN_CODE, codes)
        values = groups.split(decode(codes, self.format.grid()))
        scale = _beside(self.scale, groups)
        if scale.zero_point is not None:
            values = values - scale.zero_point
        return (values * scale.applied).astype(self.dtype).reshape(self.shape)


def fake_quant(
    x: Float[Array, "..."], quantizer: Quantizer | str, axis: Axis, key: Array | None = None
) -> Float[Array, "..."]:
    """Quantizes and dequantizes; the gradient passes straight through, as `quantizer` says.

    Args:
        x: floating-point array.
        quantizer: with a named or a traced format, or its spelling.
        axis: contraction axis or axes of `x`.
        key: JAX random key, for stochastic rounding.

    Returns:
        Array of the shape and dtype of `x`. Within a millionth of float32's largest value, where
        the rounded scale times the format's largest value overflows, the result is infinite. A
        scale is at most 2**126, so formats whose largest value is below 4 (nf4, ternary, binary,
        int2) saturate at 8.5e37 times that; and at least 2**-126, as float32 below 1.2e-38 is
        zero to most hardware.

    Raises:
        ValueError: not a quantizer; `x` is not floating point, or float64; `axis` is not an axis of
            it; a block size does not divide its axis; no key for stochastic rounding, or several;
            no value for a fixed scale.
    """
    quantized: Array = _fake_quant(_as_array(x), Quantizer.of(quantizer), as_tuple(axis), key)
    return quantized


def quantize(
    x: Float[Array, "..."], quantizer: Quantizer | str, axis: Axis, key: Array | None = None
) -> QTensor:
    """Quantizes to stored codes and scales.

    Codes have no room for NaN: it makes its whole group NaN, under a fixed or learned scale too,
    where `fake_quant` keeps it to itself. Formats without a scale lose float32's subnormals on
    hardware that has none, where `fake_quant` may keep them.

    Args:
        x: floating-point array.
        quantizer: with a named format, or its spelling.
        axis: contraction axis or axes of `x`.
        key: JAX random key, for stochastic rounding.

    Raises:
        ValueError: as `fake_quant`; the format is traced.
    """
    quantizer = Quantizer.of(quantizer)
    quantizer.host_format()
    stored: QTensor = _quantize(_as_array(x), quantizer, as_tuple(axis), key)
    return stored


def key_for(quantizer: Quantizer, key: Array | None, place: int) -> Array | None:
    """The key of one of several places that share `key`, so that each has noise of its own."""
    if key is None or quantizer.rounding == "nearest":
        return key
    return fold(words_of(key), jnp.uint32(place))


def code_values(
    x: Float[Array, "..."], quantizer: Quantizer, axis: Axis, key: Array | None = None
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """What `fake_quant` multiplies: float32 values of the grid, and compact scales.

    Args:
        x: floating-point array.
        quantizer: without a zero point.
        axis: contraction axis or axes of `x`.
        key: JAX random key, for stochastic rounding.
    """
    groups = groups_of(x, quantizer, axis)
    scale = scale_for(x, quantizer, axis)
    noise = _noise(quantizer, groups, key)
    split = groups.split(x.astype(jnp.float32))
    _, q = rounded(split, _beside(scale, groups), quantizer.grid, noise)
    return q.reshape(x.shape), scale.applied


# Compiled as one, so that it is traced once for all layers of a shape, then inlined.
@functools.partial(jax.jit, static_argnums=2, inline=True)
def _fake_quant(x: Array, quantizer: Quantizer, axes: tuple[int, ...], key: Array | None) -> Array:
    groups = groups_of(x, quantizer, axes)
    scale = _beside(scale_for(x, quantizer, axes), groups)
    noise = _noise(quantizer, groups, key)
    if quantizer.scale == "learned":
        return _learned(x, scale.scale, quantizer, groups, noise)
    split = groups.split(jax.lax.stop_gradient(x).astype(jnp.float32))
    y, q = rounded(split, scale, quantizer.grid, noise)
    quantized = (q * scale.applied).astype(x.dtype).reshape(x.shape)
    if quantizer.gradient == "identity":
        return _straight_through(x, quantized)
    return _partly_through(x, quantized, _passes(y, q, scale, quantizer).reshape(x.shape))


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _quantize(x: Array, quantizer: Quantizer, axes: tuple[int, ...], key: Array | None) -> QTensor:
    fmt, grid = quantizer.host_format(), quantizer.grid
    groups = groups_of(x, quantizer, axes)
    compact = scale_for(x, quantizer, axes)
    scale = _beside(compact, groups)
    y = groups.split(x.astype(jnp.float32)) * (1 / scale.applied)
    noise = _noise(quantizer, groups, key)
    codes = encode(shifted(y, scale, grid, noise), grid, noise)
    lost = codes == NAN_CODE
    if fmt.scaled:  # the scale says what is not a number, and any code will do
        any_lost = jnp.any(lost, axis=groups.reduced).reshape(groups.compact_shape)
        compact = dataclasses.replace(compact, scale=jnp.where(any_lost, jnp.nan, compact.scale))
    storage = code_dtype(fmt)
    not_a_number = int(fmt.min_magnitude) if fmt.scaled else jnp.iinfo(storage).min
    codes = jnp.where(lost, not_a_number, codes).astype(storage).reshape(x.shape)
    return QTensor(codes, compact, fmt, groups.tile, quantizer.scale_format, str(x.dtype))


def _as_array(x: Any) -> Array:
    """A JAX array of the array or list that a caller gave."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _beside(scale: Scale, groups: Groups) -> Scale:
    """Compact scales in the shapes that broadcast against a split array."""
    kept, levels, zero_point = groups.kept_shape, scale.tensor_scale, scale.zero_point
    return Scale(
        scale.scale.reshape(kept),
        None if levels is None else levels.reshape(levels.shape + (1,) * (len(kept) - levels.ndim)),
        None if zero_point is None else zero_point.reshape(kept),
    )


def _noise(quantizer: Quantizer, groups: Groups, key: Array | None) -> Array | None:
    """Random bits for a split array, where the quantizer rounds by them."""
    if quantizer.rounding == "nearest":
        return None
    if key is None:
        raise ValueError(
            "stochastic rounding needs a key: fake_quant(…, key=key), dot_general(policy, key), "
            "qat.nnx.set_key(model, key), or a 'noise' rng for a layer of qat.linen"
        )
    return random_bits(key, groups.split_shape)


def _passes(y: Array, q: Array, scale: Scale, quantizer: Quantizer) -> Array:
    """Where the straight-through gradient passes: inside the range, or near what it became."""
    grid = quantizer.grid
    if quantizer.gradient == "trust":
        return jnp.abs(q - y) <= grid.largest_step / 2
    if scale.zero_point is not None:  # the range ends where integers saturate
        code = jnp.round(y) + scale.zero_point
    else:
        code = y * (1 - _ROUNDED_OFF)  # a scale may be rounded below its ideal
    return (code >= grid.min_value) & (code <= grid.max_value)


def _learned(
    x: Array, scale: Array, quantizer: Quantizer, groups: Groups, noise: Array | None
) -> Array:
    """Learned step size quantization: its gradients follow from plain differentiation.

    The scale's gradient is divided by sqrt(elements that share it · largest value).
    """
    grid = quantizer.grid
    sharing = math.prod(groups.shape) / max(1, math.prod(groups.compact_shape))
    step = _with_gradient_times(scale, jax.lax.rsqrt(sharing * grid.max_value))
    y = groups.split(x.astype(jnp.float32)) * (1 / step)
    inside = jnp.clip(y, grid.min_value, grid.max_value)
    _, q = rounded(jax.lax.stop_gradient(y), Scale(jnp.ones_like(scale)), grid, noise)
    return (_straight_through(inside, q) * step).astype(x.dtype).reshape(x.shape)


def code_dtype(fmt: Format) -> Any:
    """The smallest integer dtype that holds a format's codes."""
    if fmt.levels is not None or fmt.lowest == 0:
        return jnp.uint8 if fmt.bits <= 8 else jnp.uint16
    return jnp.int8 if fmt.bits <= 8 else jnp.int16 if fmt.bits <= 16 else jnp.int32


@jax.custom_jvp
def _straight_through(x: Array, quantized: Array) -> Array:
    """`quantized`, with the derivative of `x`."""
    return quantized


@_straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _straight_through(*primals), tangents[0]


@jax.custom_jvp
def _partly_through(x: Array, quantized: Array, passes: Array) -> Array:
    """`quantized`, with the derivative of `x` where `passes`; nothing but that mask is kept."""
    return quantized


@_partly_through.defjvp
def _partly_through_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    passes, tangent = primals[2], tangents[0]
    # Zeros of its own would be kept for the backward pass; and NaN stays NaN this way.
    return _partly_through(*primals), jnp.where(passes, tangent, 0 * tangent)


@jax.custom_jvp
def _with_gradient_times(x: Array, factor: Array) -> Array:
    """`x`, with `factor` times its derivative."""
    return x


@_with_gradient_times.defjvp
def _with_gradient_times_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _with_gradient_times(*primals), tangents[0] * primals[1]
