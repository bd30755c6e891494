"""Every door takes an object or its spelling, and says in one line what else it was given."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat
import qat.linen
import qat.nnx
from qat.policy import Rules

X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4)), jnp.float32)
W4A8 = qat.Policy.parse("w4a8")
MATRICES = (((1,), (0,)), ((), ()))


def dense(policy):
    return qat.nnx.Linear(4, 3, policy=policy, rngs=nnx.Rngs(0))(X)


def linen_dense(policy):
    layer = qat.linen.Dense(3, policy=policy)
    return layer.apply(layer.init(jax.random.key(0), X), X)


def embedded(policy):
    layer = qat.nnx.Embed(8, 4, policy=policy, rngs=nnx.Rngs(0))
    return layer(jnp.arange(3))


def convolved(policy):
    return qat.conv_general_dilated(policy)(X[:, :, None], X[:3, :, None], (1,), "VALID")


@pytest.mark.parametrize(
    "door",
    [
        dense,
        linen_dense,
        embedded,
        convolved,
        lambda policy: qat.dot_general(policy)(X, X.T, MATRICES),
        lambda policy: qat.einsum(policy)("ab,cb->ac", X, X),
    ],
)
def test_a_policy_may_be_spelled(door):
    np.testing.assert_array_equal(door("w4a8"), door(W4A8))


def test_a_quantizer_may_be_spelled():
    int4 = qat.Quantizer("int4", "channel")
    spelled = qat.fake_quant(X, "int4/channel", axis=0)
    np.testing.assert_array_equal(spelled, qat.fake_quant(X, int4, axis=0))
    stored = qat.quantize(X, "int4/channel", axis=0)
    np.testing.assert_array_equal(stored.dequantize(), spelled)
    linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    by_name, _ = qat.ptq.quantize(linear, "rtn", "int4/channel")
    np.testing.assert_array_equal(
        by_name.kernel[...], qat.fake_quant(linear.kernel[...], int4, axis=0)
    )


def fails(door, *words):
    """A ValueError of one line with these words."""
    with pytest.raises(ValueError) as caught:
        door()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    assert all(word in message for word in words), message


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("wrong", [None, 4, qat.parse_format("int4"), W4A8, qat.Quantizer])
@pytest.mark.parametrize("door", [qat.fake_quant, qat.quantize])
def test_what_is_no_quantizer_is_named(door, wrong):
    fails(lambda: door(X, wrong, axis=0), "quantizer: expected a Quantizer or its spelling")


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("wrong", [4, W4A8.weights, qat.Policy, ["w4"]])
@pytest.mark.parametrize("door", [qat.dot_general, qat.einsum, dense, linen_dense])
def test_what_is_no_policy_is_named(door, wrong):
    fails(lambda: door(wrong), "policy: expected a Policy, its spelling such as 'w4a8', or None")


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("construct", "words"),
    [
        (lambda: qat.Policy(weights=4), ["weights: expected a Quantizer", "got 4"]),
        (lambda: qat.Policy.parse(4), ["policy: expected text"]),
        (lambda: qat.Quantizer.parse(None), ["quantizer: expected text"]),
        (lambda: qat.Quantizer(4), ["format: expected a Format", "got 4"]),
        (lambda: qat.Quantizer("int4/channel"), ["'int4/channel' is a whole quantizer"]),
        (lambda: qat.Quantizer("mxfp4"), ["'mxfp4' is a whole quantizer"]),
        (lambda: Rules.of(4), ["rules: expected pairs"]),
        (lambda: Rules.of([]), ["rules: expected pairs"]),
        (lambda: Rules.of(W4A8.weights), ["rules: expected pairs"]),
        (lambda: Rules.of((".*", "w4")), ["rule: expected a pair", "got '.*'"]),
        (lambda: Rules.of([(".*", W4A8, 1)]), ["rule: expected a pair"]),
        (lambda: Rules.of([(".*", 4)]), ["policy: expected a Policy"]),
        (lambda: qat.parse_format("fp8"), ["nearest is 'e4m3'"]),
        (lambda: qat.parse_format("float8"), ["nearest is 'e4m3'"]),
        (lambda: qat.parse_format("int0"), ["nearest is 'int1'"]),
    ],
)
def test_constructors_say_what_they_expect(construct, words):
    fails(construct, *words)


@pytest.mark.parametrize("text", ["W4A8", " w4a8 ", "W4A8, Gradients E5M2/Token"])
def test_spellings_have_no_case(text):
    assert qat.Policy.parse(text) == qat.Policy.parse(text.strip().lower())
    assert qat.Quantizer.parse("INT4/Channel/MSE") == qat.Quantizer.parse("int4/channel/mse")


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("axis", [1.0, "0", None, True, (0, "a"), (0, True), (0, 1.0)])
def test_an_axis_is_an_integer(axis):
    fails(lambda: qat.fake_quant(X, "int4", axis=axis), "axis: expected the contraction axis")


@pytest.mark.parametrize("axis", [(0, 0), (0, -2)])
def test_an_axis_is_named_once(axis):
    fails(lambda: qat.fake_quant(X, "int4", axis=axis), "twice")


def test_a_scalar_has_no_axis():
    fails(lambda: qat.fake_quant(jnp.float32(1), "int4", axis=0), "expected (), as it has none")
    assert qat.fake_quant(jnp.float32(1.5), "int4", axis=()) == pytest.approx(1.5, rel=1e-4)


@pytest.mark.usefixtures("unchecked_annotations")
def test_integers_of_numpy_are_axes():
    expected = qat.fake_quant(X, "int4/channel", axis=1)
    np.testing.assert_array_equal(qat.fake_quant(X, "int4/channel", axis=np.int64(1)), expected)


def test_float64_is_refused():
    with jax.enable_x64(True):
        fails(lambda: qat.fake_quant(jnp.ones(3, jnp.float64), "none", axis=0), "float64 would be")


@pytest.mark.parametrize(
    "key",
    [
        0,
        [0, 1],
        np.zeros(2, np.int32),
        np.zeros((4, 2), np.uint32),
        np.zeros(1, np.uint32),
        *(jax.random.split(jax.random.key(0), n) for n in (1, 4, 8)),
    ],
)
@pytest.mark.usefixtures("unchecked_annotations")
def test_a_key_is_one_key(key):
    stochastic = qat.Policy("int4/channel/stochastic")
    fails(
        lambda: qat.fake_quant(X, "int4/stochastic", axis=0, key=key),
        "key: expected one JAX",
        "got",
    )
    fails(lambda: qat.dot_general(stochastic, key)(X, X.T, MATRICES), "key: expected one JAX")


def test_keys_of_every_kind_round():
    for key in (jax.random.key(0), jax.random.key(0, impl="rbg"), jax.random.PRNGKey(0)):
        assert qat.fake_quant(X, "int4/stochastic", axis=0, key=key).shape == X.shape


LINEAR = nnx.Linear(4, 3, rngs=nnx.Rngs(0))


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("model", [nnx.Linear, nn.Dense(3), nnx.state(LINEAR), None, lambda x: x])
def test_an_nnx_model_is_expected(model):
    fails(lambda: qat.nnx.quantize_model(model, "w4"), "quantize_model: expected an NNX module")
    fails(lambda: qat.ptq.quantize(model, "rtn", "int4"), "expected an NNX module")


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("model", [nn.Dense, LINEAR, None, lambda x: x])
def test_a_linen_model_is_expected(model):
    fails(lambda: qat.linen.quantize_model(model, "w4"), "expected an instance of a Linen module")


def test_a_layer_has_one_contraction():
    own = jax.lax.dot_general
    fails(
        lambda: qat.nnx.Linear(4, 3, policy="w4", dot_general=own, rngs=nnx.Rngs(0)),
        "a policy and a dot_general of its own",
    )
    assert qat.nnx.Linear(4, 3, dot_general=own, rngs=nnx.Rngs(0)).dot_general is own


def test_a_skip_that_matches_nothing_is_an_error():
    model = nnx.Sequential(LINEAR)
    fails(lambda: qat.ptq.quantize(model, "rtn", "int4", skip="layers/9"), "'layers/0'")


def test_the_package_shows_its_doors_alone():
    assert dir(qat) == sorted(qat.__all__)
    assert all(re.fullmatch(r"[A-Za-z]\w*", name) and hasattr(qat, name) for name in dir(qat))
