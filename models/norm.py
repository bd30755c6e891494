"""Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467), whose sums are matrix products.

XLA on CPU writes out every operand of a fused reduction, broadcasts too. With the sums over
features as products with a vector, and a gradient that keeps the inputs and one number a row, a
small model's whole train step takes a fifth less time than with Flax's norm. The products ask for
full float32; compiled for a TPU they are reductions again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """Divides each row by its root mean square, then scales its features; computes in float32.

    Args:
        features: size D of the last axis.
        dtype: of the result.
        rngs: for the initial scale, as in Flax's norm; ones need no key, but others do the next.
        epsilon: added to the mean square.
    """

    def __init__(self, features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, epsilon: float = 1e-6):
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (features,)))
        self.dtype = dtype
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normed inputs, same shape."""
        x_MD = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        return _normed(self.epsilon, x_MD, self.scale[...]).astype(self.dtype).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normed(epsilon: float, x_MD: Array, scale_D: Array) -> Array:
    return _normed_fwd(epsilon, x_MD, scale_D)[0]


def _normed_fwd(epsilon: float, x_MD: Array, scale_D: Array) -> tuple[Array, Any]:
    inverse_M1 = jax.lax.rsqrt(row_sums(x_MD * x_MD) / x_MD.shape[1] + epsilon)
    return x_MD * inverse_M1 * scale_D[None], (x_MD, inverse_M1, scale_D)


def _normed_bwd(epsilon: float, residuals: Any, g_MD: Array) -> tuple[Array, Array]:
    del epsilon
    x_MD, inverse_M1, scale_D = residuals
    alike_MD = g_MD * x_MD
    dscale_1D = _product(inverse_M1.T, alike_MD)
    mean_M1 = _product(alike_MD, scale_D[:, None]) / scale_D.size
    dx_MD = inverse_M1 * scale_D[None] * g_MD - x_MD * (mean_M1 * inverse_M1**3)
    return dx_MD, dscale_1D[0]


_normed.defvjp(_normed_fwd, _normed_bwd)


def row_sums(x: Float[Array, "*rows D"]) -> Float[Array, "*rows 1"]:
    """Sums over the last axis."""
    return _product(x, jnp.ones((x.shape[-1], 1), x.dtype))


def _product(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
