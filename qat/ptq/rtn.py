"""Round to nearest: every weight goes to the closest value of its scaled grid, without data.

The baseline of every post-training method. It is the quantizer of training applied once, so
evaluating under a weights-only policy gives the same losses bit for bit.

Shapes: K inputs, N outputs.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.quantizer import Quantizer
from qat.scales import Scale, rounded, scale_for


def round_to_nearest(
    weight_KN: Float[Array, "K N"], quantizer: Quantizer
) -> tuple[Float[Array, "K N"], Scale]:
    """Rounds a weight to the nearest values of its grid.

    Args:
        weight_KN: floating-point.
        quantizer: its format may be traced.

    Returns:
        float32 values in units of the grid, without the zero point, and compact scales:
        `dequantized` puts them together, and equals `qat.fake_quant` bit for bit.

    Raises:
        ValueError: as `qat.quantize`; stochastic rounding.
    """
    result: tuple[Array, Scale] = _rounded(weight_KN, prepared(quantizer))
    return result


@jax.jit
def dequantized(values_KN: Float[Array, "K N"], scale: Scale) -> Float[Array, "K N"]:
    """The weight that values and their scales stand for, float32."""
    return values_KN * spread(scale, values_KN.shape).applied


def prepared(quantizer: Quantizer) -> Quantizer:
    """The quantizer with its numbers as data, so that all formats share one compiled program.

    Raises:
        ValueError: stochastic rounding, which no method for trained weights is about.
    """
    if quantizer.rounding != "nearest":
        nearest = dataclasses.replace(quantizer, rounding="nearest")
        raise ValueError(
            f"quantizer {str(quantizer)!r}: trained weights are rounded to nearest; "
            f"expected {str(nearest)!r}"
        )
    return quantizer.traced()


def spread(scale: Scale, shape: tuple[int, ...]) -> Scale:
    """The scale and zero point of every element of a matrix, from compact ones; one level."""

    def per_element(compact: Array) -> Array:
        for axis, size in enumerate(shape):
            repeats = size // max(1, compact.shape[axis])
            compact = jnp.repeat(compact, repeats, axis, total_repeat_length=size)
        return compact

    zero_point = scale.zero_point
    zero_point = None if zero_point is None else per_element(zero_point)
    return Scale(per_element(scale.applied), None, zero_point)


@jax.jit
def _rounded(weight_KN: Array, quantizer: Quantizer) -> tuple[Array, Scale]:
    scale = scale_for(weight_KN, quantizer, 0)
    weight_KN = weight_KN.astype(jnp.float32)
    return rounded(weight_KN, spread(scale, weight_KN.shape), quantizer.grid)[1], scale
