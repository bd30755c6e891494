"""Flax's layers with one field more, the policy; without one they are Flax's, bit for bit."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from qat.contractions import naming_layer
from qat.linen.calls import FLAX_LAYERS, code_of
from qat.policy import Policy


class Dense(nn.Dense):
    """`flax.linen.Dense` under a policy."""

    policy: Policy | str | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Projects (..., in) to (..., features)."""
        return _run(self, nn.Dense.__call__, inputs)


class DenseGeneral(nn.DenseGeneral):
    """`flax.linen.DenseGeneral` under a policy: one scale for each output, over all input axes."""

    policy: Policy | str | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Contracts the axes `axis` and appends those of `features`."""
        return _run(self, nn.DenseGeneral.__call__, inputs)


class Einsum(nn.Einsum):
    """`flax.linen.Einsum` under a policy; the kernel is the weights."""

    policy: Policy | str | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array, einsum_str: str | None = None) -> jax.Array:
        """Contracts inputs and kernel by the equation of the field or of this call."""
        return _run(self, nn.Einsum.__call__, inputs, einsum_str)


class Embed(nn.Embed):
    """`flax.linen.Embed` under a policy: each row of the table is quantized as one channel."""

    policy: Policy | str | None = None

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Looks up rows of the table (num_embeddings, features) by integer ids."""
        return _run(self, nn.Embed.__call__, inputs)

    def attend(self, query: jax.Array) -> jax.Array:
        """Scores (..., features) against every row, giving (..., num_embeddings)."""
        return _run(self, nn.Embed.attend, query)


class Conv(nn.Conv):
    """`flax.linen.Conv` under a policy: one scale for each output feature."""

    policy: Policy | str | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolves (..., *space, in) to (..., *space, features)."""
        return _run(self, nn.Conv.__call__, inputs)


def _run(module: Any, method: Callable[..., Any], *args: Any) -> jax.Array:
    """A method of Flax's layer under the policy of ours."""
    code, layer = code_of(method), FLAX_LAYERS[code_of(method)]
    call = functools.partial(code, module)
    with naming_layer("/".join(module.path)):
        policy = Policy.of(module.policy)
        if policy is None:
            return call(*args)  # type: ignore[no-any-return]
        if objection := layer.objection(module, policy):
            kind = type(module).__name__
            raise ValueError(f"a {kind} with a policy: {objection}; expected only one")
        return layer.run(module, policy, call, *args)  # type: ignore[no-any-return]
