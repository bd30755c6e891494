"""Integers of any width in a string of bytes, and back, exactly.

Eight integers of b bits fill b bytes (two of 4 bits one byte, and so on), so arrays are packed by
such groups: every byte of a group is the union of the integers that overlap it, each shifted by
an amount known before the program is compiled. That is a handful of vector operations for any
width, odd ones too, where spreading the bits into an array of their own would take b bytes an
integer.

The order is little-endian: the first integer starts at the lowest bit of the first byte. Bits
left over at the end are zero.

Digits of three values need log2(3) = 1.585 bits; five of them fit a byte, 3^5 = 243, which is 1.6
bits each.

A `Layout` says which bits stand for a code: two's complement, a position, or, for floats, sign
and magnitude, which for the formats that OCP and IEEE define are the very bits of theirs. Formats
without a scale have codes for NaN; it becomes the magnitude with all bits set, which no finite
value of such a format has.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Integer, UInt8, UInt32

_TRITS = 5  # a byte


class Layout(NamedTuple):
    """How a code becomes bits; formats of one layout share a compiled program.

    Attributes:
        kind: "unsigned" and "signed" integers, sign and "magnitude", "binary" (-1 and 1) or
            "ternary" (-1, 0 and 1).
        bits: of a code, rounded up.
        has_nan: whether the most negative integer of the codes' dtype stands for NaN; of
            magnitudes only.
    """

    kind: Literal["unsigned", "signed", "magnitude", "binary", "ternary"]
    bits: int
    has_nan: bool = False

    @property
    def nan_field(self) -> int:
        """The bits of NaN: a positive sign and all of the magnitude."""
        return (1 << (self.bits - 1)) - 1


@functools.partial(jax.jit, static_argnames="layout")
def pack_codes(codes: Integer[Array, "..."], layout: Layout) -> UInt8[Array, " bytes"]:
    """Codes in C order as `pack_bits` or, if ternary, `pack_trits` stores them.

    Args:
        codes: integers that `layout` has bits for; gathered from a mesh with explicit axes.
        layout: of the format.
    """
    codes = _whole(codes)
    wide = codes.astype(jnp.int32)
    if layout.kind == "ternary":
        return pack_trits(wide + 1)
    if layout.kind == "binary":
        return pack_bits((wide > 0).astype(jnp.int32), 1)
    if layout.kind != "magnitude":
        return pack_bits(wide, layout.bits)
    sign = (wide < 0).astype(jnp.uint32) << jnp.uint32(layout.bits - 1)
    fields = jnp.abs(wide).astype(jnp.uint32) | sign
    if layout.has_nan:
        is_nan = wide == jnp.iinfo(codes.dtype).min
        fields = jnp.where(is_nan, jnp.uint32(layout.nan_field), fields)
    return pack_bits(fields, layout.bits)


@functools.partial(jax.jit, static_argnames=("layout", "count", "dtype"))
def unpack_codes(
    packed: UInt8[Array, " bytes"], layout: Layout, count: int, dtype: str
) -> Integer[Array, " count"]:
    """The codes that `pack_codes` packed.

    Args:
        packed: as `pack_codes` returns it.
        layout: the same.
        count: how many codes there are.
        dtype: integer dtype of the codes, as they had it: its lowest number stands for NaN.
    """
    if layout.kind == "ternary":
        return (unpack_trits(packed, count).astype(jnp.int32) - 1).astype(dtype)
    fields = unpack_bits(packed, layout.bits, count)
    codes = fields.astype(jnp.int32)
    if layout.kind == "binary":
        codes = 2 * codes - 1
    elif layout.kind == "signed":
        sign = 2 ** (layout.bits - 1)
        codes = (codes ^ sign) - sign
    elif layout.kind == "magnitude":
        sign_bit = jnp.uint32(2 ** (layout.bits - 1))
        magnitude = (fields & jnp.uint32(layout.nan_field)).astype(jnp.int32)
        codes = jnp.where(fields >= sign_bit, -magnitude, magnitude)
        if layout.has_nan:
            is_nan = fields == jnp.uint32(layout.nan_field)
            codes = jnp.where(is_nan, jnp.iinfo(dtype).min, codes)
    return codes.astype(dtype)


def pack_bits(values: Integer[Array, "..."], bits: int) -> UInt8[Array, " bytes"]:
    """The low `bits` bits of each integer, one after the other.

    Args:
        values: integers of any dtype and shape; read in C order.
        bits: 1 to 32.

    Returns:
        uint8, of ceil(values.size * bits / 8) elements.
    """
    size, nbytes = _group(bits)
    groups = _grouped(values.reshape(-1), size).astype(jnp.uint32) & jnp.uint32(2**bits - 1)
    columns = []
    for byte in range(nbytes):
        overlapping = range(8 * byte // bits, -(-8 * (byte + 1) // bits))
        parts = [_shifted(groups[:, i], i * bits - 8 * byte) for i in overlapping]
        columns.append(_union(parts).astype(jnp.uint8))  # drops what lies above the byte
    return jnp.stack(columns, axis=1).reshape(-1)[: -(-values.size * bits // 8)]


def unpack_bits(packed: UInt8[Array, " bytes"], bits: int, count: int) -> UInt32[Array, " count"]:
    """The integers that `pack_bits` packed, as uint32: low bits only, signs are not extended.

    Args:
        packed: as `pack_bits` returns it.
        bits: 1 to 32, of each integer.
        count: how many integers there are.
    """
    size, nbytes = _group(bits)
    groups = _grouped(packed, nbytes).astype(jnp.uint32)
    columns = []
    for i in range(size):
        overlapping = range(i * bits // 8, -(-(i + 1) * bits // 8))
        parts = [_shifted(groups[:, byte], 8 * byte - i * bits) for byte in overlapping]
        columns.append(_union(parts) & jnp.uint32(2**bits - 1))
    return jnp.stack(columns, axis=1).reshape(-1)[:count]


def pack_trits(values: Integer[Array, "..."]) -> UInt8[Array, " bytes"]:
    """Digits 0, 1 and 2, five a byte, the first with weight 1.

    Args:
        values: integers of any dtype and shape; read in C order.

    Returns:
        uint8, of ceil(values.size / 5) elements.
    """
    groups = _grouped(values.reshape(-1), _TRITS).astype(jnp.uint8)
    total = groups[:, 0]
    for i in range(1, _TRITS):
        total = total + groups[:, i] * jnp.uint8(3**i)
    return total


def unpack_trits(packed: UInt8[Array, " bytes"], count: int) -> UInt8[Array, " count"]:
    """The digits that `pack_trits` packed, as uint8; `count` says how many there are."""
    digits = [packed // jnp.uint8(3**i) % jnp.uint8(3) for i in range(_TRITS)]
    return jnp.stack(digits, axis=1).reshape(-1)[:count]


def _whole(x: Array) -> Array:
    """`x` on every device, where its type says that it is in parts: a string of bytes has none."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    whole: Array = jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))
    return whole


def _group(bits: int) -> tuple[int, int]:
    """The fewest integers that fill whole bytes, and how many bytes."""
    shared = math.gcd(bits, 8)
    return 8 // shared, bits // shared


def _grouped(flat: Array, size: int) -> Array:
    """A flat array as rows of `size`, the last filled up with zeros."""
    rows = -(-flat.size // size)
    return jnp.pad(flat, (0, rows * size - flat.size)).reshape(rows, size)


def _shifted(x: Array, places: int) -> Array:
    """Left by `places` bits, right where they are negative."""
    by = jnp.uint32(abs(places))
    return jnp.left_shift(x, by) if places >= 0 else jnp.right_shift(x, by)


def _union(parts: list[Array]) -> Array:
    """All bits of the parts."""
    union = parts[0]
    for part in parts[1:]:
        union = union | part
    return union
