"""What goes into the slots of Flax's layers: modules that hold a policy and contract by it.

The formats live in the module's state as arrays, so `flax.nnx.split` yields them as data beside
the parameters, and other numbers run in the same compiled program. Beside them a slot holds what
its quantizers need: a learned scale (a parameter, trained like any other), a range seen in
calibration, a noise key. None of this is mutated while a model trains: keys and policies are put
in from outside, so a model may be split, scanned and differentiated as pure functions;
only an `Observation` that somebody put into a slot follows its calls.
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.attention import dot_product_attention_weights

from qat.calibration import first_value, needs_value, with_value
from qat.contractions import layer_scope, quantized_scope
from qat.convolution import conv_general_dilated
from qat.dot_general import dot_general
from qat.einsum import einsum_by
from qat.groups import Axis
from qat.labels import DimensionNumbers
from qat.nnx.observation import Observation
from qat.policy import Policy
from qat.quantization import fake_quant
from qat.quantizer import Quantizer
from qat.rotation import Rotation
from qat.transforms import InputTransform

PROJECTION = ("weights", "activations", "gradients")
ATTENTION = ("queries", "kv_cache", "probabilities")


class PolicyState(nnx.Variable[Policy]):
    """A traced policy in a model's state; neither trained nor checkpointed."""


class NoiseKey(nnx.Variable[Any]):
    """Words of a random key for stochastic rounding, set anew for every step by `set_key`."""


class StackMark(nnx.Variable[jax.Array]):
    """An array in place of a native policy's, which has none, to show a stack of layers by."""


class LearnedScale(nnx.Param[jax.Array]):
    """A scale that is trained (LSQ)."""


class StaticRange(nnx.Variable[jax.Array]):
    """The largest magnitude seen in calibration, or smallest and largest value; NaN before."""


class TransformState(nnx.Variable[InputTransform]):
    """What happens to a layer's inputs before its contraction; neither trained nor a parameter."""


class Slot(nnx.Module):
    """The policy of one place in a model, and the numbers that its quantizers need.

    Args:
        policy: of which the operands of this place are kept.
        operands: their names.
        kernel: the weights, (*stack, …), for learned scales; None where there are none.
        axis: contraction axes of the weights, without the stack.
        stack: leading axes of a stack of layers that is scanned.
    """

    def __init__(
        self,
        policy: Policy | str,
        operands: tuple[str, ...],
        kernel: jax.Array | None = None,
        axis: Axis = 0,
        stack: tuple[int, ...] = (),
    ):
        policy = (Policy.of(policy) or Policy()).restricted(operands)
        self.path: str | None = None
        self.operands = operands
        self.policy = PolicyState(stacked(policy.traced(), stack))
        self.key = NoiseKey(None)
        bare = not jax.tree.leaves(self.policy.get_value())
        self.mark = nnx.data(StackMark(stacked(jnp.zeros(1, jnp.bool_), stack)) if bare else None)
        for operand in operands:
            quantizer = getattr(policy, operand)
            held = _held_value(operand, quantizer, kernel, axis, stack)
            setattr(self, f"{operand}_value", nnx.data(held))

    def quantizer(self, operand: str) -> Quantizer | None:
        """The quantizer of an operand, with its number filled in."""
        quantizer: Quantizer | None = getattr(self.policy.get_value(), operand)
        held = getattr(self, f"{operand}_value")
        if quantizer is None or held is None:
            return quantizer
        return with_value(quantizer, held.get_value())

    def filled_policy(self) -> Policy:
        """The policy of this call."""
        filled: dict[str, Any] = {name: self.quantizer(name) for name in self.operands}
        return Policy(**filled, mode=self.policy.get_value().mode)

    def observe(self, operand: str, x: jax.Array, axis: Axis) -> None:
        """Lets the observations of an operand follow it: its own number, and what was added."""
        for name in (f"{operand}_value", f"{operand}_seen"):
            seen = getattr(self, name, None)
            if isinstance(seen, Observation):
                key = self.key.get_value()
                seen.set_value(seen.follow(seen.get_value(), x, self.quantizer(operand), axis, key))

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Marks what is traced within as quantized, in reports and profiles."""
        return _marks(self.path, self.policy.get_value().structure)


class DotGeneral(Slot):
    """A quantized `dot_general` for the slot of that name in any Flax NNX layer."""

    def __init__(self, policy: Policy | str, *args: Any, **kwargs: Any):
        dot_general(policy)  # refuses now what it would refuse later
        super().__init__(policy, PROJECTION, *args, **kwargs)
        self.transform: TransformState | None = nnx.data(None)

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: DimensionNumbers,
        *args: Any,
        **kwargs: Any,
    ) -> jax.Array:
        """Contracts as `jax.lax.dot_general` does, under the policy in the state."""
        (lhs_axes, rhs_axes), _ = dimension_numbers
        transform = InputTransform() if self.transform is None else self.transform.get_value()
        lhs = transform.inputs(lhs, tuple(lhs_axes))
        self.observe("activations", lhs, tuple(lhs_axes))
        self.observe("weights", rhs, tuple(rhs_axes))
        key = self.key.get_value()
        lhs, policy = transform.around_exact(lhs, tuple(lhs_axes), self.filled_policy(), key)
        with self.scope():
            dot = dot_general(policy, key)
            return dot(lhs, rhs, dimension_numbers, *args, **kwargs)


class EinsumOp(DotGeneral):
    """A quantized two-operand `einsum` for the `einsum_op` slot of `flax.nnx.Einsum`."""

    def __call__(self, subscripts: str, lhs: jax.Array, rhs: jax.Array, **kwargs: Any) -> jax.Array:  # type: ignore[override]
        """Contracts as `jnp.einsum` does, under the policy in the state."""
        return einsum_by(super().__call__)(subscripts, lhs, rhs, **kwargs)


class Convolution(Slot):
    """A quantized convolution for the slot of `flax.nnx.Conv`: batch first, channels last."""

    def __init__(self, policy: Policy | str, *args: Any, **kwargs: Any):
        conv_general_dilated(policy)  # refuses now what it would refuse later
        super().__init__(policy, PROJECTION, *args, **kwargs)

    def __call__(self, lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Convolves as `jax.lax.conv_general_dilated` does, under the policy in the state."""
        self.observe("activations", lhs, tuple(range(1, lhs.ndim)))
        self.observe("weights", rhs, tuple(range(rhs.ndim - 1)))
        with self.scope():
            convolve = conv_general_dilated(self.filled_policy(), self.key.get_value())
            product: jax.Array = convolve(lhs, rhs, *args, **kwargs)
            return product


