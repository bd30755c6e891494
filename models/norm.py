"""Flax's RMSNorm for narrow dtypes under strict promotion."""

import jax
from flax import nnx


class RMSNorm(nnx.RMSNorm):
    """`flax.nnx.RMSNorm`, which computes in float32 and returns its dtype.

    It gets there by implicit promotion, which a program that promotes strictly must allow it.
    """

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normed inputs, same shape."""
        with jax.numpy_dtype_promotion("standard"):
            normed: jax.Array = super().__call__(x, mask)
        return normed
