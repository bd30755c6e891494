"""How far a model's next-token distributions are from another's, token by token.

Three numbers a token: the loss of both models, the divergence KL(original ‖ quantized), and
whether they name the same most likely token. All are float32, from the logits' log-softmax.

The divergence is summed as Σ p·(log p - log q) - p + q, which is the same where p and q sum to one,
has no negative terms, and is right to second order where they sum to one only nearly, as in
float32: divergences of 1e-6 nats are resolved, which is what 8 bits cost.

Logits are large: 4096 tokens of a vocabulary of 49152 are 805 MB in float32. Divergence needs those
of both models at once, so `agreement_of_states` starts from what the two heads read, and makes
logits for a part of the sequence at a time. That also settles how many variants can be compared
with one original without running it again for each: its states are kept, which are width instead
of vocabulary numbers a token (2.3 KB instead of 197 KB in a model of 135 million parameters), and
exact; only its head runs again.

Shapes: B sequences, T tokens, D width, V vocabulary.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Head = Callable[[Array], Array]

LOGITS_AT_ONCE = 1 << 23  # of each model: 34 MB in float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Agreement:
    """Two models on the same tokens; float32 each, zero where a mask leaves a token out.

    Attributes:
        original_loss_BT: nats.
        loss_BT: of the quantized model, nats.
        divergence_BT: KL of the original's distribution to the quantized one's, nats.
        agrees_BT: 1 where a most likely token of one is a most likely token of the other.
    """

    original_loss_BT: Float[Array, "B T"]
    loss_BT: Float[Array, "B T"]
    divergence_BT: Float[Array, "B T"]
    agrees_BT: Float[Array, "B T"]


@jax.jit
def agreement(
    original_BTV: Float[Array, "B T V"],
    quantized_BTV: Float[Array, "B T V"],
    targets_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"] | None = None,
) -> Agreement:
    """Compares logits.

    Args:
        original_BTV: logits of the original, any floating-point dtype.
        quantized_BTV: logits of the model compared with it.
        targets_BT: the tokens that come next.
        mask_BT: tokens that count; None is all.
    """
    original_BTV, quantized_BTV = (x.astype(jnp.float32) for x in (original_BTV, quantized_BTV))
    log_p_BTV = original_BTV - jax.nn.logsumexp(original_BTV, axis=-1, keepdims=True)
    log_q_BTV = quantized_BTV - jax.nn.logsumexp(quantized_BTV, axis=-1, keepdims=True)
    p_BTV, q_BTV = jnp.exp(log_p_BTV), jnp.exp(log_q_BTV)
    divergence_BT = jnp.sum(p_BTV * (log_p_BTV - log_q_BTV) + (q_BTV - p_BTV), axis=-1)
    found = Agreement(
        -_taken(log_p_BTV, targets_BT),
        -_taken(log_q_BTV, targets_BT),
        divergence_BT,
        jnp.any(_is_largest(original_BTV) & _is_largest(quantized_BTV), axis=-1).astype(
            jnp.float32
        ),
    )
    if mask_BT is not None:
        found = jax.tree.map(lambda each_BT: jnp.where(mask_BT, each_BT, 0.0), found)
    return found


def agreement_of_states(
    original: Head,
    quantized: Head,
    original_BTD: Float[Array, "B T D"],
    quantized_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"] | None = None,
    at_once: int = LOGITS_AT_ONCE,
) -> Agreement:
    """Compares two models by what their heads read, a part of the sequence at a time.

    To be called inside a compiled function.

    Args:
        original: head of the original, (B, T, D) → logits (B, T, V) at any T.
        quantized: head of the model compared with it.
        original_BTD: what the head reads.
        quantized_BTD: what the other head reads.
        targets_BT: the tokens that come next.
        mask_BT: tokens that count; None is all.
        at_once: logits of each model in memory, about; at least those of one position.
    """
    batch, tokens, _ = original_BTD.shape
    vocabulary = jax.eval_shape(original, original_BTD).shape[-1]
    parts = _parts(tokens, at_once // (batch * vocabulary))

    def split(x_BT: Array) -> Array:
        return x_BT.reshape(batch, parts, tokens // parts, *x_BT.shape[2:]).swapaxes(0, 1)

    def compare(part: tuple[Array, Array, Array, Array | None]) -> Agreement:
        original_BtD, quantized_BtD, targets_Bt, mask_Bt = part
        found: Agreement = agreement(
            original(original_BtD), quantized(quantized_BtD), targets_Bt, mask_Bt
        )
        return found

    whole = (original_BTD, quantized_BTD, targets_BT, mask_BT)
    parts_of = jax.lax.map(compare, jax.tree.map(split, whole))
    found: Agreement = jax.tree.map(
        lambda x_PBt: x_PBt.swapaxes(0, 1).reshape(batch, tokens), parts_of
    )
    return found


def _parts(tokens: int, most: int) -> int:
    """The fewest equal parts of a sequence that have at most so many tokens each, or one."""
    sizes = (parts for parts in range(1, tokens) if tokens % parts == 0 and tokens // parts <= most)
    return next(sizes, tokens)


def _taken(x_BTV: Array, targets_BT: Array) -> Array:
    """The value at each target."""
    taken: Array = jnp.take_along_axis(x_BTV, targets_BT[..., None].astype(jnp.int32), axis=-1)
    return taken[..., 0]


def _is_largest(x_BTV: Array) -> Array:
    """Where the largest logits are; a search for the first takes XLA on CPU far longer."""
    return x_BTV == jnp.max(x_BTV, axis=-1, keepdims=True)
