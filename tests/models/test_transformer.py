"""The decoder against a float64 NumPy reference, its cache, and precision as data."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat.nnx
from models.attention import Positions, attend, rotate
from models.norm import RMSNorm
from models.transformer import Transformer, TransformerConfig, split
from qat.policy import Policy, Rules
from qat.quantizer import Quantizer

CONFIG = TransformerConfig(vocabulary=32, width=16, layers=2, heads=4, kv_heads=2)
TOKENS_BT = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 6)))
INNER = ["attention/cache", "attention/out", "attention/qkv", "mlp/down", "mlp/gate_up"]


def per_token(weights, activations, kv_cache):
    return Policy(
        weights=Quantizer(weights, "channel"),
        activations=Quantizer(activations, "token"),
        kv_cache=Quantizer(kv_cache, "token"),
    )


UNQUANTIZED = per_token("none", "none", "none")
W4A8KV4 = per_token("int4", "int8", "int4")
LLAMA = dataclasses.replace(
    CONFIG, width=20, head_width=6, mlp_width=28, sub_norms=False, norm_epsilon=0.1
)


def build(policy, config=CONFIG):
    return split(Transformer(config, policy, rngs=nnx.Rngs(0)))


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, params, rest, tokens_BT):
    return nnx.merge(graph, params, rest)(tokens_BT)


@functools.partial(jax.jit, static_argnums=0)
def decode(graph, params, rest, tokens_BT, position, cache):
    return nnx.merge(graph, params, rest).decode(tokens_BT, position, cache)


@functools.partial(jax.jit, static_argnums=0)
def logits_and_gradients(graph, params, rest, tokens_BT):
    def loss(params):
        logits_BTV = nnx.merge(graph, params, rest)(tokens_BT)
        log_probs_BTV = jax.nn.log_softmax(logits_BTV)
        taken = jnp.take_along_axis(log_probs_BTV[:, :-1], tokens_BT[:, 1:, None], axis=-1)
        return -taken.mean(), logits_BTV

    gradients, logits_BTV = jax.grad(loss, has_aux=True)(params)
    return logits_BTV, gradients


@pytest.fixture(scope="module")
def unquantized():
    return logits_and_gradients(*build(None), TOKENS_BT)


def test_the_none_policy_is_bit_identical_to_no_policy(unquantized):
    measured = logits_and_gradients(*build(Policy.parse("none")), TOKENS_BT)
    jax.tree.map(np.testing.assert_array_equal, measured, unquantized)


def test_one_program_serves_every_precision():
    graph, params, _ = build(Policy.parse("none"))
    before = logits_and_gradients._cache_size()
    seen = set()
    for text in ("none", "w4", "w4a8kv4", "we4m3ae5m2"):
        new_graph, _, rest = build(Policy.parse(text))
        assert new_graph == graph
        seen.add(np.asarray(logits_and_gradients(graph, params, rest, TOKENS_BT)[0]).tobytes())
    assert len(seen) == 4
    assert logits_and_gradients._cache_size() <= before + 1


def numpy_rms_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def numpy_rotate(x_BTHC, base=CONFIG.rope_base):
    half = x_BTHC.shape[-1] // 2
    turn = np.exp(1j * np.arange(x_BTHC.shape[1])[:, None] * base ** (-np.arange(half) / half))
    z = (x_BTHC[..., :half] + 1j * x_BTHC[..., half:]) * turn[:, None, :]
    return np.concatenate([z.real, z.imag], axis=-1)


def numpy_attend(q_BTHC, k_BSHC, v_BSHC):
    """One query head for each key-value head, causal."""
    scores = np.einsum("bthc,bshc->bhts", q_BTHC, k_BSHC) / np.sqrt(q_BTHC.shape[-1])
    scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhts,bshc->bthc", weights / weights.sum(axis=-1, keepdims=True), v_BSHC)


def numpy_block(p, x):
    config, group = CONFIG, CONFIG.heads // CONFIG.kv_heads
    batch, length, _ = x.shape
    h = numpy_rms_norm(x, p["attention_norm"]["scale"])
    qkv = np.einsum("btd,dknc->btknc", h, p["attention"]["qkv"]["kernel"])
    q = qkv[..., :group, :].reshape(batch, length, config.heads, -1)
    k = np.repeat(qkv[..., group, :], group, axis=2)
    v = np.repeat(qkv[..., group + 1, :], group, axis=2)
    mixed = numpy_attend(numpy_rotate(q), numpy_rotate(k), v).reshape(x.shape)
    mixed = numpy_rms_norm(mixed, p["attention"]["norm"]["scale"])
    x = x + mixed @ p["attention"]["out"]["kernel"]
    h = numpy_rms_norm(x, p["mlp_norm"]["scale"])
    gate, up = np.moveaxis(np.einsum("btd,dnf->btnf", h, p["mlp"]["gate_up"]["kernel"]), 2, 0)
    hidden = numpy_rms_norm(gate / (1 + np.exp(-gate)) * up, p["mlp"]["norm"]["scale"])
    return x + hidden @ p["mlp"]["down"]["kernel"]


def test_the_whole_model_equals_numpy_in_float64(unquantized):
    """Grouped queries included: the reference repeats the key-value heads."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), build(None)[1])
    x = params["embed"]["embedding"][np.asarray(TOKENS_BT)]
    for layer in range(CONFIG.layers):
        x = numpy_block(jax.tree.map(lambda p, layer=layer: p[layer], params["blocks"]), x)
    logits = numpy_rms_norm(x, params["norm"]["scale"]) @ params["head"]["kernel"]
    np.testing.assert_allclose(unquantized[0], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("policy", "config"),
    [(UNQUANTIZED, CONFIG), (W4A8KV4, CONFIG), (W4A8KV4, LLAMA)],
    ids=["unquantized", "w4a8kv4", "llama"],
)
def test_decoding_with_the_cache_equals_the_full_forward_pass(policy, config):
    graph, params, rest = build(policy, config)
    expected = forward(graph, params, rest, TOKENS_BT)
    model = nnx.merge(graph, params, rest)
    cache, prompt = model.empty_cache(batch=2, length=8), 3
    logits, cache = decode(graph, params, rest, TOKENS_BT[:, :prompt], jnp.int32(0), cache)
    steps = [logits]
    for t in range(prompt, TOKENS_BT.shape[1]):
        token = TOKENS_BT[:, t : t + 1]
        logits, cache = decode(graph, params, rest, token, jnp.int32(t), cache)
        steps.append(logits)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", [UNQUANTIZED, W4A8KV4], ids=["unquantized", "w4a8kv4"])
