"""The NNX door: Flax layers whose contraction is quantized, with the numbers in their state.

The layers are Flax's own. What makes them low-precision is the object in their `dot_general`
slot: `DotGeneral`, a module that holds a policy as a `PolicyState` variable. Because the formats
live there as arrays, `flax.nnx.split` yields them as data beside the parameters, and `set_policy`
puts other numbers into the same compiled program.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qat.dot_general import dot_general
from qat.policy import Policy, Rules
from qat.quantizer import fake_quant

__all__ = [
    "DotGeneral",
    "Embed",
    "FakeQuant",
    "Linear",
    "LinearGeneral",
    "PolicyState",
    "set_policy",
]


class PolicyState(nnx.Variable[Policy]):
    """A traced policy in a model's state; neither trained nor checkpointed."""


class DotGeneral(nnx.Module):
    """A quantized `dot_general` for the slot of that name in any Flax NNX layer."""

    def __init__(self, policy: Policy):
        self.policy = _policy_state(policy, "weights", "activations")

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Contracts as `jax.lax.dot_general` does, under the policy in the state."""
        return dot_general(self.policy.get_value())(*args, **kwargs)


class FakeQuant(nnx.Module):
    """Fake quantization of keys or values (..., features) as they enter an attention cache."""

    def __init__(self, policy: Policy):
        self.policy = _policy_state(policy, "kv_cache")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Quantizes along the last axis; shape and dtype stay."""
        quantizer = self.policy.get_value().kv_cache
        return x if quantizer is None else fake_quant(x, quantizer, axis=-1)


class Linear(nnx.Linear):
    """`flax.nnx.Linear` under a policy; without one it multiplies unquantized."""

    def __init__(
        self, in_features: int, out_features: int, *, policy: Policy | None = None, **kwargs: Any
    ):
        super().__init__(in_features, out_features, dot_general=_slot(policy), **kwargs)


class LinearGeneral(nnx.LinearGeneral):
    """`flax.nnx.LinearGeneral` under a policy; without one it multiplies unquantized."""

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        policy: Policy | None = None,
        **kwargs: Any,
    ):
        super().__init__(in_features, out_features, dot_general=_slot(policy), **kwargs)


class Embed(nnx.Embed):
    """`flax.nnx.Embed` under a policy: each row is quantized as one channel."""

    def __init__(self, *args: Any, policy: Policy | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.dot_general = nnx.data(None if policy is None else DotGeneral(policy))

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Looks up rows of the table (vocabulary, features) by integer ids."""
        if self.dot_general is None:
            return super().__call__(inputs, out_sharding)
        (table,) = self.promote_dtype((self.embedding[...],), dtype=self.dtype)
        weights = self.dot_general.policy.get_value().weights
        table = table if weights is None else fake_quant(table, weights, axis=-1)
        return jnp.take(table, inputs, axis=0)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Scores (..., features) against every row, giving (..., vocabulary)."""
        if self.dot_general is None:
            return super().attend(query, out_sharding)
        query, embedding = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)
        contraction = (((query.ndim - 1,), (1,)), ((), ()))
        return self.dot_general(query, embedding, contraction, out_sharding=out_sharding)


def set_policy(model: nnx.Module, policy: Policy | Rules) -> None:
    """Puts other numbers into a model's policies; its compiled programs serve on.

    Args:
        model: built or converted with a policy; changed in place.
        policy: one for every quantized layer, or rules by layer path.

    Raises:
        ValueError: nothing in the model is quantized, or a layer's structure (which operands,
            which granularity) differs from that of its new policy.
    """
    states = [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, PolicyState)]
    if not states:
        raise ValueError("set_policy: the model has no quantized layer; build it with a policy")
    rules = policy if isinstance(policy, Rules) else Rules([(".*", policy)])
    new = [_fitted(path, state, rules) for path, state in states]
    for (_, state), value in zip(states, new, strict=True):
        state.set_value(value)


def _slot(policy: Policy | None) -> Any:
    """What goes into the `dot_general` slot of a Flax layer."""
    return dot_general(None) if policy is None else DotGeneral(policy)


def _policy_state(policy: Policy, *operands: str) -> PolicyState:
    """The state of a place that quantizes these operands."""
    return PolicyState(_traced(policy, operands), operands=operands)


def _traced(policy: Policy, operands: Iterable[str]) -> Policy:
    """The traced policy of these operands alone."""
    kept = {operand: getattr(policy, operand) for operand in operands}
    return Policy(**kept).traced()


def _fitted(path: tuple[Any, ...], state: PolicyState, rules: Rules) -> Policy:
    """The new value of one policy state, in the shapes of the old (a scanned stack has axes)."""
    layer = "/".join(str(part) for part in path if part not in ("dot_general", "policy"))
    old: Policy = state.get_value()
    policy = rules.policy_for(layer)
    new = _traced(policy or Policy(), state.get_metadata("operands"))
    if _structure(new) != _structure(old):
        raise ValueError(
            f"set_policy: layer {layer!r} was compiled for {_structure(old)}, "
            f"the new policy has {_structure(new)}"
        )
    fitted: Policy = jax.tree.map(lambda a, b: jnp.broadcast_to(a, b.shape), new, old)
    return fitted


def _structure(policy: Policy) -> str:
    """Operands and granularities in words."""
    quantizers = {f.name: getattr(policy, f.name) for f in dataclasses.fields(Policy)}
    named = [f"{name} per {q.granularity}" for name, q in quantizers.items() if q is not None]
    return ", ".join(named) or "no quantized operand"
