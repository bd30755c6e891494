"""Flax's own dense layers with a policy as one more argument.

What makes them low-precision is the `DotGeneral` in their slot; without a policy they multiply
unquantized.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qat.dot_general import dot_general
from qat.einsum import contracted_axes, einsum
from qat.nnx.slots import DotGeneral, EinsumOp
from qat.policy import Policy
from qat.quantization import fake_quant


class Linear(nnx.Linear):
    """`flax.nnx.Linear` under a policy."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        policy: Policy | str | None = None,
        **kwargs: Any,
    ):
        policy = _only(policy, kwargs, "dot_general", dot_general(None))
        super().__init__(in_features, out_features, **kwargs)
        if policy is not None:
            self.dot_general = nnx.data(DotGeneral(policy, self.kernel[...], 0))


class LinearGeneral(nnx.LinearGeneral):
    """`flax.nnx.LinearGeneral` under a policy: one scale for each output, over all input axes."""

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        policy: Policy | str | None = None,
        **kwargs: Any,
    ):
        policy = _only(policy, kwargs, "dot_general", dot_general(None))
        super().__init__(in_features, out_features, **kwargs)
        if policy is not None:
            axes = tuple(range(np.size(self.in_features)))
            self.dot_general = nnx.data(DotGeneral(policy, self.kernel[...], axes))


class Einsum(nnx.Einsum):
    """`flax.nnx.Einsum` under a policy; the kernel is the weights."""

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        *args: Any,
        policy: Policy | str | None = None,
        **kwargs: Any,
    ):
        policy = _only(policy, kwargs, "einsum_op", einsum(None))
        super().__init__(einsum_str, tuple(kernel_shape), *args, **kwargs)
        if policy is not None:
            axes = contracted_axes(self.einsum_str, len(self.kernel_shape))
            self.einsum_op = nnx.data(EinsumOp(policy, self.kernel[...], axes))


class Embed(nnx.Embed):
    """`flax.nnx.Embed` under a policy: each row of the table is quantized as one channel."""

    dot_general: DotGeneral | None

    def __init__(self, *args: Any, policy: Policy | str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        policy = Policy.of(policy)
        slot = None if policy is None else DotGeneral(policy, self.embedding[...], -1)
        self.dot_general = nnx.data(slot)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Looks up rows of the table (vocabulary, features) by integer ids."""
        if self.dot_general is None or (quantizer := self.dot_general.quantizer("weights")) is None:
            return super().__call__(inputs, out_sharding)
        (table,) = self.promote_dtype((self.embedding[...],), dtype=self.dtype)
        self.dot_general.observe("weights", table, -1)
        with self.dot_general.scope():
            table = fake_quant(table, quantizer, -1, self.dot_general.key.get_value())
            if out_sharding is not None:
                return table.at[inputs].get(out_sharding=out_sharding)
            return jnp.take(table, inputs, axis=0)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Scores (..., features) against every row, giving (..., vocabulary)."""
        if self.dot_general is None:
            return super().attend(query, out_sharding)
        query, embedding = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)
        contraction = (((query.ndim - 1,), (1,)), ((), ()))
        return self.dot_general(query, embedding, contraction, out_sharding=out_sharding)


def _only(
    policy: Policy | str | None, kwargs: dict[str, Any], slot: str, plain: Any
) -> Policy | None:
    """The policy of a layer whose slot, without one, is the caller's or holds what is plain."""
    policy = Policy.of(policy)
    if policy is not None and slot in kwargs:
        raise ValueError(f"a layer with a policy and a {slot} of its own: expected only one")
    kwargs.setdefault(slot, plain)
    return policy
