"""Which elements of an array share a scale.

Every granularity is a *tile*: how many neighbours along each axis share a scale. Arrays are
reshaped so that each tiled axis becomes (groups, tile), statistics reduce the tiles, and scales
are kept compact: one number a group.
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qat.quantizer import Quantizer
from qat.spelling import expected_instead

Axis = int | Sequence[int]
Tile = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Groups:
    """How an array splits into the groups that share a scale.

    Attributes:
        shape: of the array.
        tile: neighbours along each axis that share a scale.
    """

    shape: tuple[int, ...]
    tile: Tile

    def split(self, x: Array) -> Array:
        """`x` with each tiled axis as (groups, tile)."""
        return x.reshape(self.split_shape)

    @property
    def split_shape(self) -> tuple[int, ...]:
        """Shape of a split array."""
        return tuple(n for dims in self._dims() for n, _ in dims)

    @property
    def reduced(self) -> tuple[int, ...]:
        """Axes of a split array that lie within a group."""
        flags = [within for dims in self._dims() for _, within in dims]
        return tuple(axis for axis, within in enumerate(flags) if within)

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """Shape of the scales beside a split array: 1 along axes within a group."""
        return tuple(1 if within else n for dims in self._dims() for n, within in dims)

    @property
    def compact_shape(self) -> tuple[int, ...]:
        """Shape of the scales as they are stored: the number of groups along each axis."""
        pairs = zip(self.shape, self.tile, strict=True)
        return tuple(1 if n == size else n // size for n, size in pairs)

    def _dims(self) -> list[list[tuple[int, bool]]]:
        """For each axis its dimensions once split, and whether they lie within a group."""

        def dims(n: int, size: int) -> list[tuple[int, bool]]:
            if n == size or size == 1:
                return [(n, n == size)]
            return [(n // size, False), (size, True)]

        return [dims(n, size) for n, size in zip(self.shape, self.tile, strict=True)]


def groups_of(x: Array | jax.ShapeDtypeStruct, quantizer: Quantizer, axis: Axis) -> Groups:
    """The groups of an array.

    Args:
        x: floating-point array.
        quantizer: its granularity decides.
        axis: contraction axis or axes of `x`; all share one scale where there are none.

    Raises:
        ValueError: `axis` is not an axis of `x`; `x` is not floating point, or float64; a block
            size does not divide its axis.
    """
    axes = _normalized_axes(x, axis)
    if quantizer.granularity == "tensor" or not axes:
        return Groups(x.shape, x.shape)
    tile = [n if a in axes else 1 for a, n in enumerate(x.shape)]
    if quantizer.granularity == "block":
        for a in axes:
            tile[a] = 1
        for a, size in _block_axes(x, quantizer, axes):
            tile[a] = _checked_block(x, a, size)
    return Groups(x.shape, tuple(tile))


def as_tuple(axis: Axis) -> tuple[int, ...]:
    """One axis or several as a tuple.

    Raises:
        ValueError: not an integer, nor several.
    """
    several = isinstance(axis, Sequence) and not isinstance(axis, str)
    axes: Any = axis if several else [axis]
    try:
        integers = [operator.index(a) for a in axes if not isinstance(a, bool)]
    except TypeError:
        integers = []
    if len(integers) < len(axes):
        expected = "the contraction axis, an integer, or several in a tuple"
        raise ValueError(expected_instead("axis", expected, axis))
    return tuple(integers)


def _block_axes(
    x: Array | jax.ShapeDtypeStruct, quantizer: Quantizer, axes: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Axes that are tiled by blocks, and the sizes of the blocks."""
    if isinstance(quantizer.block_size, int):
        return [(axes[-1], quantizer.block_size)]
    assert quantizer.block_size is not None
    kept = [a for a in range(x.ndim) if a not in axes]
    if not kept:
        raise ValueError(
            f"block_size {quantizer.block_size}: every axis of {x.shape} is contracted"
        )
    return list(zip((axes[-1], kept[-1]), quantizer.block_size, strict=True))


def _checked_block(x: Array | jax.ShapeDtypeStruct, axis: int, size: int) -> int:
    length = x.shape[axis]
    if length % size:
        divisors = [d for d in range(1, length + 1) if length % d == 0]
        closest = min(divisors, key=lambda d: abs(d - size))
        raise ValueError(
            f"block size {size} does not divide axis {axis} of an array of shape {x.shape}; "
            f"nearest is {closest}"
        )
    return size


def _normalized_axes(x: Array | jax.ShapeDtypeStruct, axis: Axis) -> tuple[int, ...]:
    """Non-negative axes, checked against the rank of `x`."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"only floating-point arrays can be quantized, got dtype {x.dtype}")
    if x.dtype == jnp.float64:
        raise ValueError("float64 would be rounded to float32 first: expected float32 or narrower")
    axes = as_tuple(axis)
    for a in axes:
        if not -x.ndim <= a < x.ndim:
            expected = f"{-x.ndim} to {x.ndim - 1}" if x.ndim else "(), as it has none"
            raise ValueError(
                f"axis {a} is not an axis of an array of shape {x.shape}: expected {expected}"
            )
    normalized = tuple(a % x.ndim for a in axes)
    if len(set(normalized)) < len(axes):
        raise ValueError(f"axis {axes} names an axis of an array of shape {x.shape} twice")
    return normalized