def test_a_later_token_does_not_change_earlier_logits(policy):
    model = build(policy)
    changed = TOKENS_BT.at[:, 4].set((TOKENS_BT[:, 4] + 1) % CONFIG.vocabulary)
    before, after = forward(*model, TOKENS_BT), forward(*model, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(axis=(0, 2)).all()


def test_attention_equals_repeated_heads_in_numpy():
    random = np.random.default_rng(0)
    q_BTKGC, k_BSKC, v_BSKC = (
        random.standard_normal(shape).astype(np.float32)
        for shape in [(2, 5, 2, 3, 4), (2, 5, 2, 4), (2, 5, 2, 4)]
    )
    expected = numpy_attend(
        q_BTKGC.reshape(2, 5, 6, 4).astype(np.float64),
        np.repeat(k_BSKC, 3, axis=2),
        np.repeat(v_BSKC, 3, axis=2),
    )
    mixed = attend(*map(jnp.asarray, (q_BTKGC / 2, k_BSKC, v_BSKC)), jnp.tri(5, dtype=bool))
    np.testing.assert_allclose(mixed.reshape(2, 5, 6, 4), expected, rtol=1e-5, atol=1e-5)


def test_rotation_keeps_norms_and_sees_relative_positions_alone():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 3, 8)), jnp.float32)
    q, k = x, x[:, ::-1]
    at = lambda start: Positions.of(jnp.int32(start), 7, 12, 8, 10_000.0)  # noqa: E731

    def scores(shift):
        turned = (rotate(a, at(shift)) for a in (q, k))
        return jnp.einsum("bthc,bshc->bhts", *turned)

    np.testing.assert_array_equal(
        rotate(x[:, :1], Positions.of(jnp.int32(0), 1, 1, 8, 1e4)), x[:, :1]
    )
    turned = rotate(x, at(0))
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )
    np.testing.assert_allclose(scores(0), scores(5), rtol=1e-4, atol=1e-4)
    assert np.abs(scores(0) - jnp.einsum("bthc,bshc->bhts", q, k)).max() > 0.1


