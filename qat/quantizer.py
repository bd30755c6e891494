"""Scale, round, scale back: one quantizer for training and for storage, so they cannot drift.

`fake_quant` returns the quantized value in the input's own dtype with a straight-through
gradient (Bengio et al., arXiv 1308.3432); `quantize` stores integer codes and scales. Both take
their scales from `scales` and their rounding from `qat.formats`, and agree bit for bit.

The arithmetic is chosen so that no compiler can change it. Everything is float32, whatever the
input dtype. XLA turns a division by a broadcast value into a product with its reciprocal where it
likes, so we multiply by reciprocals ourselves. Scales are rounded to 20 significant bits: that
absorbs the last-bit errors of a round trip, so that the scale of an already quantized array is
the same number and quantization is idempotent bit for bit, while a largest magnitude still maps
to the format's largest value. Scales stay between 2^-126 and 2^126, where reciprocals are normal.
"""

import dataclasses
import difflib
import operator
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qat.formats import (
    NAN_CODE,
    ArrayOrShape,
    Format,
    Grid,
    decode,
    encode,
    parse_format,
    round_to_grid,
)

Granularity = Literal["tensor", "channel", "token"]
Axis = int | Sequence[int]

_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-126, 2.0**126
_DROPPED_BITS = 4  # of a scale's 24
_STORAGE = {8: jnp.int8, 16: jnp.int16, 32: jnp.int32}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How one operand is quantized.

    The format may be a host `Format` (static) or a `Grid` (traced); everything else is structure
    and decides which program is compiled. As a pytree, its leaves are the grid's numbers.

    Attributes:
        format: a `Format`, its name, or a `Grid`.
        granularity: "tensor", one scale for all; "channel" (of a weight) or "token" (of an
            activation or cache), one scale for each slice along the contraction axes.
    """

    format: Format | Grid
    granularity: Granularity = dataclasses.field(default="tensor", metadata={"static": True})

    def __init__(self, format: Format | Grid | str, granularity: Granularity = "tensor"):
        """Checks and stores; a format name is parsed."""
        if granularity not in get_args(Granularity):
            nearest = difflib.get_close_matches(str(granularity), get_args(Granularity), 1, 0.0)[0]
            raise ValueError(
                f"unknown granularity {granularity!r}: expected one of "
                f"{', '.join(get_args(Granularity))}; nearest is {nearest!r}"
            )
        object.__setattr__(
            self, "format", parse_format(format) if isinstance(format, str) else format
        )
        object.__setattr__(self, "granularity", granularity)

    @classmethod
    def parse(cls, text: str) -> "Quantizer":
        """Reads "FORMAT" or "FORMAT/GRANULARITY", such as "int4/channel".

        Raises:
            ValueError: unknown format or granularity, with the nearest valid spelling.
        """
        name, _, granularity = text.partition("/")
        return cls(parse_format(name), granularity or "tensor")  # type: ignore[arg-type]

    @property
    def grid(self) -> Grid:
        """The format's numbers as arrays."""
        return self.format.grid() if isinstance(self.format, Format) else self.format

    def traced(self) -> "Quantizer":
        """The same quantizer with its format as data: what a model's state holds."""
        return dataclasses.replace(self, format=self.grid)

    @property
    def bits(self) -> float:
        """Bits per element as laws and result rows count them: 16 means unquantized."""
        fmt = self.host_format()
        return fmt.bits if fmt.quantizes else 16.0

    def host_format(self) -> Format:
        """The format, where it is known on the host.

        Raises:
            ValueError: the format is a traced `Grid`, which has numbers but no name.
        """
        if not isinstance(self.format, Format):
            raise ValueError("this needs a named Format, got a traced Grid")
        return self.format

    def __str__(self) -> str:
        """The spelling that `parse` reads."""
        return f"{self.host_format()}/{self.granularity}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized array: integer codes and float32 scales.

    Attributes:
        codes: int8 up to 8 bits, else int16 (int32 for "none"); the shape of the array.
        scale: float32, broadcasts against `codes`.
        format: of the codes.
        dtype: name of the dtype of the array that was quantized.
    """

    codes: Int[ArrayOrShape, "..."]
    scale: Float[ArrayOrShape, "..."]
    format: Format = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes held in memory by codes and scales."""
        return int(self.codes.nbytes + self.scale.nbytes)

    def dequantize(self) -> Float[Array, "..."]:
        """The array in its original dtype; equal to `fake_quant` of it bit for bit."""
        lowest = jnp.iinfo(self.codes.dtype).min
        codes = self.codes.astype(jnp.int32)
        codes = jnp.where(codes == lowest, NAN_CODE, codes)
        return (decode(codes, self.format.grid()) * self.scale).astype(self.dtype)


