"""What quantizers of Linen layers hold: learned scales, calibrated ranges, noise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qat.linen
from qat.linen import quantize_model
from tests.linen_checks import (
    KEY,
    Stack,
    apply,
    assert_close,
    assert_equal,
    init,
    normal,
    policy_of,
    quantized,
    traced,
    variables_of,
)

STOCHASTIC = policy_of(weights="int4/channel", gradients="int4/token/stochastic")


def test_stochastic_rounding_takes_its_noise_from_an_rng():
    layer, x = qat.linen.Dense(3, policy=STOCHASTIC), normal(16, 4)
    variables = variables_of(layer, x)

    @jax.jit
    def gradient(seed):
        rngs = {"noise": jax.random.key(seed)}
        return jax.grad(lambda v: (layer.apply(v, x, rngs=rngs) ** 3).sum())(variables)

    assert_equal(gradient(0), gradient(0))
    assert not np.array_equal(gradient(0)["params"]["kernel"], gradient(1)["params"]["kernel"])
    with pytest.raises(ValueError, match="needs the rng 'noise'"):
        traced(layer, variables, x)


LEARNED = policy_of(weights="int4/channel/learned", activations="int8/learned")
FIXED = policy_of(activations="int8/fixed", weights="int8/channel")


def test_learned_scales_are_parameters():
    layer, x = qat.linen.Dense(3, policy=LEARNED), normal(2, 4)
    variables = init(layer, x)
    params = variables["params"]
    assert params["weights_scale"].shape == (1, 3)
    expected = 2 * np.abs(params["kernel"]).mean(axis=0, keepdims=True) / np.sqrt(7)
    assert_close(params["weights_scale"], expected)
    assert params["activations_scale"].shape == ()
    gradient = jax.jit(jax.grad(lambda v: (layer.apply(v, x) ** 2).sum()))(variables)["params"]
    assert all(np.all(gradient[name] != 0) for name in ("weights_scale", "activations_scale"))
    kernel = jnp.round(jnp.clip(params["kernel"] / params["weights_scale"], -7, 7))
    a = params["activations_scale"]
    inputs = jnp.round(jnp.clip(x / a, -127, 127)) * a
    assert_close(apply(layer, variables, x), inputs @ (kernel * params["weights_scale"]))


def test_scales_of_a_converted_model_come_with_its_initialization():
    x = normal(2, 4)
    converted, report = quantize_model(nn.Dense(3), LEARNED, x)
    assert len(report.quantized) == 1
    shapes = [
        jax.eval_shape(lambda m=m: m.init(KEY, x))
        for m in (converted, qat.linen.Dense(3, policy=LEARNED))
    ]
    assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match=r"no 'activations_scale' in the collection 'params'"):
        traced(converted, variables_of(nn.Dense(3), x), x)


def test_ranges_are_unknown_until_a_batch_was_seen_and_fixed_after_calibration():
    layer, x = qat.linen.Dense(3, policy=FIXED), normal(2, 4)
    variables = init(layer, x)
    assert np.isnan(variables["ranges"]["activations"])
    assert np.isnan(apply(layer, variables, x)).all()
    y, seen = apply(layer, variables, x, mutable="ranges")
    assert np.isfinite(y).all() and seen["ranges"]["activations"] == jnp.abs(x).max()

    batches = [x, 3 * x, 2 * x]
    widest = qat.linen.calibrate(layer, variables, batches)
    assert widest["ranges"]["activations"] == 3 * jnp.abs(x).max()
    assert_equal(widest["params"], variables["params"])
    again = qat.linen.calibrate(layer, widest, [x])
    assert again["ranges"]["activations"] == jnp.abs(x).max()
    average = qat.linen.calibrate(layer, variables, batches, decay=0.5)
    assert_close(average["ranges"]["activations"], 2 * jnp.abs(x).max())
    clipped = apply(layer, again, 3 * x)
    expected = quantized(jnp.clip(3 * x, -jnp.abs(x).max(), jnp.abs(x).max()), "int8", -1)
    plain = qat.linen.Dense(3, policy=dataclasses.replace(FIXED, activations=None))
    assert_close(clipped, apply(plain, {"params": again["params"]}, expected))


def test_ranges_in_a_scanned_stack_and_in_attention():
    x = normal(2, 4)
    stack = Stack(FIXED)
    variables = qat.linen.calibrate(stack, variables_of(stack, x), [x, 2 * x])
    (held,) = jax.tree.leaves(variables["ranges"])
    assert held.shape == (3,) and np.isfinite(held).all()
    assert np.isfinite(apply(stack, variables, x)).all()

    policy = policy_of(kv_cache="int8/fixed", queries="int8/learned")
    model, _ = quantize_model(nn.MultiHeadDotProductAttention(2), [("", policy), (".*", None)])
    variables = variables_of(model, normal(2, 6, 4))
    assert set(variables["ranges"]) == {"keys", "values"}
    before = variables["params"]["queries_scale"]
    variables = qat.linen.calibrate(model, variables, [normal(2, 6, 4)])
    assert np.isfinite(jax.tree.leaves(variables["ranges"])).all()
    assert variables["params"]["queries_scale"] != before


def test_calibration_refuses_what_it_cannot_do():
    x = normal(2, 4)
    layer = qat.linen.Dense(3, policy=FIXED)
    variables = variables_of(layer, x)
    with pytest.raises(ValueError, match="at least one batch"):
        qat.linen.calibrate(layer, variables, [])
    with pytest.raises(ValueError, match="between 0 and 1"):
        qat.linen.calibrate(layer, variables, [x], decay=1.5)
    with pytest.raises(ValueError, match="no activation has a fixed or learned scale"):
        qat.linen.calibrate(nn.Dense(3), variables_of(nn.Dense(3), x), [x])
    by_token = qat.linen.Dense(3, policy=policy_of(activations="int8/token/fixed"))
    with pytest.raises(ValueError, match="granularity 'tensor'"):
        by_token.init(KEY, x)
    fixed_weights = qat.linen.Dense(3, policy=policy_of(weights="int8/fixed"))
    with pytest.raises(ValueError, match="weights with a fixed scale need its value"):
        fixed_weights.init(KEY, x)
