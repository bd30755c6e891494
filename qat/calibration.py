"""Numbers that quantizers are given: first values of learned scales, and ranges seen in data.

A layer with a learned or fixed scale holds the number in its state; these pure functions say what
it starts from and how a batch changes it.

Sources: LSQ (Esser et al., arXiv 1902.08153) for the first value of a learned scale; Jacob et al.
(arXiv 1712.05877) for ranges as exponential moving averages.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qat.groups import Axis, groups_of
from qat.quantizer import Quantizer

NOTHING_TO_CALIBRATE = (
    "calibrate: no activation has a fixed or learned scale; "
    "expected a policy such as Policy(activations='int8/fixed')"
)
NO_BATCH = "calibrate: expected at least one batch"

_MEAN_OF_NORMAL = math.sqrt(2 / math.pi)  # mean magnitude of a standard normal variable


def needs_value(quantizer: Quantizer | None) -> bool:
    """Whether a layer has to hold the number of a quantizer."""
    return (
        quantizer is not None
        and quantizer.value is None
        and quantizer.scale in ("fixed", "learned")
    )


def with_value(quantizer: Quantizer, value: Any) -> Quantizer:
    """The quantizer with its number; a range with a zero point is held as an array of two."""
    if quantizer.scale == "fixed" and quantizer.zero_point:
        value = (value[..., 0], value[..., 1])
    return dataclasses.replace(quantizer, value=value)


def first_value(
    operand: str,
    quantizer: Quantizer,
    weights: Float[Array, "..."] | None = None,
    axis: Axis = 0,
) -> Float[Array, "..."]:
    """What a layer holds for a quantizer before it sees data.

    Args:
        operand: its name.
        quantizer: one that `needs_value`.
        weights: of the layer, for a learned scale of theirs.
        axis: contraction axis or axes of `weights`.

    Returns:
        float32: a learned scale, or a range that is not a number yet.

    Raises:
        ValueError: no layer can hold that number, see `check_held`.
    """
    check_held(operand, quantizer)
    if operand == "weights":
        if weights is None:
            raise ValueError("a learned scale of weights starts from them: expected an array")
        return initial_scale(weights, quantizer, axis)
    return scale_of_normal(quantizer) if quantizer.scale == "learned" else unseen(quantizer)


def initial_scale(x: Float[Array, "..."], quantizer: Quantizer, axis: Axis) -> Float[Array, "..."]:
    """Twice the mean magnitude of each group over the root of the largest value, as LSQ has it.

    Args:
        x: floating-point array.
        quantizer: with a learned scale.
        axis: contraction axis or axes of `x`.

    Returns:
        float32, one number a group.
    """
    groups = groups_of(x, quantizer, axis)
    split = groups.split(jnp.abs(x.astype(jnp.float32)))
    mean = jnp.mean(split, axis=groups.reduced).reshape(groups.compact_shape)
    return _scale_of_mean(mean, quantizer)


def scale_of_normal(quantizer: Quantizer) -> Float[Array, ""]:
    """`initial_scale` of a standard normal variable: where a learned scale starts without data."""
    return _scale_of_mean(jnp.float32(_MEAN_OF_NORMAL), quantizer)


def unseen(quantizer: Quantizer) -> Float[Array, "..."]:
    """What stands for a range before any batch: not a number, in the shape of a range."""
    return jnp.full((2,) if quantizer.zero_point else (), jnp.nan, jnp.float32)


def observed(x: Float[Array, "..."], quantizer: Quantizer) -> Float[Array, "..."]:
    """What one batch says of a scale or range for a whole tensor.

    Args:
        x: floating-point array.
        quantizer: with a learned or fixed scale and granularity "tensor".

    Returns:
        float32: a scale; or the largest magnitude; or, with a zero point, (2,): the smallest and
        the largest value. Infinite where the batch holds NaN, and no range comes of it.
    """
    x = x.astype(jnp.float32)
    if quantizer.scale == "learned":
        return _scale_of_mean(jnp.mean(jnp.abs(x)), quantizer)
    x = jnp.where(x < jnp.inf, x, jnp.inf)  # reductions may drop NaN
    low, high = jnp.min(x, initial=0), jnp.max(x, initial=0)
    return jnp.stack([low, high]) if quantizer.zero_point else jnp.maximum(high, -low)


def updated(
    old: Float[Array, "..."], new: Float[Array, "..."], quantizer: Quantizer, decay: float | None
) -> Float[Array, "..."]:
    """A scale or range after one more batch.

    Args:
        old: so far; not a number before the first batch.
        new: as `observed`.
        quantizer: whose number it is.
        decay: of the moving average, between 0 and 1; None widens a range to all that was seen,
            and averages a learned scale with decay 0.9.
    """
    if decay is None and quantizer.scale == "fixed":
        outward = jnp.asarray([-1.0, 1.0]) if quantizer.zero_point else jnp.float32(1)
        later = outward * jnp.maximum(outward * old, outward * new)
    else:
        kept = jnp.float32(0.9 if decay is None else decay)
        later = kept * old + (1 - kept) * new
    return jnp.where(jnp.isnan(old), new, later)


def follow(
    old: Float[Array, "..."], x: Float[Array, "..."], quantizer: Quantizer, decay: float | None
) -> Float[Array, "..."]:
    """A scale or range after one more batch: what it was `updated` by what is `observed`."""
    return updated(old, jax.lax.stop_gradient(observed(x, quantizer)), quantizer, decay)


def check_held(operand: str, quantizer: Quantizer) -> None:
    """Raises ValueError where no layer can hold the number that a quantizer needs.

    A fixed range of weights and any number of gradients come with the quantizer; of what flows
    through a layer, the shape of a scale must not depend on the batch.
    """
    if operand == "gradients" or (operand == "weights" and quantizer.scale != "learned"):
        raise ValueError(f"{operand} with a {quantizer.scale} scale need its value")
    if operand != "weights" and quantizer.granularity != "tensor":
        raise ValueError(
            f"{operand} with a {quantizer.scale} scale: expected granularity 'tensor', got "
            f"{quantizer.granularity!r}: the number of its scales changes with the batch"
        )


def check_decay(decay: float | None) -> None:
    """Raises ValueError for a decay that is not between 0 and 1."""
    if decay is not None and not 0 < decay < 1:
        raise ValueError(f"decay {decay}: expected between 0 and 1, such as 0.9")


def _scale_of_mean(mean: Array, quantizer: Quantizer) -> Array:
    """LSQ's first scale from the mean magnitude."""
    scale = 2 * mean * jax.lax.rsqrt(quantizer.grid.max_value)
    return jnp.where(quantizer.grid.scaled & (scale > 0), scale, 1)
