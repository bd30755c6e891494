"""The one contraction that everything quantized passes through.

Operands are fake-quantized along their contraction axes and multiplied by `jax.lax.dot_general`
in the dtype they came in. Autodiff through the straight-through quantizers gives the backward
pass, whose operands are the quantized values of the forward pass.

Batches of activations are flattened to a matrix around a dense projection: XLA on CPU multiplies
and, above all, transposes matrices faster than higher-rank arrays. What this does on TPU and GPU
has not been measured.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike

from qat.policy import Policy
from qat.quantizer import fake_quant

DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


@runtime_checkable
class DotGeneral(Protocol):
    """The signature of `jax.lax.dot_general`."""

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: DimensionNumbers,
        precision: Any = None,
        preferred_element_type: DTypeLike | None = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Contracts two arrays."""
        ...


def dot_general(policy: Policy | None) -> DotGeneral:
    """A drop-in for `jax.lax.dot_general` that quantizes its operands.

    The left-hand side is the activations, the right-hand side the weights, as in Flax layers.

    Args:
        policy: named or traced formats; None multiplies what it is given.

    Returns:
        A pure function; it raises ValueError where a quantizer does not fit its operand. Without
        a policy it is always the same one, so that models built with it have equal graphs.
    """
    return _plain_dot_general if policy is None else _quantized_dot_general(policy)


def _quantized_dot_general(policy: Policy) -> DotGeneral:
    """The contraction under a policy."""

    def contract(
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: DimensionNumbers,
        *args: Any,
        **kwargs: Any,
    ) -> jax.Array:
        (lhs_axes, rhs_axes), _ = dimension_numbers
        if policy.activations is not None:
            lhs = fake_quant(lhs, policy.activations, axis=lhs_axes)
        if policy.weights is not None:
            rhs = fake_quant(rhs, policy.weights, axis=rhs_axes)
        return _plain_dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)

    return contract


def _plain_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DimensionNumbers,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.lax.dot_general`, with the operands of a dense projection flattened to matrices."""
    (lhs_axes, rhs_axes), (lhs_batch, _) = dimension_numbers
    contracted = len(lhs_axes)
    dense = (
        out_sharding is None
        and not lhs_batch
        and tuple(lhs_axes) == tuple(range(lhs.ndim - contracted, lhs.ndim))
        and tuple(rhs_axes) == tuple(range(contracted))
        and lhs.shape[lhs.ndim - contracted :] == rhs.shape[:contracted]  # else an error is due
    )
    if not dense:
        return jax.lax.dot_general(
            lhs,
            rhs,
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )
    rows, columns = lhs.shape[: lhs.ndim - contracted], rhs.shape[contracted:]
    depth = math.prod(rhs.shape[:contracted])
    product = jax.lax.dot_general(
        lhs.reshape(math.prod(rows), depth),
        rhs.reshape(depth, math.prod(columns)),
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return product.reshape(*rows, *columns)
