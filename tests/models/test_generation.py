"""Text from the cache against the full forward pass over the same tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import generation
from models.generation import GREEDY, Sampling, generate
from models.transformer import Transformer, TransformerConfig, split
from qat.policy import Policy
from qat.quantizer import Quantizer

CONFIG = TransformerConfig(vocabulary=32, width=16, layers=2, heads=4, kv_heads=2)
PROMPT_BT = jnp.asarray(np.random.default_rng(0).integers(0, 32, (3, 5)))
KEY = jax.random.key(0)
POLICIES = {
    "none": None,
    "kv4": Policy.parse("kv4"),
    "w4a8kv4": Policy(
        weights=Quantizer("int4", "channel"),
        activations=Quantizer("int8", "token"),
        kv_cache=Quantizer("int4", "token"),
    ),
}


@functools.cache
def model_at(name):
    return Transformer(CONFIG, POLICIES[name], rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph, params, rest, tokens_BT):
    return nnx.merge(graph, params, rest)(tokens_BT)


def log_probs_after(model, prompt_BT, tokens_BN):
    """Of every token, by one forward pass over all: (B, N, V), after each but the last."""
    tokens_BS = jnp.concatenate([prompt_BT, tokens_BN], axis=1)
    logits_BSV = np.asarray(_forward(*split(model), tokens_BS), np.float64)
    logits_BNV = logits_BSV[:, prompt_BT.shape[1] - 1 : -1]
    return logits_BNV - np.log(np.exp(logits_BNV).sum(axis=-1, keepdims=True))


def taken(log_probs_BNV, tokens_BN):
    return np.take_along_axis(log_probs_BNV, np.asarray(tokens_BN)[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("name", POLICIES)
def test_greedy_text_is_the_most_likely_by_the_full_forward_pass(name):
    model = model_at(name)
    tokens_BN, log_probs_BN = generate(model, PROMPT_BT, 9, length=20)
    expected_BNV = log_probs_after(model, PROMPT_BT, tokens_BN)
    np.testing.assert_array_equal(tokens_BN, expected_BNV.argmax(axis=-1))
    np.testing.assert_allclose(log_probs_BN, taken(expected_BNV, tokens_BN), atol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_sampled_text_is_as_likely_by_the_full_forward_pass(name):
    model = model_at(name)
    tokens_BN, log_probs_BN = generate(model, PROMPT_BT, 9, Sampling(1.3, top_k=20), KEY)
    expected_BNV = log_probs_after(model, PROMPT_BT, tokens_BN)
    np.testing.assert_allclose(log_probs_BN, taken(expected_BNV, tokens_BN), atol=1e-5)
    assert (np.asarray(tokens_BN) != expected_BNV.argmax(axis=-1)).any()


def test_the_quantized_cache_is_what_is_decoded_from():
    tokens_BN, log_probs_BN = generate(model_at("kv4"), PROMPT_BT, 9, length=20)
    exact_BNV = log_probs_after(model_at("none"), PROMPT_BT, tokens_BN)
    assert np.abs(log_probs_BN - taken(exact_BNV, tokens_BN)).max() > 1e-3


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 4)])
def test_tokens_come_as_often_as_they_are_likely(temperature, top_k):
    count, model = 8192, model_at("none")
    prompt_BT = jnp.broadcast_to(PROMPT_BT[:1], (count, 5))
    tokens_BN, _ = generate(model, prompt_BT, 1, Sampling(temperature, top_k), KEY)
    logits_V = log_probs_after(model, PROMPT_BT[:1], PROMPT_BT[:1, :1])[0, 0] / temperature
    if top_k:
        logits_V = np.where(logits_V >= np.sort(logits_V)[-top_k], logits_V, -np.inf)
    expected_V = np.exp(logits_V) / np.exp(logits_V).sum()
    share_V = np.bincount(np.asarray(tokens_BN)[:, 0], minlength=32) / count
    error_V = np.sqrt(expected_V * (1 - expected_V) / count)
    assert (np.abs(share_V - expected_V) <= 4.5 * error_V).all()


def test_the_first_tokens_can_be_the_most_likely_ones():
    model, greedy_B = model_at("none"), jnp.asarray([0, 2, 9])
    likely_BN, _ = generate(model, PROMPT_BT, 9, length=20)
    mixed_BN, _ = generate(model, PROMPT_BT, 9, Sampling(3.0), KEY, greedy_B=greedy_B)
    drawn_BN, _ = generate(model, PROMPT_BT, 9, Sampling(3.0), KEY)
    np.testing.assert_array_equal(mixed_BN[0], drawn_BN[0])
    np.testing.assert_array_equal(mixed_BN[1, :2], likely_BN[1, :2])
    np.testing.assert_array_equal(mixed_BN[2], likely_BN[2])
    assert (drawn_BN[1, :2] != likely_BN[1, :2]).any()


def test_text_is_a_function_of_the_key_and_every_temperature_one_program():
    model, before = model_at("none"), generation._generate._cache_size()
    texts = [generate(model, PROMPT_BT, 8, Sampling(t), KEY).tokens_BN for t in (2.0, 2.0, 1.9)]
    np.testing.assert_array_equal(texts[0], texts[1])
    other = generate(model, PROMPT_BT, 8, Sampling(2.0), jax.random.key(1)).tokens_BN
    assert (other != texts[0]).any()
    assert generation._generate._cache_size() == before + 1


def test_stochastic_rounding_wants_a_key_of_its_own():
    rounding = Quantizer("int3", "token", rounding="stochastic")
    model = Transformer(CONFIG, Policy(kv_cache=rounding), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="key = None: expected a key for stochastic rounding"):
        generate(model, PROMPT_BT, 6)
    first, second = (generate(model, PROMPT_BT, 6, GREEDY, jax.random.key(k)) for k in (0, 1))
    assert (first.log_probs_BN != second.log_probs_BN).any()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (PROMPT_BT, 4),
            {"length": 8},
            "5 tokens of prompt and 4 new ones do not fit a cache of length 8; expected at most 3",
        ),
        ((PROMPT_BT, 0), {}, "0 new tokens"),
        ((PROMPT_BT[:, :0], 4), {}, r"prompt of shape \(3, 0\): expected at least one"),
        ((PROMPT_BT + 30, 4), {}, r"token id \d+ of the prompt: expected one of \[0, 32\)"),
        ((PROMPT_BT - 30, 4), {}, "token id -"),
        ((PROMPT_BT, 4, Sampling()), {}, "key = None: expected a key to draw tokens with"),
        ((PROMPT_BT, 4, Sampling(1.0, 33), KEY), {}, "top_k = 33: expected at most 32 tokens"),
    ],
)
def test_what_cannot_be_written_is_an_error(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model_at("none"), *arguments, **options)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((-1.0,), "temperature = -1.0"), ((float("nan"),), "temperature = nan"), ((1.0, -1), "top_k")],
)
def test_sampling_out_of_range_is_an_error(numbers, message):
    with pytest.raises(ValueError, match=message):
        Sampling(*numbers)