class FakeQuant(Slot):
    """Fake quantization of an activation (..., features) along its last axis.

    Args:
        policy: one of whose operands it applies.
        operand: "kv_cache" for keys or values as they enter an attention cache, "queries" or
            "probabilities" for the other operands of attention.
        stack: leading axes of a stack of layers that is scanned.
    """

    def __init__(
        self, policy: Policy | str, operand: str = "kv_cache", stack: tuple[int, ...] = ()
    ):
        super().__init__(policy, (operand,), stack=stack)
        self.rotation_seed: int | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Quantizes, between a rotation and its inverse if it has one; shape and dtype stay."""
        if self.rotation_seed is None:
            return self._quantized(x)
        rotation = Rotation.of(x.shape[-1], self.rotation_seed)
        return rotation.inverse(self._quantized(rotation.apply(x, -1)), -1)

    def _quantized(self, x: jax.Array) -> jax.Array:
        (operand,) = self.operands
        self.observe(operand, x, -1)
        quantizer = self.quantizer(operand)  # with what was just observed
        return x if quantizer is None else fake_quant(x, quantizer, -1, self.key.get_value())


class Attention(nnx.Module):
    """Attention with quantized operands, for the `attention_fn` slot of Flax's NNX attention."""

    def __init__(self, policy: Policy | str, stack: tuple[int, ...] = ()):
        policy = Policy.of(policy) or Policy()
        self.path: str | None = None
        self.structure = policy.restricted(ATTENTION).structure
        self.queries = nnx.data(_optional(policy, "queries", stack))
        self.keys = nnx.data(_optional(policy, "kv_cache", stack))
        self.values = nnx.data(_optional(policy, "kv_cache", stack))
        self.probabilities = nnx.data(_optional(policy, "probabilities", stack))

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """See `flax.nnx.dot_product_attention`, whose arguments it takes."""
        with _marks(self.path, self.structure):
            query, key, value = (
                x if quantize is None else quantize(x)
                for x, quantize in ((query, self.queries), (key, self.keys), (value, self.values))
            )
            if self.probabilities is None:
                mixed: jax.Array = nnx.dot_product_attention(
                    query, key, value, bias, mask, **kwargs
                )
                return mixed
            weights = dot_product_attention_weights(query, key, bias, mask, **kwargs)
            weights = self.probabilities(weights)
            value = jnp.repeat(value, weights.shape[-3] // value.shape[-2], axis=-2)
            precision = kwargs.get("precision")
            return jnp.einsum("...hqk,...khd->...qhd", weights, value, precision=precision)


def stacked(tree: Any, stack: tuple[int, ...]) -> Any:
    """Every array of a tree, repeated along the leading axes of a stack of layers."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, stack + leaf.shape), tree)


def _marks(path: str | None, structure: str) -> contextlib.AbstractContextManager[Any]:
    """Scopes of a layer, where its path is known, and of a quantized contraction."""
    marks = contextlib.ExitStack()
    if path is not None:
        marks.enter_context(layer_scope(path))
    marks.enter_context(quantized_scope(structure))
    return marks


def _optional(policy: Policy, operand: str, stack: tuple[int, ...]) -> FakeQuant | None:
    return None if getattr(policy, operand) is None else FakeQuant(policy, operand, stack)


def _held_value(
    operand: str,
    quantizer: Quantizer | None,
    kernel: jax.Array | None,
    axis: Axis,
    stack: tuple[int, ...],
) -> nnx.Variable[Any] | None:
    """The variable for a number that the quantizer does not bring along."""
    if quantizer is None or not needs_value(quantizer):
        return None
    first = functools.partial(first_value, operand, quantizer, axis=axis)
    for _ in stack if kernel is not None else ():
        first = jax.vmap(first)
    value = first(kernel) if kernel is not None else stacked(first(), stack)
    return (LearnedScale if quantizer.scale == "learned" else StaticRange)(value)
