"""What a decoder computes on its way to the logits, for checks and analysis."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.transformer import Transformer


def activations(model: Transformer, tokens_BT: Int[Array, "B T"]) -> dict[str, Float[Array, "..."]]:
    """The residual stream after the embedding and after every block, and the logits, float32.

    Returns:
        "embed", "block 0", "block 1", …, each (B, T, D), and "logits", (B, T, V).
    """
    tokens = tokens_BT.shape[1]
    positions = model.positions(jnp.int32(0), tokens, tokens)
    x_BTD = model.embed(tokens_BT)
    seen = {"embed": x_BTD}
    graph, layers = nnx.split(model.blocks)
    for index in range(model.config.layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], layers)
        x_BTD, *_ = nnx.merge(graph, layer)(x_BTD, positions, None)
        seen[f"block {index}"] = x_BTD
    seen["logits"] = model.head(model.norm(x_BTD))
    return {name: x.astype(jnp.float32) for name, x in seen.items()}
