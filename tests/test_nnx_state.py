"""What is put into a quantized NNX model from outside: noise keys, ranges, learned scales."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat.nnx
from qat.calibration import initial_scale
from qat.policy import Policy
from qat.quantization import fake_quant
from qat.quantizer import Quantizer

NOISY_GRADIENTS = dataclasses.replace(
    Policy.parse("w8a8"), gradients=Quantizer("int4", "token", rounding="stochastic")
)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def layer(policy, **kwargs):
    return qat.nnx.Linear(6, 4, policy=policy, rngs=nnx.Rngs(0), **kwargs)


def stack_of_three(policy):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def build(rngs):
        return qat.nnx.Linear(6, 6, policy=policy, rngs=rngs)

    return build(nnx.Rngs(0))


@nnx.jit
def kernel_gradient(model, x, target):
    return nnx.grad(lambda m: jnp.sum(m(x) * target))(model).kernel[...]


def test_noise_is_a_function_of_the_key():
    model, x, target = layer(NOISY_GRADIENTS), normal(8, 6), normal(8, 4, seed=1)
    gradients = []
    for seed in (0, 1, 0):
        qat.nnx.set_key(model, jax.random.key(seed))
        gradients.append(kernel_gradient(model, x, target))
    np.testing.assert_array_equal(gradients[0], gradients[2])
    assert np.any(gradients[0] != gradients[1])


def test_rounded_gradients_are_right_on_average():
    model, x, target = layer(NOISY_GRADIENTS), normal(8, 6), normal(8, 4, seed=1)
    exact = kernel_gradient(layer(Policy.parse("w8a8")), x, target)

    @jax.jit
    def draw(key):
        qat.nnx.set_key(m := nnx.clone(model), key)
        return kernel_gradient(m, x, target)

    draws = jax.lax.map(draw, jax.random.split(jax.random.key(0), 2000))
    error = np.abs(draws.mean(0) - exact) / (draws.std(0) / np.sqrt(len(draws)) + 1e-6)
    assert error.max() < 4.5
    assert draws.std(0).min() > 0


def test_every_layer_of_a_stack_has_noise_of_its_own():
    model = stack_of_three(NOISY_GRADIENTS)
    qat.nnx.set_key(model, jax.random.key(0))
    words = np.asarray(model.dot_general.key[...])
    assert words.shape[0] == 3
    assert len(np.unique(words, axis=0)) == 3


def test_a_missing_key_is_an_error():
    with pytest.raises(ValueError, match=r"needs a key: .*set_key"):
        kernel_gradient(layer(NOISY_GRADIENTS), normal(8, 6), normal(8, 4))


def test_a_key_may_be_traced_and_scanned_over():
    model, x, target = layer(NOISY_GRADIENTS), normal(8, 6), normal(8, 4, seed=1)
    graph, state = nnx.split(model)

    def step(_, key):
        merged = nnx.merge(graph, state, copy=True)
        qat.nnx.set_key(merged, key)
        return None, kernel_gradient(merged, x, target)

    _, gradients = jax.lax.scan(step, None, jax.random.split(jax.random.key(0), 3))
    assert len(np.unique(np.asarray(gradients).reshape(3, -1), axis=0)) == 3


@pytest.mark.parametrize(
    ("decay", "expected"), [(None, 4.0), (0.75, 0.75 * (0.75 * 1 + 0.25 * 4) + 0.25 * 2)]
)
def test_static_ranges_follow_the_batches(decay, expected):
    model = layer(Policy(activations="int8/fixed"))
    assert np.isnan(model(normal(3, 6))).all()  # before calibration nothing looks plausible
    batches = [jnp.full((2, 6), value) for value in (-1.0, 4.0, 2.0)]
    qat.nnx.calibrate(model, batches, decay=decay)
    np.testing.assert_allclose(model.dot_general.activations_value[...], expected, rtol=1e-6)
    x = normal(3, 6)
    quantized = fake_quant(x, Quantizer("int8", scale="fixed", value=expected), -1)
    np.testing.assert_allclose(model(x), layer(Policy())(quantized), rtol=1e-5, atol=1e-6)


def test_calibrating_again_forgets_what_was_before():
    model = layer(Policy(activations="int8/fixed"))
    for value in (5.0, 2.0):
        qat.nnx.calibrate(model, [jnp.full((2, 6), value)])
        assert model.dot_general.activations_value[...] == value


def test_a_range_with_a_zero_point_has_two_ends():
    model = layer(Policy(activations="uint8/fixed/zero_point"))
    qat.nnx.calibrate(model, [jnp.linspace(-1, 3, 12).reshape(2, 6), jnp.full((2, 6), 0.5)])
    np.testing.assert_allclose(model.dot_general.activations_value[...], [-1, 3])
    x = jnp.linspace(-2, 4, 12).reshape(2, 6)
    assert np.isfinite(model(x)).all()


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        (layer(Policy.parse("w4a8")), {}, "no activation has a fixed or learned scale"),
        (layer(Policy(activations="int8/fixed")), {"batches": []}, "at least one batch"),
        (layer(Policy(activations="int8/fixed")), {"decay": 1.5}, "decay 1.5: expected between"),
        (nnx.Linear(6, 4, rngs=nnx.Rngs(0)), {}, "no quantized layer"),
    ],
)
def test_what_cannot_be_calibrated_is_an_error(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        qat.nnx.calibrate(model, **({"batches": [normal(2, 6)]} | kwargs))


def test_learned_scales_are_parameters_and_train():
    model = layer(Policy(weights="int3/channel/learned", activations="int4/learned"))
    quantizer = Quantizer("int3", "channel", scale="learned")
    expected = initial_scale(model.kernel[...], quantizer, 0)
    np.testing.assert_array_equal(model.dot_general.weights_value[...], expected)
    assert expected.shape == (1, 4)

    x, target = normal(32, 6), normal(32, 4, seed=1)

    @nnx.jit
    def loss(model):
        return jnp.mean(jnp.square(model(x) - target))

    before = loss(model)
    for _ in range(30):
        gradients = nnx.grad(loss)(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients))
    assert loss(model) < before
    assert np.any(model.dot_general.weights_value[...] != expected)
    assert model.dot_general.activations_value[...] > 0


def test_a_stack_of_layers_has_learned_scales_for_each():
    model = stack_of_three(Policy(weights="int3/channel/learned"))
    assert model.dot_general.weights_value.shape == (3, 1, 6)
    converted, _ = qat.nnx.quantize_model(
        stack_of_three(None), Policy(weights="int3/channel/learned")
    )
    np.testing.assert_allclose(
        converted.dot_general.weights_value[...], model.dot_general.weights_value[...], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy(activations="int8/token/fixed"), "expected granularity 'tensor', got 'token'"),
        (Policy(weights="int8/channel/fixed"), "weights with a fixed scale need its value"),
        (Policy(gradients="int8/learned"), "gradients with a learned scale"),
    ],
)
def test_numbers_that_no_layer_can_hold_are_an_error(policy, message):
    with pytest.raises(ValueError, match=message):
        layer(policy)


def test_einsum_multiplies_quantized_operands():
    equation, shape = "btd,dhf->bthf", (8, 2, 4)
    model = qat.nnx.Einsum(equation, shape, policy=Policy.parse("w4a8"), rngs=nnx.Rngs(0))
    x = normal(2, 3, 8)
    w = fake_quant(model.kernel[...], Quantizer("int4", "channel"), 0)
    expected = jnp.einsum(equation, fake_quant(x, Quantizer("int8"), -1), w)
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-5)


def test_native_layers_agree_with_fake_ones():
    fake = Policy.parse("w4a8")
    native, x = dataclasses.replace(fake, mode="native"), normal(5, 6)
    a, b = layer(fake), layer(native)
    np.testing.assert_allclose(a(x), b(x), rtol=1e-5, atol=1e-6)
    graph, state = nnx.split(b)
    np.testing.assert_array_equal(nnx.merge(graph, state)(x), b(x))
    with pytest.raises(ValueError, match="compiled for weights int4/channel"):
        qat.nnx.set_policy(b, dataclasses.replace(Policy.parse("w8a8"), mode="native"))
    with pytest.raises(ValueError, match="fits none of int4, int8"):
        layer(dataclasses.replace(Policy.parse("w4"), mode="native"))
