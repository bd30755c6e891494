"""Text from a model: the prompt at once, then one token a step through the quantized cache.

The cache holds keys and values as the policy rounds them, so every new token attends to what a
deployed low-precision cache would hold. Where nothing is scaled over several tokens (caches and
activations per token, any weights), the logits are those of the full forward pass over the same
tokens; a scale over a whole tensor sees one token at a time here and all of them there.

Prefill and all steps are one compiled program of a model's shape, the prompt's and the number of
new tokens; a scan carries the cache, which is updated in place. Temperature is data to it.

Shapes: B sequences, T tokens of the prompt, N new tokens, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

import qat.nnx
from models.attention import Cache
from models.transformer import Transformer, split


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: logits are divided by it before the softmax; 0 takes the most likely token.
        top_k: draws from as many of the most likely tokens, and those as likely as the last of
            them; 0 is all.

    Raises:
        ValueError: a number is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature = {self.temperature}: expected at least 0, and finite")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: expected at least 0, which is all tokens")


GREEDY = Sampling(temperature=0.0)


class Continuation(NamedTuple):
    """What a model wrote.

    Attributes:
        tokens_BN: the new tokens, int32.
        log_probs_BN: of each, in nats, under the model's own distribution: before temperature
            and top-k.
    """

    tokens_BN: Int[Array, "B N"]
    log_probs_BN: Float[Array, "B N"]


def generate(
    model: Transformer,
    prompt_BT: Int[Array, "B T"],
    tokens: int,
    sampling: Sampling = GREEDY,
    key: Array | None = None,
    *,
    length: int | None = None,
    greedy_B: Int[Array, " B"] | None = None,
) -> Continuation:
    """Continues prompts by N tokens each.

    Args:
        model: at its policy's precision.
        prompt_BT: token ids, as many of each sequence.
        tokens: N, at least 1.
        sampling: how a token is drawn.
        key: of drawing, and of stochastic rounding; equal keys give equal text.
        length: of the cache, in tokens; T + N if None. The text ends there.
        greedy_B: how many of each sequence's first new tokens are the most likely ones, however
            the others are drawn; none if None.

    Raises:
        ValueError: the text does not fit the cache, a token id is not in the vocabulary, there is
            no prompt, or no key where one is needed.
    """
    prompt_BT = jnp.asarray(prompt_BT, jnp.int32)
    longest = prompt_BT.shape[1] + tokens if length is None else length
    draws, noisy = sampling.temperature > 0, qat.nnx.needs_key(model)
    _check(prompt_BT, tokens, longest, sampling, model.config.vocabulary)
    if key is None and (draws or noisy):
        expected = "a key to draw tokens with" if draws else "a key for stochastic rounding"
        raise ValueError(f"key = None: expected {expected}, such as jax.random.key(0)")
    graph, params, rest = split(model)
    written: Continuation = _generate(
        (params, rest),
        prompt_BT,
        jnp.float32(sampling.temperature),
        jax.random.key(0) if key is None else key,
        jnp.zeros(prompt_BT.shape[:1], jnp.int32) if greedy_B is None else jnp.asarray(greedy_B),
        static=_Static(graph, tokens, longest, sampling.top_k, draws, noisy),
    )
    return written


class _Static(NamedTuple):
    """What is not data to the compiled program."""

    graph: nnx.GraphDef[Transformer]
    tokens: int
    longest: int
    top_k: int
    draws: bool
    noisy: bool


@functools.partial(jax.jit, static_argnames="static")
def _generate(
    numbers: tuple[Any, Any],
    prompt_BT: Array,
    temperature: Array,
    key: Array,
    greedy_B: Array,
    static: _Static,
) -> Continuation:
    """Prefill, then a scan over the tokens after the first new one."""
    draw_key, noise_key = jax.random.split(key)
    batch, prompt = prompt_BT.shape

    def read(tokens_BT: Array, position: Array, cache: Cache) -> tuple[Array, Cache]:
        """Logits after the last of some more tokens."""
        model = nnx.merge(static.graph, *numbers)
        if static.noisy:
            qat.nnx.set_key(model, jax.random.fold_in(noise_key, position))
        logits_BTV, cache = model.decode(tokens_BT, position, cache)
        return logits_BTV[:, -1], cache

    def choose(logits_BV: Array, index: Array) -> Continuation:
        token_B = jnp.argmax(logits_BV, axis=-1)
        if static.draws:
            drawn_B = jax.random.categorical(
                jax.random.fold_in(draw_key, index), _kept(logits_BV, static.top_k) / temperature
            )
            token_B = jnp.where(index < greedy_B, token_B, drawn_B)
        token_B1 = token_B.astype(jnp.int32)[:, None]
        log_probs_BV = jax.nn.log_softmax(logits_BV)
        return Continuation(token_B1, jnp.take_along_axis(log_probs_BV, token_B1, axis=1))

    def step(carry: tuple[Array, Cache], index: Array) -> tuple[tuple[Array, Cache], Continuation]:
        token_B1, cache = carry
        logits_BV, cache = read(token_B1, prompt - 1 + index, cache)
        chosen = choose(logits_BV, index)
        return (chosen.tokens_BN, cache), chosen

    cache = nnx.merge(static.graph, *numbers).empty_cache(batch, static.longest)
    logits_BV, cache = read(prompt_BT, jnp.int32(0), cache)
    first = choose(logits_BV, jnp.int32(0))
    _, rest = jax.lax.scan(step, (first.tokens_BN, cache), jnp.arange(1, static.tokens))

    def joined(first_B1: Array, rest_NB1: Array) -> Array:
        return jnp.concatenate([first_B1, rest_NB1[..., 0].T], axis=1)

    whole: Continuation = jax.tree.map(joined, first, rest)
    return whole


def _kept(logits_BV: Array, top_k: int) -> Array:
    """Logits of the most likely tokens; those of the others are minus infinity."""
    if not top_k:
        return logits_BV
    least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def _check(
    prompt_BT: Array, tokens: int, longest: int, sampling: Sampling, vocabulary: int
) -> None:
    """Raises ValueError for what would not fit, or be looked up in vain."""
    prompt = prompt_BT.shape[1]
    if tokens < 1 or not prompt_BT.size:
        raise ValueError(
            f"{tokens} new tokens after a prompt of shape {prompt_BT.shape}: expected at least one "
            "of each"
        )
    if prompt + tokens > longest:
        raise ValueError(
            f"{prompt} tokens of prompt and {tokens} new ones do not fit a cache of length "
            f"{longest}; expected at most {max(0, longest - prompt)} new ones"
        )
    if sampling.top_k > vocabulary:
        raise ValueError(f"top_k = {sampling.top_k}: expected at most {vocabulary} tokens")
    lowest, highest = int(np.min(prompt_BT)), int(np.max(prompt_BT))
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"token id {wrong} of the prompt: expected one of [0, {vocabulary})")
