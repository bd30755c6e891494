"""Low-precision execution: codes multiplied as int8, int4 or fp8, with their real accumulator.

A scale that is constant along the contraction factors out of it, so a product of codes times the
product of the scales equals the product of the quantized values, up to the rounding of the
accumulator: int32 for integers, float32 for floats. A sum of integers that int32 might not hold
(from 133,000 products of int8 on) is made of shorter ones, added in float32. What does not factor
out, block scales and zero points, or has no dtype of its own, codebooks and wide formats, is
refused with a reason; the fake mode runs everything.

Each operand takes the narrowest dtype that holds all values of its format, so int3 runs as int4
and e2m1 as float8_e4m3fn; two integers of different widths run in the wider. CPUs have no int4
product: there int4 operands run as int8, which gives the same numbers.

The two gradient contractions run natively too, where the policy quantizes gradients and the scale
of the other operand factors out of *their* sums: that of per-tensor activations does, in the
weights' gradient; that of per-channel weights does not, in the activations'. Those that do not
multiply the quantized values as the fake mode does.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qat.formats import Format
from qat.labels import DimensionNumbers, Labels, labels_of, numbers_of
from qat.policy import Policy
from qat.quantization import code_values, key_for
from qat.quantizer import Quantizer

_LARGEST_INT32 = 2**31 - 1
_DTYPES = (jnp.int4, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)


def require_native(policy: Policy) -> None:
    """Raises ValueError, with the reason, where a policy's product cannot run natively."""
    for operand in ("activations", "weights"):
        quantizer: Quantizer | None = getattr(policy, operand)
        reason = "are not quantized" if quantizer is None else _refusal(quantizer)
        if reason is not None:
            raise ValueError(
                f"mode 'native' cannot run this policy: its {operand} {reason}; use mode 'fake'"
            )
    if not can_multiply(policy.activations, policy.weights):
        raise ValueError(
            f"mode 'native' cannot run this policy: no hardware multiplies {policy.activations} "
            f"activations by {policy.weights} weights; both must be integers or both floats"
        )


@dataclasses.dataclass(frozen=True)
class Coded:
    """A quantized operand as it is multiplied.

    Attributes:
        values: float32 values of the format's grid.
        scale: float32, of the same rank, 1 along every axis that shares a scale.
        dtype: in which the values are multiplied.
        largest: magnitude of the format.
    """

    values: jax.Array
    scale: jax.Array
    dtype: Any
    largest: float

    def factors_out_of(self, axes: Sequence[int]) -> bool:
        """Whether the scale is constant along these axes."""
        return all(self.scale.shape[axis] == 1 for axis in axes)


def coded(
    x: jax.Array, quantizer: Quantizer, axes: tuple[int, ...], key: jax.Array | None
) -> Coded:
    """Quantizes an operand along its contraction axes, for a native product."""
    values, scale = code_values(x, quantizer, axes, key)
    if quantizer.scale in ("fixed", "learned"):  # others are not a number where x is not
        lost = jnp.any(jnp.isnan(values), axis=axes, keepdims=True)
        scale = jnp.where(lost, jnp.nan, scale)
    fmt = quantizer.host_format()
    return Coded(values, scale, _native_dtype(fmt), max(fmt.max_value, -fmt.lowest))


def native_product(lhs: Coded, rhs: Coded, numbers: DimensionNumbers) -> jax.Array:
    """The product of two operands whose scales factor out, float32.

    Args:
        lhs: as of `coded`.
        rhs: as of `coded`.
        numbers: as of `jax.lax.dot_general`.
    """
    contracted, batch = numbers
    product = _product_of_parts(lhs, rhs, numbers)
    lhs_scale = _result_scale(lhs.scale, contracted[0], batch[0])
    rhs_scale = _result_scale(rhs.scale, contracted[1], batch[1])
    return product * _broadcast_product(lhs_scale, rhs_scale, len(batch[0]))


def native_dot(
    numbers: DimensionNumbers, policy: Policy, key: jax.Array | None, lhs: jax.Array, rhs: jax.Array
) -> jax.Array:
    """The product of activations and weights under a policy that `require_native` accepts."""
    assert policy.activations is not None and policy.weights is not None
    lhs_axes, rhs_axes = (tuple(axes) for axes in numbers[0])
    lhs_coded = coded(lhs, policy.activations, lhs_axes, key_for(policy.activations, key, 0))
    rhs_coded = coded(rhs, policy.weights, rhs_axes, key_for(policy.weights, key, 1))
    return native_product(lhs_coded, rhs_coded, numbers)


