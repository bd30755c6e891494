"""A mixture of experts: every token passes through a few of several gated layers.

A router gives every token a probability for each expert. With one expert a token its update is the
expert's times that probability, as in Switch (Fedus et al., arXiv 2101.03961); with more it is the
mean by their probabilities, renormalised, as in GShard (Lepikhin et al., arXiv 2006.16668).

Shapes must not depend on the data, so an expert has a fixed number of slots for the tokens of a
sequence, its capacity. Slots are given in the order of the text and a token that comes too late
gets no update from that expert. So nothing depends on later tokens; giving all first choices before
all second ones, as GShard does, would let a later token take an earlier one's slot. A decoder that
reads token by token never drops any, a prompt is dropped from as training is: the two agree where
the capacity is large enough. Tokens enter and leave slots by products with one-hot tensors, which
any mesh can split by sequences; their cost grows with the square of a sequence's length.

The router computes in float32 and is never quantized. The experts are one gated layer, stacked and
mapped: they have the paths of a dense block's, and so its rules, each with its own scales and
noise. Slots that stay empty hold zeros, which scales that average over a tensor see.

Shapes: B sequences, T tokens, D width, E experts, C slots of an expert for each sequence.
"""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

import qat.nnx
from models.mlp import GatedMlp
from qat.training.sharding import constrain

# A tenth of the usual variance, as in Switch: at first the experts are about equally likely.
_INITIAL = nnx.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")
_EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Routing:
    """Where tokens go.

    Attributes:
        dispatch_BTEC: 1 where a token is in a slot of an expert, else 0; float32.
        combine_BTEC: by how much it counts what comes out of there, float32.
        balance: E Σ f P of the share f of the choices that fell on an expert and its mean
            probability P, over all tokens: 1 if all are as likely, up to E.
    """

    dispatch_BTEC: Float[Array, "B T E C"]
    combine_BTEC: Float[Array, "B T E C"]
    balance: Float[Array, ""]


class Router(nnx.Module):
    """Chooses the experts of every token.

    Args:
        width: D.
        experts: E.
        per_token: how many each token passes through.
        capacity_factor: slots for every token that an expert has if all have as many.
        rngs: for the initial parameters.
    """

    def __init__(
        self, width: int, experts: int, per_token: int, capacity_factor: float, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(_INITIAL(rngs.params(), (width, experts)))
        self.per_token = per_token
        self.capacity_factor = capacity_factor

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Routing:
        """The routing of normed inputs."""
        batch, tokens, width = x_BTD.shape
        experts = self.kernel.shape[1]
        x_MD = x_BTD.astype(jnp.float32).reshape(-1, width)
        logits_ME = jnp.dot(x_MD, self.kernel[...], precision=_EXACT)
        probabilities_BTE = jax.nn.softmax(logits_ME).reshape(batch, tokens, experts)
        chosen_BTE = _most_likely(probabilities_BTE, self.per_token)
        gates_BTE = jnp.where(chosen_BTE, probabilities_BTE, 0)
        if self.per_token > 1:
            gates_BTE = gates_BTE / gates_BTE.sum(axis=-1, keepdims=True)
        slots = capacity(tokens, experts, self.per_token, self.capacity_factor)
        dispatch_BTEC = _in_slots(chosen_BTE, slots)
        combine_BTEC = gates_BTE[..., None] * dispatch_BTEC
        share_E = chosen_BTE.astype(jnp.float32).mean(axis=(0, 1)) / self.per_token
        balance = experts * jnp.sum(share_E * probabilities_BTE.mean(axis=(0, 1)))
        return Routing(dispatch_BTEC, combine_BTEC, balance)


def stacked(experts: int, make: Callable[[nnx.Rngs], GatedMlp], rngs: nnx.Rngs) -> GatedMlp:
    """Gated layers of one shape as one module, whose every array has a leading axis E."""
    mapped: Any = nnx.split_rngs(splits=experts)(nnx.vmap(make))
    layers: GatedMlp = mapped(rngs)
    return layers


def mixture(
    experts: GatedMlp, routing: Routing, x_BTD: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """The update of every token by its experts; zero of a token that found no slot.

    Args:
        experts: `stacked`.
        routing: of the tokens.
        x_BTD: normed inputs.
    """
    graph, states = nnx.split(experts)

    def through(state: Any, x_BCD: Array) -> tuple[Array, Any]:
        expert = nnx.merge(graph, state)
        return expert(x_BCD), nnx.state(expert, qat.nnx.Observation)

    dispatch_BTEC = routing.dispatch_BTEC.astype(x_BTD.dtype)
    x_EBCD = jnp.einsum("btec,btd->ebcd", dispatch_BTEC, x_BTD, precision=_EXACT)
    x_EBCD = constrain(x_EBCD, None, "batch", None, None)
    y_EBCD, seen = jax.vmap(through)(states, x_EBCD)
    nnx.update(experts, seen)
    y_EBCD = constrain(y_EBCD, None, "batch", None, None)
    combine_BTEC = routing.combine_BTEC.astype(y_EBCD.dtype)
    return jnp.einsum("btec,ebcd->btd", combine_BTEC, y_EBCD, precision=_EXACT)


def capacity(tokens: int, experts: int, per_token: int, factor: float) -> int:
    """C, slots of an expert for a sequence of this many tokens; at least one, at most all.

    The factor counts as it is written: 1.1 · 20 tokens / 2 experts are 11 slots, though in binary
    the product lies above 22.
    """
    even = Fraction(str(factor)) * per_token * tokens / experts
    return min(max(1, math.ceil(even)), tokens)


def _most_likely(probabilities_BTE: Array, count: int) -> Array:
    """Whether an expert is among a token's first `count`; of equal ones the first comes first."""
    experts_11E = jnp.arange(probabilities_BTE.shape[-1])[None, None]
    chosen_BTE = jnp.zeros(probabilities_BTE.shape, jnp.bool_)
    for _ in range(count):
        left_BTE = jnp.where(chosen_BTE, -1, probabilities_BTE)
        best_BT1 = jnp.argmax(left_BTE, axis=-1, keepdims=True)
        chosen_BTE |= best_BT1 == experts_11E
    return chosen_BTE


def _in_slots(chosen_BTE: Array, slots: int) -> Array:
    """Which slot of each chosen expert is whose: as many are before it as chose it before."""
    count_BTE = chosen_BTE.astype(jnp.int32)
    before_BTE1 = (jnp.cumsum(count_BTE, axis=1) - count_BTE)[..., None]
    slots_111C = jnp.arange(slots)[None, None, None]
    taken_BTEC = chosen_BTE[..., None] & (before_BTE1 == slots_111C)
    return constrain(taken_BTEC.astype(jnp.float32), "batch", None, None, None)
