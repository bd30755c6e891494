"""What a layer's inputs are like over all calibration tokens, in the space of one matrix.

Every method reads the same few sums: the second moment XᵀX is all that the squared error of a
layer's outputs depends on, ‖X(W - Q)‖² = tr(ΔᵀXᵀXΔ), so no activation is kept. They grow batch by
batch; batches of any size and magnitude count token by token.

Shapes: T tokens, K inputs, N outputs.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.grid import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over the inputs of one layer, float32.

    Attributes:
        second_moment_KK: sum of x xᵀ.
        absmax_K: largest magnitude; infinite where an input was not a number.
        abssum_K: sum of magnitudes.
        tokens: how many there were.
    """

    second_moment_KK: Leaf
    absmax_K: Leaf
    abssum_K: Leaf
    tokens: Leaf

    @classmethod
    def zeros(cls, size: int) -> "Statistics":
        """Of no tokens, for a layer with `size` inputs."""
        inputs = jnp.zeros(size, jnp.float32)
        return cls(jnp.zeros((size, size), jnp.float32), inputs, inputs, jnp.float32(0))

    @property
    def absmean(self) -> Float[Array, "*stack K"]:
        """Mean magnitude; 0 without tokens."""
        return self.abssum_K / jnp.maximum(self.tokens, 1)[..., None]

    def add(self, x_TK: Float[Array, "T K"]) -> "Statistics":
        """With more tokens, of any floating dtype."""
        added: Statistics = _added(self, x_TK)
        return added


@jax.jit
def output_error(
    weight_KN: Float[Array, "K N"],
    quantized_KN: Float[Array, "K N"],
    second_moment_KK: Float[Array, "K K"],
) -> Float[Array, ""]:
    """Relative error of a layer's outputs, ‖X(W - Q)‖ / ‖XW‖: root mean squares over all tokens.

    0 for equal weights, infinite where only the exact outputs are all zero.
    """
    error = _output_norm(weight_KN - quantized_KN, second_moment_KK)
    size = _output_norm(weight_KN, second_moment_KK)
    return jnp.where(error == 0, 0, error / size)


@jax.jit
def _added(statistics: Statistics, x_TK: Array) -> Statistics:
    x_TK = x_TK.astype(jnp.float32)
    magnitude_TK = jnp.abs(x_TK)
    finite_TK = jnp.where(magnitude_TK < jnp.inf, magnitude_TK, jnp.inf)  # maxima may drop NaN
    product_KK = jnp.matmul(x_TK.T, x_TK, precision=jax.lax.Precision.HIGHEST)
    return Statistics(
        statistics.second_moment_KK + product_KK,
        jnp.maximum(statistics.absmax_K, jnp.max(finite_TK, axis=0, initial=0)),
        statistics.abssum_K + jnp.sum(magnitude_TK, axis=0),
        statistics.tokens + x_TK.shape[0],
    )


def _output_norm(weight_KN: Array, second_moment_KK: Array) -> Array:
    """‖XW‖; the trace may fall below zero by rounding."""
    product_KN = jnp.matmul(second_moment_KK, weight_KN, precision=jax.lax.Precision.HIGHEST)
    return jnp.sqrt(jnp.maximum(jnp.sum(weight_KN * product_KN), 0))