def native_gradients(
    numbers: DimensionNumbers,
    policy: Policy,
    key: jax.Array | None,
    lhs: jax.Array,
    rhs: jax.Array,
    g: jax.Array,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Gradients of both quantized operands, float32; None where a scale does not factor out.

    Args:
        numbers: of the forward product.
        policy: one that `require_native` accepts, with gradients.
        key: for stochastic rounding.
        lhs: activations.
        rhs: weights.
        g: gradient of the product.
    """
    lhs_labels, rhs_labels, out = labels_of(numbers, lhs.ndim, rhs.ndim)

    def coded_operand(x: jax.Array, place: int) -> Coded | None:
        quantizer = (policy.activations, policy.weights)[place]
        if quantizer is None or not can_multiply(policy.gradients, quantizer):
            return None
        return coded(x, quantizer, tuple(numbers[0][place]), key_for(quantizer, key, place))

    def gradient(other: Coded | None, other_labels: Labels, own_labels: Labels, place: int) -> Any:
        (contracted, batch), order = numbers_of(out, other_labels, own_labels)
        if other is None or not other.factors_out_of(contracted[1]) or policy.gradients is None:
            return None
        g_key = key_for(policy.gradients, key, place)
        g_coded = coded(g, policy.gradients, tuple(contracted[0]), g_key)
        return jnp.transpose(native_product(g_coded, other, (contracted, batch)), order)

    return (
        gradient(coded_operand(rhs, 1), rhs_labels, lhs_labels, 2),
        gradient(coded_operand(lhs, 0), lhs_labels, rhs_labels, 3),
    )


def can_multiply(first: Quantizer | None, second: Quantizer | None) -> bool:
    """Whether two operands have dtypes that hardware multiplies."""
    if first is None or second is None or _refusal(first) or _refusal(second):
        return False
    kinds = {jnp.issubdtype(_native_dtype(q.host_format()), jnp.integer) for q in (first, second)}
    return len(kinds) == 1


@functools.cache
def _native_dtype(fmt: Format) -> Any:
    """The narrowest dtype whose values include the format's; None where there is none."""
    if not fmt.scaled or fmt.bits > 8:
        return None
    values = fmt.values
    return next((dtype for dtype in _DTYPES if np.isin(values, _values_of(dtype)).all()), None)


@functools.cache
def _values_of(dtype: Any) -> np.ndarray:
    """All finite values of an integer or float dtype of at most 8 bits."""
    if jnp.issubdtype(dtype, jnp.integer):
        return np.arange(int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max) + 1)
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    finite: np.ndarray = values[np.isfinite(values)]
    return finite


def _refusal(quantizer: Quantizer) -> str | None:
    """Why an operand cannot run natively, or None."""
    if not isinstance(quantizer.format, Format):
        return "have a traced format, and a dtype cannot be traced"
    if quantizer.granularity == "block":
        return f"are scaled by blocks ({quantizer}), inside the contraction"
    if quantizer.zero_point:
        return f"have a zero point ({quantizer}), which does not factor out"
    if _native_dtype(quantizer.format) is None:
        return f"are in {quantizer.format}, which fits none of int4, int8, e4m3 and e5m2"
    return None


def _product_of_parts(lhs: Coded, rhs: Coded, numbers: DimensionNumbers) -> jax.Array:
    """Product of the values, where int32 cannot hold it the sum of two of half as many terms.

    The last contracted axis that can be is halved: the first are batches, which devices share.
    """
    lhs_axes, rhs_axes = numbers[0]
    lengths = [lhs.values.shape[axis] for axis in lhs_axes]
    largest_sum = math.prod(lengths) * lhs.largest * rhs.largest
    if jnp.issubdtype(lhs.dtype, jnp.floating) or largest_sum <= _LARGEST_INT32:
        return _multiply(lhs, rhs, numbers)
    last = max(i for i, length in enumerate(lengths) if length > 1)
    halves = zip(_halves(lhs, lhs_axes[last]), _halves(rhs, rhs_axes[last]), strict=True)
    first, second = (_product_of_parts(*half, numbers) for half in halves)
    return first + second


def _halves(x: Coded, axis: int) -> list[Coded]:
    """Both halves of the values along an axis."""
    parts = jnp.split(x.values, [x.values.shape[axis] // 2], axis)
    return [dataclasses.replace(x, values=part) for part in parts]


def _multiply(lhs: Coded, rhs: Coded, numbers: DimensionNumbers) -> jax.Array:
    """Product of the values in their native dtypes."""

    def in_dtypes(
        lhs_dtype: Any, rhs_dtype: Any, accumulator: Any, *values: jax.Array
    ) -> jax.Array:
        first, second = values[0].astype(lhs_dtype), values[1].astype(rhs_dtype)
        product = jax.lax.dot_general(first, second, numbers, preferred_element_type=accumulator)
        return product.astype(jnp.float32)

    both = lhs.values, rhs.values
    if jnp.issubdtype(lhs.dtype, jnp.floating):
        return in_dtypes(lhs.dtype, rhs.dtype, jnp.float32, *both)
    as_int8 = functools.partial(in_dtypes, jnp.int8, jnp.int8, jnp.int32)
    if (lhs.dtype, rhs.dtype) != (jnp.int4, jnp.int4):
        return as_int8(*both)
    as_int4 = functools.partial(in_dtypes, jnp.int4, jnp.int4, jnp.int32)
    product: jax.Array = jax.lax.platform_dependent(*both, cpu=as_int8, default=as_int4)
    return product


def _result_scale(scale: jax.Array, contracted: Sequence[int], batch: Sequence[int]) -> jax.Array:
    """A scale that is constant along the contraction, with the axes (batch, free) of the result."""
    free = [a for a in range(scale.ndim) if a not in contracted and a not in batch]
    moved = jnp.transpose(scale, (*batch, *free, *contracted))
    return moved.reshape(moved.shape[: len(batch) + len(free)])


def _broadcast_product(lhs: jax.Array, rhs: jax.Array, batch: int) -> jax.Array:
    """Product of scales (batch, lhs free) and (batch, rhs free), over the axes of the result."""
    lhs_free, rhs_free = lhs.ndim - batch, rhs.ndim - batch
    lhs = lhs.reshape(lhs.shape + (1,) * rhs_free)
    rhs = rhs.reshape(rhs.shape[:batch] + (1,) * lhs_free + rhs.shape[batch:])
    return lhs * rhs
