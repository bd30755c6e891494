"""What the layer benchmark trains: two models, each written for both APIs of Flax.

They are plain Flax, so that every library quantizes them by its own documented means: ours by its
NNX layers, Qwix by rewriting a Linen model, AQT by the `dot_general_cls` slot of Linen's layers.
The dense layers of the stack or of the blocks are what is quantized; embedding, norms, attention
products and the language model's head stay as they are for everybody.

Shapes: B batch, T tokens, D width, F width inside a block, H heads, C channels of a head, V
vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx

LAYERS, WIDTH, HEADS = 4, 256, 4
ROWS = 2048  # of the stack's batch
BATCH, TOKENS, VOCABULARY = 8, 128, 256

# Makes a dense layer of NNX: called with input width, output width and rngs.
NnxDense = Callable[..., nnx.Linear]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, its batch and its loss.

    Attributes:
        name: as in the flag and the rows.
        description: one line for the head of the table.
        linen: makes the Linen model, given what goes into its dense layers' `dot_general_cls`.
        nnx: makes the NNX model, given what makes its quantized dense layers.
        quantized: pattern of the module paths whose dense layers are quantized.
        batch: makes inputs and targets.
        loss: of outputs and targets.
    """

    name: str
    description: str
    linen: Callable[[Any], linen.Module]
    nnx: Callable[[NnxDense], nnx.Module]
    quantized: str
    batch: Callable[[], tuple[jax.Array, jax.Array]]
    loss: Callable[[jax.Array, jax.Array], jax.Array]


class LinenStack(linen.Module):
    """Dense layers with GELU between them, in Linen."""

    dot_general_cls: Any = None

    @linen.compact
    def __call__(self, x_BD: jax.Array) -> jax.Array:
        """Maps (batch, width) to the same shape."""
        for layer in range(LAYERS):
            x_BD = linen.gelu(x_BD) if layer else x_BD
            name = f"dense_{layer}"
            x_BD = linen.Dense(WIDTH, dot_general_cls=self.dot_general_cls, name=name)(x_BD)
        return x_BD


class NnxStack(nnx.Module):
    """Dense layers with GELU between them, in NNX."""

    def __init__(self, dense: NnxDense):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([dense(WIDTH, WIDTH, rngs=rngs) for _ in range(LAYERS)])

    def __call__(self, x_BD: jax.Array) -> jax.Array:
        """Maps (batch, width) to the same shape."""
        for layer, dense in enumerate(self.layers):
            x_BD = dense(nnx.gelu(x_BD) if layer else x_BD)
        return x_BD


class LinenBlock(linen.Module):
    """A pre-norm block of a decoder, in Linen."""

    dot_general_cls: Any = None

    @linen.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps (batch, tokens, width) to the same shape."""

        def dense(width: int, name: str) -> linen.Dense:
            return linen.Dense(width, dot_general_cls=self.dot_general_cls, name=name)

        qkv_BTF = dense(3 * WIDTH, "qkv")(linen.LayerNorm()(x_BTD))
        x_BTD = x_BTD + dense(WIDTH, "out")(attend(qkv_BTF))
        up_BTF = dense(4 * WIDTH, "up")(linen.LayerNorm()(x_BTD))
        return x_BTD + dense(WIDTH, "down")(linen.gelu(up_BTF))


class LinenDecoder(linen.Module):
    """A decoder without position embedding, in Linen."""

    dot_general_cls: Any = None

    @linen.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Maps token ids (batch, tokens) to logits (batch, tokens, vocabulary)."""
        x_BTD = linen.Embed(VOCABULARY, WIDTH)(tokens_BT)
        for layer in range(LAYERS):
            x_BTD = LinenBlock(self.dot_general_cls, name=f"block_{layer}")(x_BTD)
        return linen.Dense(VOCABULARY, name="head")(linen.LayerNorm()(x_BTD))


class NnxBlock(nnx.Module):
    """A pre-norm block of a decoder, in NNX."""

    def __init__(self, dense: NnxDense, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.qkv = dense(WIDTH, 3 * WIDTH, rngs=rngs)
        self.out = dense(WIDTH, WIDTH, rngs=rngs)
        self.up = dense(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = dense(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps (batch, tokens, width) to the same shape."""
        x_BTD = x_BTD + self.out(attend(self.qkv(self.norms[0](x_BTD))))
        return x_BTD + self.down(nnx.gelu(self.up(self.norms[1](x_BTD))))


class NnxDecoder(nnx.Module):
    """A decoder without position embedding, in NNX."""

    def __init__(self, dense: NnxDense):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(dense, rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Maps token ids (batch, tokens) to logits (batch, tokens, vocabulary)."""
        x_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))


def attend(qkv_BTF: jax.Array) -> jax.Array:
    """Causal attention of (batch, tokens, 3 · width): queries, then keys, then values."""
    batch, tokens, _ = qkv_BTF.shape
    q_BTHC, k_BTHC, v_BTHC = (
        part.reshape(batch, tokens, HEADS, WIDTH // HEADS) for part in jnp.split(qkv_BTF, 3, -1)
    )
    scores_BHTS = jnp.einsum("bthc,bshc->bhts", q_BTHC * (WIDTH // HEADS) ** -0.5, k_BTHC)
    visible_TS = jnp.tril(jnp.ones((tokens, tokens), bool))
    scores_BHTS = jnp.where(visible_TS[None, None], scores_BHTS, jnp.finfo(scores_BHTS.dtype).min)
    mixed_BTHC = jnp.einsum("bhts,bshc->bthc", jax.nn.softmax(scores_BHTS), v_BTHC)
    return mixed_BTHC.reshape(batch, tokens, WIDTH)


@functools.cache
def _numbers() -> tuple[jax.Array, jax.Array]:
    """Inputs and targets (batch, width) of the stack."""
    keys = jax.random.split(jax.random.key(1))
    return jax.random.normal(keys[0], (ROWS, WIDTH)), jax.random.normal(keys[1], (ROWS, WIDTH))


@functools.cache
def _text() -> tuple[jax.Array, jax.Array]:
    """Token ids (batch, tokens) and the ids that follow them."""
    ids = jax.random.randint(jax.random.key(1), (BATCH, TOKENS + 1), 0, VOCABULARY)
    return ids[:, :-1], ids[:, 1:]


def _squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(outputs - targets))


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    loss: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
    return loss


WORKLOADS = {
    "mlp": Workload(
        "mlp",
        f"{LAYERS} dense layers {WIDTH} to {WIDTH} with GELU, {ROWS} rows",
        LinenStack,
        NnxStack,
        r"dense_\d+",
        _numbers,
        _squared_error,
    ),
    "transformer": Workload(
        "transformer",
        f"{LAYERS} blocks of width {WIDTH}, {HEADS} heads, {BATCH} x {TOKENS} tokens, "
        f"vocabulary {VOCABULARY}",
        LinenDecoder,
        NnxDecoder,
        r"block_\d+/.*",
        _text,
        _cross_entropy,
    ),
}