@pytest.mark.parametrize(
    ("policy", "layers"),
    [
        (None, []),
        (W4A8KV4, [f"blocks/{layer}" for layer in INNER]),
        (Rules([(".*", W4A8KV4)]), [*(f"blocks/{layer}" for layer in INNER), "embed", "head"]),
        (Rules([("head", W4A8KV4), (".*", None)]), ["head"]),
        (Rules([(".*/mlp/.*", W4A8KV4), (".*", None)]), ["blocks/mlp/down", "blocks/mlp/gate_up"]),
    ],
    ids=["None", "policy", "all", "head", "mlp"],
)
def test_what_is_quantized(policy, layers):
    """Embedding and head only when a rule names them."""
    model = nnx.eval_shape(lambda: Transformer(CONFIG, policy, rngs=nnx.Rngs(0)))
    found = {
        "/".join(part for part in path if part not in ("dot_general", "policy"))
        for path, node in nnx.iter_graph(model)
        if isinstance(node, qat.nnx.PolicyState)
    }
    assert sorted(found) == layers


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        TransformerConfig(),
        TransformerConfig(vocabulary=100, width=48, layers=3, heads=6, kv_heads=1, mlp_width=72),
        LLAMA,
    ],
)
def test_params_count_everything_but_embedding_and_head(config):
    model = nnx.eval_shape(lambda: Transformer(config, W4A8KV4, rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(split(model)[1])]
    assert sum(sizes) == config.params + 2 * config.vocabulary * config.width


def test_the_gated_layer_is_about_eight_thirds_wide():
    assert TransformerConfig(width=128).gated_width == 344  # 341.3, rounded up to 8
    assert TransformerConfig(width=48).gated_width == 128
    assert TransformerConfig(width=48, mlp_width=100).gated_width == 100


def test_a_norm_and_its_gradient_are_of_its_epsilon():
    x_MD = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)), jnp.float32)
    norm = RMSNorm(5, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0), epsilon=0.5)

    def plain(x_MD):
        return x_MD / jnp.sqrt((x_MD**2).mean(axis=1, keepdims=True) + 0.5)

    np.testing.assert_allclose(norm(x_MD), plain(x_MD), rtol=1e-6)
    of_norm, of_plain = (jax.grad(lambda x, f=f: (f(x) ** 3).sum())(x_MD) for f in (norm, plain))
    np.testing.assert_allclose(of_norm, of_plain, rtol=1e-5, atol=1e-6)


def test_bfloat16_computes_narrow_and_returns_float32_logits():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    model = nnx.eval_shape(lambda: Transformer(config, W4A8KV4, rngs=nnx.Rngs(0)))
    graph, params, rest = split(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    def run(params, rest):
        model = nnx.merge(graph, params, rest)
        cache = model.empty_cache(batch=2, length=8)
        return model.decode(TOKENS_BT, jnp.int32(0), cache)

    logits_BTV, cache = jax.eval_shape(run, params, rest)
    assert (logits_BTV.shape, logits_BTV.dtype) == ((2, 6, 32), jnp.float32)
    assert cache.k_BSKC.dtype == cache.v_BSKC.dtype == jnp.bfloat16


def test_bfloat16_is_close_to_float32(unquantized):
    """The losses of the two differ by the rounding of activations to 8 bits of significand."""
    narrow = dataclasses.replace(CONFIG, dtype="bfloat16")
    logits_BTV, gradients = logits_and_gradients(*build(None, narrow), TOKENS_BT)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits_BTV, unquantized[0], atol=0.1)
    assert np.abs(logits_BTV - unquantized[0]).max() > 1e-4


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_no_number(remat, unquantized):
    again = dataclasses.replace(CONFIG, remat=remat)
    measured = logits_and_gradients(*build(None, again), TOKENS_BT)
    for a, b in zip(jax.tree.leaves(measured), jax.tree.leaves(unquantized), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_rematerialisation_keeps_less_for_the_backward_pass():
    def kept(remat):
        graph, params, rest = build(None, dataclasses.replace(CONFIG, remat=remat))
        loss = lambda params: nnx.merge(graph, params, rest)(TOKENS_BT).sum()  # noqa: E731
        _, pullback = jax.eval_shape(lambda params: jax.vjp(loss, params), params)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert kept("full") < kept("dots") < kept("none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 18}, "width = 18 is not a multiple of heads = 4"),
        ({"heads": 4, "kv_heads": 3}, "heads = 4 is not a multiple of kv_heads = 3"),
        (
            {"remat": "ful"},
            "unknown remat 'ful': expected one of none, full, dots; nearest is 'full'",
        ),
        ({"dtype": "bf16"}, "unknown dtype 'bf16'"),
        ({"width": 12}, "width / heads = 3: rotary positions need an even number"),
        ({"head_width": 3}, "head_width = 3: rotary positions need an even number"),
        ({"head_width": -2}, "head_width = -2: expected at least 0"),
        ({"norm_epsilon": -1e-6}, "norm_epsilon = -1e-06: expected at least 0"),
    ],
)
def test_a_shape_that_does_not_divide_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
