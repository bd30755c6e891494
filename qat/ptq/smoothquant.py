"""SmoothQuant: what is hard to round about inputs is moved into the weights.

Xiao et al., arXiv 2211.10438. A few inputs of a transformer are a hundred times larger than the
rest, token after token, and set the scale of all. Each is divided by max|x|^α / max|w|^(1-α), and
its row of weights multiplied by as much, which shares the burden.

Shapes: K inputs, N outputs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.ptq.statistics import Statistics
from qat.spelling import expected_instead

_LARGEST = 1e5  # of scales; the smallest is its reciprocal


def smoothing_scale(
    weight_KN: Float[Array, "K N"], statistics: Statistics, alpha: float = 0.5
) -> Float[Array, " K"]:
    """What to divide the inputs of a layer by, and to multiply the rows of its weight by.

    Args:
        weight_KN: floating-point; of several layers with the same inputs, beside each other.
        statistics: of the inputs: the largest magnitudes of all calibration batches.
        alpha: share of the burden that the weights take, from 0 to 1.

    Returns:
        float32, from 1e-5 to 1e5; 1 for inputs or rows that are always zero.

    Raises:
        ValueError: alpha out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(expected_instead("alpha", "a number from 0 to 1", alpha))
    absmax_K = statistics.absmax_K
    weight_K = jnp.max(jnp.abs(weight_KN.astype(jnp.float32)), axis=1)
    possible_K = (absmax_K > 0) & (weight_K > 0)
    scale_K = jnp.where(possible_K, absmax_K, 1) ** alpha
    scale_K = scale_K / jnp.where(possible_K, weight_K, 1) ** (1 - alpha)
    return jnp.clip(scale_K, 1 / _LARGEST, _LARGEST)
