"""Quantized arrays with as many bits a code as the format has.

A `QTensor` holds a code in the smallest integer dtype, which is fast to use; a `PackedTensor`
holds it in its format's bits (`qat.packing`): 3 for int3, 1.6 for ternary. Scales of e8m0 and
e4m3 take one byte, and a zero point as many bits as a code where all zero points are codes.
Unpacking gives back every bit.

Packed codes are one flat string of bytes, since a row of an odd width need not end with a byte; a
packed stack of layers is therefore unpacked before it is scanned over.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qat.formats import Format
from qat.grid import Leaf, exponent_of, power_of_two
from qat.groups import Tile
from qat.packing import Layout, pack_codes, unpack_codes
from qat.quantization import QTensor
from qat.quantizer import ScaleFormat
from qat.scales import Scale

_STATIC: dict[str, Any] = {"static": True}
_BIAS = 127  # of e8m0's exponents


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A quantized array at its true size.

    Attributes:
        codes: uint8, flat; see `qat.packing` for the bits.
        scale: compact, as in `Scale`; uint8 where `scale_format` is e8m0 (biased exponents) or
            e4m3 (its bits), else float32.
        tensor_scale: float32, as in `Scale`.
        zero_point: uint8, packed like codes; float32 of the shape of `scale` where one of them is
            no code of the format, or was not known because packing was compiled.
        format: of the codes.
        tile: as in `QTensor`.
        scale_format: as in `QTensor`.
        dtype: as in `QTensor`.
        shape: of the array.
        code_dtype: name of the dtype of unpacked codes.
    """

    codes: Leaf
    scale: Leaf
    tensor_scale: Leaf | None
    zero_point: Leaf | None
    format: Format = dataclasses.field(metadata=_STATIC)
    tile: Tile = dataclasses.field(metadata=_STATIC)
    scale_format: ScaleFormat | None = dataclasses.field(metadata=_STATIC)
    dtype: str = dataclasses.field(metadata=_STATIC)
    shape: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    code_dtype: str = dataclasses.field(metadata=_STATIC)

    def __repr__(self) -> str:
        """Format and shape, without the numbers."""
        return f"PackedTensor({self.format}, shape={self.shape}, dtype={self.dtype})"

    @property
    def nbytes(self) -> int:
        """Bytes held by codes and scales."""
        return int(sum(leaf.nbytes for leaf in jax.tree.leaves(self)))

    def unpack(self) -> QTensor:
        """The `QTensor` that was packed, bit for bit."""
        layout, scale, zero_point = _layout(self.format), self.scale, self.zero_point
        codes = unpack_codes(self.codes, layout, math.prod(self.shape), self.code_dtype)
        if self.scale_format is not None and scale.dtype == jnp.uint8:
            scale = _widened(scale, self.scale_format)
        if zero_point is not None and zero_point.dtype == jnp.uint8:
            flat = unpack_codes(zero_point, layout, scale.size, "int32")
            zero_point = flat.astype(jnp.float32).reshape(scale.shape)
        return QTensor(
            codes.reshape(self.shape),
            Scale(scale, self.tensor_scale, zero_point),
            self.format,
            self.tile,
            self.scale_format,
            self.dtype,
        )

    def dequantize(self) -> Float[Array, "..."]:
        """The array in its original dtype; equal to `QTensor.dequantize` bit for bit."""
        return self.unpack().dequantize()


def pack(qtensor: QTensor) -> PackedTensor:
    """Packs codes and scales to their true size; those of a stack of arrays too.

    Scales and zero points that their short form would change stay float32. Where packing is
    compiled, values cannot be looked at: scales are what `scale_format` says, and zero points
    stay float32. The one code that does not come back is the 0 of a binary group that is NaN.
    """
    fmt, scale = qtensor.format, qtensor.scale
    return PackedTensor(
        pack_codes(qtensor.codes, _layout(fmt)),
        _packed_scale(scale.scale, qtensor.scale_format),
        scale.tensor_scale,
        None if scale.zero_point is None else _packed_zero_point(scale.zero_point, fmt),
        fmt,
        qtensor.tile,
        qtensor.scale_format,
        qtensor.dtype,
        qtensor.shape,
        str(qtensor.codes.dtype),
    )


def _layout(fmt: Format) -> Layout:
    bits = math.ceil(fmt.bits)
    if fmt.min_magnitude:
        return Layout("binary", bits)
    if fmt.levels is not None or fmt.lowest == 0:
        return Layout("unsigned", bits)
    if fmt.is_integer:
        return Layout("ternary" if fmt.bits < 2 else "signed", bits)
    return Layout("magnitude", bits, has_nan=not fmt.scaled)


def _packed_scale(scale: Array, scale_format: ScaleFormat | None) -> Array:
    if scale_format is None:
        return scale
    narrow, restored = _narrowed(scale, scale_format)
    return narrow if isinstance(scale, jax.core.Tracer) or _equal(restored, scale) else scale


@functools.partial(jax.jit, static_argnames="scale_format")
def _narrowed(scale: Array, scale_format: ScaleFormat) -> tuple[Array, Array]:
    """Scales as bytes, and what those bytes stand for."""
    if scale_format == "e8m0":
        narrow = (exponent_of(scale) + _BIAS).astype(jnp.uint8)  # 255 where the scale is NaN
    else:
        narrow = jax.lax.bitcast_convert_type(scale.astype(jnp.float8_e4m3fn), jnp.uint8)
    return narrow, _widened(narrow, scale_format)


@functools.partial(jax.jit, static_argnames="scale_format")
def _widened(narrow: Array, scale_format: ScaleFormat) -> Array:
    if scale_format == "e8m0":
        exponent = narrow.astype(jnp.int32) - _BIAS
        return jnp.where(narrow == jnp.uint8(255), jnp.nan, power_of_two(exponent))
    return jax.lax.bitcast_convert_type(narrow, jnp.float8_e4m3fn).astype(jnp.float32)


def _packed_zero_point(zero_point: Array, fmt: Format) -> Array:
    if isinstance(zero_point, jax.core.Tracer) or not fmt.is_integer:
        return zero_point
    layout = _layout(fmt)
    packed = pack_codes(zero_point.astype(jnp.int32), layout)
    restored = unpack_codes(packed, layout, zero_point.size, "int32").astype(jnp.float32)
    return packed if _equal(restored, zero_point.reshape(-1)) else zero_point


def _equal(a: Array, b: Array) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)