def scales(x: Float[Array, "..."], quantizer: Quantizer, axis: Axis) -> Float[Array, "..."]:
    """Scales of `x`: what it is divided by before rounding. No gradient flows through them.

    A NaN, or an infinity under a scaled format, makes its whole group NaN: nothing that went
    wrong is rounded to a harmless number.

    Args:
        x: floating-point array.
        quantizer: its granularity decides which axes share a scale.
        axis: contraction axis or axes of `x`.

    Returns:
        float32 of the shape of `x` with 1 in every axis that shares a scale.

    Raises:
        ValueError: `axis` is not an axis of `x`; `x` is not floating point.
    """
    axes = _normalized_axes(x, axis)
    shared = None if quantizer.granularity == "tensor" else axes
    grid = quantizer.grid
    x = jax.lax.stop_gradient(x)
    amax = jnp.max(jnp.abs(x), axis=shared, keepdims=True, initial=0).astype(jnp.float32)
    scale = _rounded(amax * (1 / grid.max_value))
    scale = jnp.clip(scale, _SMALLEST_SCALE, _LARGEST_SCALE)
    scale = jnp.where(jnp.isfinite(amax), scale, jnp.nan)
    return jnp.where(grid.scaled, scale, jnp.ones_like(scale))


def fake_quant(x: Float[Array, "..."], quantizer: Quantizer, axis: Axis) -> Float[Array, "..."]:
    """Quantizes and dequantizes; the gradient passes straight through.

    Args:
        x: floating-point array.
        quantizer: format (host or traced) and granularity.
        axis: contraction axis or axes of `x`.

    Returns:
        Array of the shape and dtype of `x`. Within a millionth of float32's largest value, where
        the rounded scale times the format's largest value overflows, the result is infinite.

    Raises:
        ValueError: as in `scales`.
    """
    scale = scales(x, quantizer, axis)
    y = jax.lax.stop_gradient(x).astype(jnp.float32) * (1 / scale)
    return _straight_through(x, (round_to_grid(y, quantizer.grid) * scale).astype(x.dtype))


def quantize(x: Float[Array, "..."], quantizer: Quantizer, axis: Axis) -> QTensor:
    """Quantizes to stored codes and scales.

    Args:
        x: floating-point array.
        quantizer: needs a named format.
        axis: contraction axis or axes of `x`.

    Raises:
        ValueError: as in `scales`; the format is a traced `Grid`.
    """
    fmt = quantizer.host_format()
    scale = scales(x, quantizer, axis)
    storage = _STORAGE[8 if fmt.bits <= 8 else 16 if fmt.bits <= 16 else 32]
    codes = encode(x.astype(jnp.float32) * (1 / scale), fmt.grid())
    codes = jnp.maximum(codes, jnp.iinfo(storage).min).astype(storage)
    return QTensor(codes, scale, fmt, str(x.dtype))


def _rounded(scale: Array) -> Array:
    """Positive float32 to 20 significant bits, nearest, ties to even."""
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    odd = (bits >> _DROPPED_BITS) & 1
    bits = (bits + (1 << _DROPPED_BITS - 1) - 1 + odd) >> _DROPPED_BITS << _DROPPED_BITS
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@jax.custom_jvp
def _straight_through(x: Array, quantized: Array) -> Array:
    """`quantized`, with the derivative of `x`."""
    return quantized


@_straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return primals[1], tangents[0]


def _normalized_axes(x: Array, axis: Axis) -> tuple[int, ...]:
    """Non-negative axes, checked against the rank of `x`."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"only floating-point arrays can be quantized, got dtype {x.dtype}")
    axes = tuple(axis) if isinstance(axis, Sequence) else (operator.index(axis),)
    for a in axes:
        if not -x.ndim <= a < x.ndim:
            raise ValueError(
                f"axis {a} is not an axis of an array of shape {x.shape}: "
                f"expected {-x.ndim} to {x.ndim - 1}"
            )
    return tuple(a % x.ndim for a in axes)
