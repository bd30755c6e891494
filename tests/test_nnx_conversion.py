"""Other people's NNX models: what is converted, what is reported, and that nothing else changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat.nnx
from qat.policy import Policy
from qat.quantization import fake_quant
from qat.quantizer import Quantizer

W4A8 = "weights int4/channel, activations int8/tensor"
PLAIN = jax.lax.dot_general, jnp.einsum, jnp.matmul, nnx.Linear.__call__


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def rngs():
    return nnx.Rngs(0)


def own_product(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


class Tied(nnx.Module):
    """An embedding used twice, a bare product, and a layer with a product of its own."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(10, 8, rngs=rngs)
        self.w = nnx.Param(jnp.eye(8))
        self.own = nnx.Linear(8, 8, dot_general=own_product, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.own(self.embed(tokens) @ self.w[...]))


class Convolutional(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.conv(x).mean((1, 2)))


class Scanned(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stack(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.layers = stack(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return nnx.relu(layer(x))

        return run(x, self.layers)


class Rematerialized(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(8, 8, rngs=rngs)

    @nnx.remat
    def block(self, x):
        return nnx.relu(self.layer(x))

    def __call__(self, x):
        return self.block(x)


MODELS = {
    "mlp": (Mlp, (2, 8)),
    "attention": (
        functools.partial(nnx.MultiHeadAttention, 2, 8, 8, decode=False),
        (2, 5, 8),
    ),
    "convolution": (Convolutional, (2, 6, 6, 3)),
    "scan": (Scanned, (2, 8)),
    "remat": (Rematerialized, (2, 8)),
    "lstm": (lambda rngs: nnx.RNN(nnx.OptimizedLSTMCell(8, 8, rngs=rngs)), (2, 3, 8)),
    "gru": (lambda rngs: nnx.RNN(nnx.GRUCell(8, 8, rngs=rngs)), (2, 3, 8)),
    "einsum": (lambda rngs: nnx.Einsum("btd,dhf->bthf", (8, 2, 4), (2, 4), rngs=rngs), (2, 3, 8)),
}


@nnx.jit
def run(model, x):
    return model(x)


@nnx.jit
def gradients(model, x):
    return nnx.grad(lambda model: jnp.sum(jnp.square(model(x))))(model)


def paths(lines):
    return [line.path for line in lines]


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_converted_and_trains(name):
    build, shape = MODELS[name]
    model, x = build(rngs=rngs()), normal(*shape)
    converted, report = qat.nnx.quantize_model(model, "w4a8q4kv4p8", x)
    assert len(report) and not report.skipped
    before, after = run(model, x), run(converted, x)
    assert before.shape == after.shape
    assert 1e-4 < jnp.abs(after - before).max() < 1.5
    grads = jax.tree.leaves(nnx.state(gradients(converted, x), nnx.Param))
    assert len(grads) == len(jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert all(np.isfinite(g).all() and np.any(g) for g in grads if g.ndim > 1)

    qat.nnx.set_policy(converted, "w16a16q16kv16p16")
    np.testing.assert_allclose(run(converted, x), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "scan", "convolution", "attention"])
def test_a_model_without_quantizers_keeps_its_bits(name):
    build, shape = MODELS[name]
    model, x = build(rngs=rngs()), normal(*shape)
    converted, report = qat.nnx.quantize_model(model, [(".*", None)], x)
    np.testing.assert_array_equal(run(converted, x), run(model, x))
    assert {line.reason for line in report} == {"unquantized by rule '.*'"}


def test_the_model_given_and_flax_itself_stay_as_they_are():
    model = Tied(rngs())
    before = nnx.split(model)
    qat.nnx.quantize_model(model, "w4a8")
    graph, state = nnx.split(model)
    assert graph == before[0]
    assert type(model.embed) is nnx.Embed
    jax.tree.map(np.testing.assert_array_equal, state, before[1])
    assert (jax.lax.dot_general, jnp.einsum, jnp.matmul, nnx.Linear.__call__) == PLAIN


def test_a_converted_layer_multiplies_quantized_operands():
    model, x = nnx.Linear(8, 4, use_bias=False, rngs=rngs()), normal(5, 8)
    converted, _ = qat.nnx.quantize_model(model, "w4a8")
    w = fake_quant(model.kernel[...], Quantizer("int4", "channel"), 0)
    expected = fake_quant(x, Quantizer("int8"), -1) @ w
    np.testing.assert_allclose(converted(x), expected, rtol=1e-5, atol=1e-6)


def test_a_convolution_has_a_scale_for_each_output_channel():
    model, x = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs()), normal(2, 6, 6, 3)
    converted, _ = qat.nnx.quantize_model(model, "w4a8")
    expected, _ = nnx.clone(model), None
    expected.kernel[...] = fake_quant(model.kernel[...], Quantizer("int4", "channel"), (0, 1, 2))
    np.testing.assert_allclose(
        run(converted, x), run(expected, fake_quant(x, Quantizer("int8"), -1)), rtol=1e-5, atol=1e-5
    )


def test_the_report_has_every_contraction_with_reason_and_line():
    tokens = jnp.zeros((2, 3), jnp.int32)
    _, report = qat.nnx.quantize_model(Tied(rngs()), [("own", None), ("embed", "w4a8")], tokens)
    lines = {(line.path, line.contraction.operation): line for line in report}
    assert len(lines) == len(report) == 4
    assert lines["embed", "gather"].quantized == "weights int4/channel"
    assert lines["embed", "dot_general"].quantized == W4A8
    assert lines["own", "dot_general"].reason == "its dot_general is its own"
    bare = lines[None, "dot_general"].reason
    assert "test_nnx_conversion.py" in bare
    assert "Tied.__call__" in bare


def test_without_inputs_the_report_has_every_layer_and_every_unknown_matrix():
    _, report = qat.nnx.quantize_model(Tied(rngs()), "w4a8")
    assert {line.path: line.quantized for line in report} == {"embed": W4A8, "own": None, "w": None}
    assert "example inputs" in next(line.reason for line in report if line.path == "w")


def test_attention_is_reported_unquantized_where_the_policy_names_no_operand_of_it():
    model, x = MODELS["attention"][0](rngs=rngs()), normal(2, 5, 8)
    _, report = qat.nnx.quantize_model(model, Policy(weights="int4/channel"), x)
    assert sorted(paths(report.quantized)) == ["key", "out", "query", "value"]
    assert paths(report.skipped) == ["", ""]
    reasons = {line.reason for line in report.skipped}
    assert reasons == {"rule '.*' quantizes no queries, kv_cache, probabilities"}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_quantizes_its_operands(dropout):
    """Against Flax's own attention on operands quantized by hand."""
    model = nnx.MultiHeadAttention(2, 8, 8, decode=False, dropout_rate=dropout, rngs=rngs())
    model.set_attributes(deterministic=True)
    policy = Policy(queries="int4/token", kv_cache="int3/token")
    converted, _ = qat.nnx.quantize_model(model, [("", policy), (".*", None)])
    x = normal(2, 5, 8)
    q, k, v = (layer(x) for layer in (model.query, model.key, model.value))
    q = fake_quant(q, Quantizer("int4", "token"), -1)
    k, v = (fake_quant(a, Quantizer("int3", "token"), -1) for a in (k, v))
    expected = model.out(nnx.dot_product_attention(q, k, v, deterministic=True))
    np.testing.assert_allclose(converted(x), expected, rtol=1e-4, atol=1e-5)


def test_probabilities_are_quantized_between_softmax_and_values():
    model, x = MODELS["attention"][0](rngs=rngs()), normal(1, 5, 8)
    policy = Policy(probabilities="int2/token")
    converted, _ = qat.nnx.quantize_model(model, [("", policy), (".*", None)])
    q, k, v = (np.asarray(layer(x)) for layer in (model.query, model.key, model.value))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / 2
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    weights = fake_quant(jnp.asarray(weights), Quantizer("int2", "token"), -1)
    expected = model.out(jnp.einsum("bhqk,bkhd->bqhd", weights, v))
    np.testing.assert_allclose(converted(x), expected, rtol=1e-4, atol=1e-5)


def test_an_activation_in_the_shape_of_the_weights_is_no_weight():
    """What is a weight follows from the layer, not from a shape."""
    model, x = nnx.Linear(8, 8, use_bias=False, rngs=rngs()), normal(8, 8)
    converted, _ = qat.nnx.quantize_model(model, Policy(weights="int2/channel"))
    expected = x @ fake_quant(model.kernel[...], Quantizer("int2", "channel"), 0)
    np.testing.assert_allclose(converted(x), expected, rtol=1e-5, atol=1e-6)


def test_a_rule_for_activations_alone_is_obeyed():
    model, x = nnx.Linear(8, 4, use_bias=False, rngs=rngs()), normal(5, 8)
    converted, report = qat.nnx.quantize_model(model, Policy(activations="int2"), x)
    expected = fake_quant(x, Quantizer("int2"), -1) @ model.kernel[...]
    np.testing.assert_allclose(converted(x), expected, rtol=1e-5, atol=1e-6)
    assert [line.quantized for line in report] == ["activations int2/tensor"]


def test_stacked_formats_run_side_by_side():
    """One program, vmapped over policies of one structure."""
    model, x = nnx.Linear(8, 4, rngs=rngs()), normal(5, 8)
    converted, _ = qat.nnx.quantize_model(model, "w4a8")
    graph, _, rest = nnx.split(converted, qat.nnx.PolicyState, ...)
    texts = ["w2a8", "we4m3ae5m2", "w16"]
    each = []
    for text in texts:
        qat.nnx.set_policy(converted, text)
        policies = nnx.state(converted, qat.nnx.PolicyState)
        each.append((jax.tree.map(jnp.copy, policies), converted(x)))
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(policies for policies, _ in each))
    results = jax.vmap(lambda policies: nnx.merge(graph, policies, rest)(x))(stack)
    for result, (_, alone) in zip(results, each, strict=True):
        np.testing.assert_allclose(result, alone, rtol=1e-6, atol=1e-6)


def test_each_layer_of_a_stack_may_have_its_own_format():
    converted, _ = qat.nnx.quantize_model(Scanned(rngs()), Policy(weights="int4/channel"))
    (state,) = jax.tree.leaves(nnx.state(converted, qat.nnx.PolicyState))
    assert state.shape == (3, 6)


def test_converting_twice_takes_the_new_rules():
    model, x = nnx.Linear(8, 4, rngs=rngs()), normal(5, 8)
    once, _ = qat.nnx.quantize_model(model, "w2")
    twice, _ = qat.nnx.quantize_model(once, "w4a8")
    direct, _ = qat.nnx.quantize_model(model, "w4a8")
    np.testing.assert_array_equal(twice(x), direct(x))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("layer/0", "w4"), (".*", None)], "rule 'layer/0' matches no layer; .*'layers/0'"),
        ([("layers/0", "w4")], "no rule matches the layer 'layers/1'"),
        ([("layers/(", "w4")], "not a regular expression"),
        ("w4x8", "unknown policy 'w4x8'"),
    ],
)
def test_wrong_rules_are_an_error(rules, message):
    with pytest.raises(ValueError, match=message):
        qat.nnx.quantize_model(Mlp(rngs()), rules)


def test_a_layer_that_a_mode_cannot_run_is_an_error():
    policy = Policy(weights="int8/channel", activations="int8", mode="native")
    with pytest.raises(ValueError, match=r"native.*convolution"):
        qat.nnx.quantize_model(Convolutional(rngs()), [("conv", policy), (".*", None)])
    blocks = Policy(weights="int4/block:4", activations="int8", mode="native")
    with pytest.raises(ValueError, match="scaled by blocks"):
        qat.nnx.quantize_model(Mlp(rngs()), blocks)
