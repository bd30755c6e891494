"""AWQ: weights of large inputs are scaled up before rounding, and their inputs down.

Lin et al., arXiv 2306.00978. A weight that is multiplied by s before it is rounded in the same
group has an error s times smaller after division. What is large is said by the mean magnitude of
its inputs, how much of that is good for the layer by trying: 20 exponents, from 0, which changes
nothing, and the one whose rounded weight has the least output error. The second moment of the
inputs measures that without any activation.

Shapes: K inputs, N outputs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.ptq.rtn import dequantized, prepared, round_to_nearest
from qat.ptq.statistics import Statistics, output_error
from qat.quantizer import Quantizer

_EXPONENTS = 20
_LARGEST = 1e4  # of scales; the smallest is its reciprocal


def awq_scale(
    weight_KN: Float[Array, "K N"], quantizer: Quantizer, statistics: Statistics
) -> Float[Array, " K"]:
    """What to multiply the rows of a weight by, and to divide its inputs by.

    Args:
        weight_KN: floating-point; of several layers with the same inputs, beside each other.
        quantizer: by which the scaled weight will be rounded; its format may be traced.
        statistics: of the inputs.

    Returns:
        float32, from 1e-4 to 1e4; 1 for inputs that are always zero.

    Raises:
        ValueError: as `qat.ptq.rtn.round_to_nearest`.
    """
    scale_K: Array = _searched(weight_KN, prepared(quantizer), statistics)
    return scale_K


@jax.jit
def _searched(weight_KN: Array, quantizer: Quantizer, statistics: Statistics) -> Array:
    weight_KN = weight_KN.astype(jnp.float32)
    absmean_K = statistics.absmean

    def error_of(exponent: Array) -> Array:
        scale_K1 = _power(absmean_K, exponent)[:, None]
        rounded_KN = dequantized(*round_to_nearest(weight_KN * scale_K1, quantizer)) / scale_K1
        error: Array = output_error(weight_KN, rounded_KN, statistics.second_moment_KK)
        return error

    exponents = jnp.arange(_EXPONENTS, dtype=jnp.float32) / _EXPONENTS
    return _power(absmean_K, exponents[jnp.argmin(jax.lax.map(error_of, exponents))])


def _power(absmean_K: Array, exponent: Array) -> Array:
    """Powers of the means, with 1 half-way between the largest and the smallest."""
    alive_K = absmean_K > 0
    log_K = jnp.log(jnp.where(alive_K, absmean_K, 1))
    highest = jnp.max(jnp.where(alive_K, log_K, -jnp.inf))
    lowest = jnp.min(jnp.where(alive_K, log_K, jnp.inf))
    power_K = jnp.exp(exponent * (log_K - (highest + lowest) / 2))
    return jnp.where(alive_K, jnp.clip(power_K, 1 / _LARGEST, _LARGEST), 1)
