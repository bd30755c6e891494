"""Orthogonal matrices that spread every coordinate over all others, for any size.

Rotating the inputs of a layer and its weights alike changes no product, but outliers: each becomes
a little of everything, which low precision can hold (QuaRot, Ashkboos et al., arXiv 2404.00456).
A size is K = O · 2^k with O odd. Signs are drawn at random; a Walsh-Hadamard matrix mixes the 2^k
part, and a random orthogonal matrix the odd part. Its entries decide how flat things become, and
those of one drawn uniformly are up to twice as large as they must be: ours is the matrix of the
real Fourier transform, with entries of at most sqrt(2 / O), in a random order and with random
signs.

Nothing of size K×K is made: the matrix is a Kronecker product of a few small ones, and each is
one dense product, which is what processors are good at. Up to 128 a larger matrix costs less than
one product more.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qat.grid import Leaf
from qat.spelling import expected_instead

_LARGEST = 128  # of a small matrix, if the odd part is not larger


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix of size K as data.

    Attributes:
        signs_K: float32, ±1.
        mix_OO: float32, orthogonal; O is the largest odd divisor of K.
    """

    signs_K: Leaf
    mix_OO: Leaf

    @classmethod
    def of(cls, size: int, seed: int) -> "Rotation":
        """The rotation of a seed, the same on every machine.

        Raises:
            ValueError: a size below 1.
        """
        if size < 1:
            raise ValueError(expected_instead("size of a rotation", "an integer above 0", size))
        rng = np.random.default_rng(seed)
        odd = size // (size & -size)
        signs_K = rng.choice([-1.0, 1.0], size)
        mix_OO = _fourier(odd)[rng.permutation(odd)] * rng.choice([-1.0, 1.0], (odd, 1))
        return cls(jnp.asarray(signs_K, jnp.float32), jnp.asarray(mix_OO, jnp.float32))

    def apply(self, x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
        """Every vector along an axis, rotated: inputs along their last, weights along their first.

        Args:
            x: floating-point, of length K along `axis`.
            axis: of `x`.

        Returns:
            Array of the shape and dtype of `x`; computed in float32.

        Raises:
            ValueError: another length.
        """
        rows, shape = self._rows(x, axis)
        rows = _mixed(rows * self.signs_K[None], self.mix_OO)
        return jnp.moveaxis(rows.reshape(shape), -1, axis).astype(x.dtype)

    def inverse(self, x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
        """What `apply` made `x` of; arguments as there."""
        rows, shape = self._rows(x, axis)
        rows = _mixed(rows, self.mix_OO.T) * self.signs_K[None]
        return jnp.moveaxis(rows.reshape(shape), -1, axis).astype(x.dtype)

    def _rows(self, x: Array, axis: int) -> tuple[Array, tuple[int, ...]]:
        """Float32 vectors as rows, and the shape that they had together."""
        size = self.signs_K.shape[0]
        if x.shape[axis] != size:
            raise ValueError(
                f"a rotation of size {size}: axis {axis} of an array of shape {x.shape} "
                f"has {x.shape[axis]}"
            )
        last = jnp.moveaxis(x, axis, -1).astype(jnp.float32)
        return last.reshape(-1, size), last.shape


def _mixed(rows: Array, mix_OO: Array) -> Array:
    """The product of all small matrices, each along its part of the rows."""
    matrices = _factors(mix_OO, rows.shape[-1])
    split = rows.reshape(-1, *(len(matrix) for matrix in matrices))
    for matrix in reversed(matrices):  # the axis that was mixed makes room for the next
        split = jnp.matmul(split, matrix.T, precision=jax.lax.Precision.HIGHEST)
        split = jnp.moveaxis(split, -1, 1)
    return split.reshape(rows.shape)


def _factors(mix_OO: Array, size: int) -> list[Array]:
    """The matrices whose Kronecker product a rotation is, each as large as may be."""
    bits = (size // len(mix_OO)).bit_length() - 1
    tail = []
    while bits and len(mix_OO) << bits > _LARGEST:
        tail.append(min(bits, _LARGEST.bit_length() - 1))
        bits -= tail[-1]
    return [jnp.kron(mix_OO, _hadamard(bits)), *map(_hadamard, tail)]


def _hadamard(bits: int) -> Array:
    """The orthonormal Walsh-Hadamard matrix of size 2^bits: symmetric, its own inverse."""
    index = np.arange(2**bits)
    shared_ones = np.bitwise_count(index[:, None] & index)
    return jnp.asarray(np.where(shared_ones % 2, -1, 1) * 2 ** (-bits / 2), jnp.float32)


def _fourier(size: int) -> np.ndarray:
    """The orthonormal real Fourier matrix of an odd size."""
    wave, place = np.arange(1, size // 2 + 1)[:, None], np.arange(size)
    angle = 2 * np.pi * wave * place / size
    rows = [np.full((1, size), math.sqrt(0.5)), np.cos(angle), np.sin(angle)]
    matrix: np.ndarray = np.concatenate(rows) * math.sqrt(2 / size)
    return matrix
