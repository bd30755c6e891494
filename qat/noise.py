"""Random bits for stochastic rounding: a hash of the element's position and a key.

`jax.random.bits` costs more than the rounding it serves and is stored in memory before it is
used. A hash of a counter is fused into the rounding, partitions with the array it belongs to and
is a pure function of (key, position). Two rounds of a well-mixing 32-bit permutation, each after
32 bits made of the whole key, are plenty for rounding and nothing more: this is no source of
randomness for anything else.

Positions are those of the array at hand: inside `jax.shard_map` they are local, and the key should
be folded with the device's index. Keys are folded by appending a word. The multipliers are the
low-bias constants of Wellons' search over such permutations.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from qat.spelling import expected_instead

_START = 0x9E3779B9  # zero is a fixed point of the permutation
_FEWEST_WORDS = 2  # of a raw key


def random_bits(key: Array, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Uniformly random uint32, a pure function of key and position.

    Args:
        key: a JAX key, typed or raw, or the words of `fold`.
        shape: of the result.
    """
    first, second = jnp.uint32(_START), jnp.uint32(_START)
    for word in words_of(key):  # scalars: however many words, elements are mixed twice
        first = _mixed(first ^ word)
        second = _mixed(second + first)
    return _mixed(_mixed(_position(shape) ^ first) + second)


def words_of(key: Array) -> UInt32[Array, " words"]:
    """The words of one JAX key, typed or raw.

    Raises:
        ValueError: not a key, or several.
    """
    dtype, ndim = getattr(key, "dtype", None), getattr(key, "ndim", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if typed and ndim == 0:
        return jax.random.key_data(key)
    if typed or dtype != jnp.uint32 or ndim != 1 or key.size < _FEWEST_WORDS:
        expected = "one JAX random key, such as jax.random.key(0)"
        value = key if dtype is None else f"{dtype} of shape {tuple(key.shape)}"
        raise ValueError(expected_instead("key", expected, value))
    return jnp.asarray(key)


def fold(words: UInt32[Array, "*stack words"], number: Array) -> UInt32[Array, "*stack more"]:
    """The words of another key for every number: one word more."""
    word = jnp.broadcast_to(number.astype(jnp.uint32), (*words.shape[:-1], 1))
    return jnp.concatenate([words, word], axis=-1)


def _position(shape: tuple[int, ...]) -> Array:
    """Each element's index in row-major order, modulo 2**32."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        index = index + stride * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index


def _mixed(bits: Array) -> Array:
    """A permutation of the 32-bit integers that looks random."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)
