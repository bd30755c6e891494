"""The one contraction that everything quantized passes through.

Operands are fake-quantized along their contraction axes and multiplied by `jax.lax.dot_general`
in the dtype they came in. Autodiff through the straight-through quantizers gives the backward
pass, whose operands are the quantized values of the forward pass; where the policy quantizes
gradients too, the gradient that arrives is quantized twice, once along the axes contracted with
the weights and once along those contracted with the activations. What is kept for the backward
pass are the quantized operands, in the dtype and size of the operands.

Batches of activations are flattened to a matrix around a dense projection: XLA on CPU multiplies
and, above all, transposes matrices faster than higher-rank arrays. What this does on TPU and GPU
has not been measured.
"""

import dataclasses
import functools
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qat.labels import DimensionNumbers
from qat.native import native_dot, native_gradients, require_native
from qat.policy import Policy
from qat.quantization import fake_quant, key_for
from qat.quantizer import Quantizer

Axes = tuple[int, ...]


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


def dot_general(policy: Policy | str | None, key: jax.Array | None = None) -> DotGeneral:
    """A drop-in for `jax.lax.dot_general` that quantizes its operands.

    The left-hand side is the activations, the right-hand side the weights, as in Flax layers.

    Args:
        policy: with named or traced formats, or its spelling; None multiplies what it is given.
        key: JAX random key; needed where a quantizer rounds stochastically. Use a new one for
            every step and layer.

    Returns:
        A pure function; it raises ValueError where a quantizer does not fit its operand. Without
        a policy it is always the same one, so that models built with it have equal graphs.

    Raises:
        ValueError: not a policy, or its mode is native and its formats cannot be multiplied so.
    """
    policy = Policy.of(policy)
    if policy is None:
        return plain_dot_general
    if policy.mode == "native":
        require_native(policy)

    def contract_by_policy(
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: DimensionNumbers,
        precision: Any = None,
        preferred_element_type: DTypeLike | None = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        numbers = _as_tuples(dimension_numbers)
        dot = Dot(numbers, precision, preferred_element_type, out_sharding)
        if policy.mode == "native":
            return _native(dot, policy, key, lhs, rhs)
        return contract(dot, policy, key, lhs, rhs)

    return contract_by_policy


@runtime_checkable
class Contraction(Protocol):
    """A bilinear operation whose operands can be quantized; hashable, with static parameters."""

    def __call__(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """The operation itself."""
        ...

    def axes(self, lhs: jax.Array, rhs: jax.Array) -> tuple[Axes, Axes]:
        """Contracted axes of both operands."""
        ...

    def gradient_axes(self, lhs: jax.Array, rhs: jax.Array) -> tuple[Axes, Axes]:
        """Axes of the result that are contracted for the gradient of lhs, and of rhs."""
        ...


@dataclasses.dataclass(frozen=True)
class Dot:
    """`jax.lax.dot_general` with its static arguments."""

    dimension_numbers: DimensionNumbers
    precision: Any = None
    preferred_element_type: DTypeLike | None = None
    out_sharding: Any = None

    def __call__(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """The product."""
        return plain_dot_general(
            lhs,
            rhs,
            self.dimension_numbers,
            self.precision,
            self.preferred_element_type,
            out_sharding=self.out_sharding,
        )

    def axes(self, lhs: jax.Array, rhs: jax.Array) -> tuple[Axes, Axes]:
        """Contracted axes of both operands."""
        (lhs_axes, rhs_axes), _ = self.dimension_numbers
        return tuple(lhs_axes), tuple(rhs_axes)

    def gradient_axes(self, lhs: jax.Array, rhs: jax.Array) -> tuple[Axes, Axes]:
        """The result has batch axes, then those of lhs alone, then those of rhs alone."""
        (contracted, _), (batch, _) = self.dimension_numbers
        rank = lhs.ndim + rhs.ndim - 2 * len(contracted) - len(batch)
        lhs_alone = lhs.ndim - len(contracted)
        return tuple(range(lhs_alone, rank)), tuple(range(len(batch), lhs_alone))


def contract(
    operation: Contraction,
    policy: Policy,
    key: jax.Array | None,
    lhs: jax.Array,
    rhs: jax.Array,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Runs an operation in fake mode.

    Args:
        operation: what multiplies.
        policy: of its operands.
        key: for stochastic rounding.
        lhs: the activations.
        rhs: the weights.
        mask: 0 where weights stay zero though their format may have none; else 1.
    """
    lhs_axes, rhs_axes = operation.axes(lhs, rhs)
    lhs = _quantized(lhs, policy.activations, lhs_axes, key, 0)
    rhs = _quantized(rhs, policy.weights, rhs_axes, key, 1)
    rhs = rhs if mask is None else jnp.where(mask != 0, rhs, 0)
    if policy.gradients is None:
        return operation(lhs, rhs)
    return _with_quantized_gradients(operation, policy.gradients, key, lhs, rhs)


def _quantized(
    x: jax.Array, quantizer: Quantizer | None, axes: Axes, key: jax.Array | None, place: int
) -> jax.Array:
    """One operand; each place in a layer has noise of its own."""
    if quantizer is None:
        return x
    return fake_quant(x, quantizer, axes, key_for(quantizer, key, place))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_quantized_gradients(
    operation: Contraction,
    gradients: Quantizer,
    key: jax.Array | None,
    lhs: jax.Array,
    rhs: jax.Array,
) -> jax.Array:
    """The operation, whose backward pass quantizes what arrives."""
    return operation(lhs, rhs)


def _with_quantized_gradients_fwd(operation: Contraction, *residuals: Any) -> tuple[Any, Any]:
    _, _, lhs, rhs = residuals
    return operation(lhs, rhs), residuals


def _with_quantized_gradients_bwd(operation: Contraction, residuals: Any, g: jax.Array) -> Any:
    gradients, key, lhs, rhs = residuals
    dlhs, drhs = _gradients(operation, gradients, key, lhs, rhs, g)
    return jax.tree.map(jnp.zeros_like, gradients), None, dlhs, drhs


_with_quantized_gradients.defvjp(_with_quantized_gradients_fwd, _with_quantized_gradients_bwd)


def _gradients(
    operation: Contraction,
    gradients: Quantizer | None,
    key: jax.Array | None,
    lhs: jax.Array,
    rhs: jax.Array,
    g: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of both operands, each from what arrives, quantized along what it contracts."""
    for_lhs, for_rhs = operation.gradient_axes(lhs, rhs)
    transposed_in_lhs = jax.linear_transpose(lambda lhs: operation(lhs, rhs), lhs)
    transposed_in_rhs = jax.linear_transpose(lambda rhs: operation(lhs, rhs), rhs)
    (dlhs,) = transposed_in_lhs(_quantized(g, gradients, for_lhs, key, 2))
    (drhs,) = transposed_in_rhs(_quantized(g, gradients, for_rhs, key, 3))
    return dlhs, drhs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _native(
    dot: Dot, policy: Policy, key: jax.Array | None, lhs: jax.Array, rhs: jax.Array
) -> jax.Array:
    """The product of codes; what is kept for the backward pass are the operands themselves."""
    product = native_dot(dot.dimension_numbers, policy, key, lhs, rhs)
    return product.astype(dot.preferred_element_type or jnp.result_type(lhs, rhs))


def _native_fwd(dot: Dot, *residuals: Any) -> tuple[Any, Any]:
    return _native(dot, *residuals), residuals


def _native_bwd(dot: Dot, residuals: Any, g: jax.Array) -> Any:
    """As in fake mode, but each gradient as a product of codes where its operands allow it."""
    policy, key, lhs, rhs = residuals
    lhs_axes, rhs_axes = dot.axes(lhs, rhs)
    lhs_quantized, lhs_pullback = jax.vjp(
        lambda q, lhs: _quantized(lhs, q, lhs_axes, key, 0), policy.activations, lhs
    )
    rhs_quantized, rhs_pullback = jax.vjp(
        lambda q, rhs: _quantized(rhs, q, rhs_axes, key, 1), policy.weights, rhs
    )
    dlhs, drhs = _gradients(dot, policy.gradients, key, lhs_quantized, rhs_quantized, g)
    if policy.gradients is not None:
        native = native_gradients(dot.dimension_numbers, policy, key, lhs, rhs, g)
        dlhs, drhs = (
            fake if product is None else product.astype(fake.dtype)
            for fake, product in zip((dlhs, drhs), native, strict=True)
        )
    dactivations, dlhs = lhs_pullback(dlhs)
    dweights, drhs = rhs_pullback(drhs)
    dpolicy = jax.tree.map(jnp.zeros_like, policy)
    dpolicy = dataclasses.replace(dpolicy, activations=dactivations, weights=dweights)
    return dpolicy, None, dlhs, drhs


_native.defvjp(_native_fwd, _native_bwd)


def _as_tuples(numbers: DimensionNumbers) -> DimensionNumbers:
    """Dimension numbers that can be hashed."""
    (lhs_axes, rhs_axes), (lhs_batch, rhs_batch) = numbers
    return (tuple(lhs_axes), tuple(rhs_axes)), (tuple(lhs_batch), tuple(rhs_batch))


def plain_dot_general(
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
