"""Models compared with their original on text, by one compiled program a structure.

The program takes parameters and formats as data, so all variants that differ in these alone share
it with the original itself. The original runs once over a text; what its head reads is kept in the
host's memory, and a variant's run computes the original's logits from there, a part at a time (see
`qat.analysis.agreement`). So a variant costs one forward pass and one more head, however many there
are.

Shapes: B sequences of a batch, S = T + 1 tokens of a window, D width, R sequences of a text.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

import qat.nnx
from launch.rounding.texts import TextSet
from models.transformer import Transformer, split
from qat.analysis import Agreement, agreement_of_states


class Parts(NamedTuple):
    """A model as a compiled function takes it; see `models.transformer.split`."""

    graph: Any
    params: Any
    rest: Any

    @classmethod
    def of(cls, model: Transformer) -> "Parts":
        """With a noise key, always the same, where the model rounds stochastically."""
        if qat.nnx.needs_key(model):
            qat.nnx.set_key(model, jax.random.key(0))
        return cls(*split(model))


States = Sequence[np.ndarray]  # (B, T, D) of every batch of a text


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """A model against its original on a text, float64.

    Attributes:
        loss_RT: nats, of every token.
        delta_RT: that minus the original's.
        divergence_RT: KL of the original's next-token distribution to the model's, nats.
        agrees_RT: 1 where both think the same token most likely.
    """

    loss_RT: Float[np.ndarray, "R T"]
    delta_RT: Float[np.ndarray, "R T"]
    divergence_RT: Float[np.ndarray, "R T"]
    agrees_RT: Float[np.ndarray, "R T"]


def measure_original(
    model: Transformer, text: TextSet, on_batch: Callable[[int], None]
) -> tuple[Measured, States]:
    """The original itself, and what its variants will be compared with.

    Args:
        model: the original.
        text: to evaluate on.
        on_batch: told of every batch how many sequences it has.
    """
    parts, losses, states = Parts.of(model), [], []
    for tokens_BS in text.batches():
        batch, window = tokens_BS.shape
        shape = (batch, window - 1, model.config.width)
        nothing_BTD = jnp.zeros(shape, jnp.dtype(model.config.dtype))
        found, states_BTD = _compare(
            parts[0], parts[0], parts[1:], parts[1:], nothing_BTD, tokens_BS
        )
        losses.append(np.asarray(found.loss_BT, np.float64))
        states.append(np.asarray(states_BTD))
        on_batch(batch)
    loss_RT = np.concatenate(losses)[: len(text.tokens_NS)]
    none_RT = np.zeros(loss_RT.shape)
    return Measured(loss_RT, none_RT, none_RT, np.ones(loss_RT.shape)), states


def measure(
    original: Parts,
    model: Transformer,
    text: TextSet,
    states: States,
    on_batch: Callable[[int], None],
) -> Measured:
    """A variant against the original.

    Args:
        original: what `states` are of.
        model: the variant.
        text: to evaluate on.
        states: those of `measure_original`.
        on_batch: told of every batch how many sequences it has.
    """
    parts, found = Parts.of(model), []
    for tokens_BS, states_BTD in zip(text.batches(), states, strict=True):
        agreement, _ = _compare(
            original[0], parts[0], original[1:], parts[1:], states_BTD, tokens_BS
        )
        found.append([np.asarray(x_BT, np.float64) for x_BT in jax.tree.leaves(agreement)])
        on_batch(len(tokens_BS))
    count = len(text.tokens_NS)
    before_RT, loss_RT, divergence_RT, agrees_RT = (
        np.concatenate(x_BT)[:count] for x_BT in zip(*found, strict=True)
    )
    return Measured(loss_RT, loss_RT - before_RT, divergence_RT, agrees_RT)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compare(
    original_graph: Any,
    graph: Any,
    original_state: tuple[Any, Any],
    state: tuple[Any, Any],
    original_BTD: jax.Array,
    tokens_BS: jax.Array,
) -> tuple[Agreement, jax.Array]:
    """A batch; also what the model's own head reads."""
    original: Transformer = nnx.merge(original_graph, *original_state)
    model: Transformer = nnx.merge(graph, *state)
    states_BTD = model.states(tokens_BS[:, :-1])
    found = agreement_of_states(
        original.logits, model.logits, original_BTD, states_BTD, tokens_BS[:, 1:]
    )
    return found, states_BTD
