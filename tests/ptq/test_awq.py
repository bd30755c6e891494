"""AWQ's search against its definition on activations, in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from qat.ptq.awq import awq_scale
from qat.ptq.rtn import dequantized, round_to_nearest
from qat.ptq.statistics import Statistics, output_error
from qat.quantization import fake_quant
from qat.quantizer import Quantizer


def problem(seed=0, inputs=32, outputs=16):
    """A weight and batches whose magnitudes differ tenfold, some inputs much larger than others."""
    random = np.random.default_rng(seed)
    sizes = np.exp(1.5 * random.standard_normal(inputs))
    parts = [m * random.standard_normal((50, inputs)) * sizes for m in (1, 10, 0.1)]
    weight = random.standard_normal((inputs, outputs)).astype(np.float32)
    return weight, np.concatenate(parts).astype(np.float32)


def collected(x):
    return Statistics.zeros(x.shape[1]).add(jnp.asarray(x))


def searched(weight, x, quantizer):
    """The scale of least squared error among 20 exponents."""
    mean = np.abs(x.astype(np.float64)).mean(axis=0)
    scales, errors = [], []
    for step in range(20):
        scale = mean ** (step / 20)
        scale = scale / np.sqrt(scale.max() * scale.min())
        scaled = jnp.asarray(weight * scale[:, None], jnp.float32)
        rounded = np.asarray(fake_quant(scaled, quantizer, 0), np.float64) / scale[:, None]
        scales.append(scale)
        errors.append(np.square(x @ (rounded - weight)).sum())
    return scales[np.argmin(errors)]


@pytest.mark.parametrize("name", ["int3/channel", "int4/block:16", "nvfp4", "int3/channel/mse"])
def test_the_exponent_is_the_best_of_twenty(name):
    quantizer = Quantizer.parse(name)
    chosen = []
    for seed in range(4):
        weight, x = problem(seed)
        scale = awq_scale(jnp.asarray(weight), quantizer, collected(x))
        np.testing.assert_allclose(scale, searched(weight, x, quantizer), rtol=1e-4)
        chosen.append(np.ptp(np.asarray(scale)) > 0)
    assert any(chosen)


@pytest.mark.parametrize("name", ["int2/channel", "int4/channel", "e2m1/tensor", "mxfp4", "none"])
def test_the_layer_is_never_worse_and_its_function_the_same(name):
    quantizer = Quantizer.parse(name)
    weight, x = map(jnp.asarray, problem())
    statistics = collected(x)
    scale = awq_scale(weight, quantizer, statistics)[:, None]
    rounded = dequantized(*round_to_nearest(weight * scale, quantizer)) / scale
    error = output_error(weight, rounded, statistics.second_moment_KK)
    plain = dequantized(*round_to_nearest(weight, quantizer))
    assert error <= output_error(weight, plain, statistics.second_moment_KK)
    exact = np.asarray(x) @ np.asarray(weight)
    product = np.asarray(x / scale.T) @ np.asarray(weight * scale)
    np.testing.assert_allclose(product, exact, atol=1e-5 * np.abs(exact).max())


def test_inputs_that_are_always_zero_and_extremes():
    weight, x = problem()
    x[:, 3] = 0
    x[:, 5] *= 1e15
    x[:, 7] *= 1e-15
    scale = awq_scale(jnp.asarray(weight), Quantizer.parse("int3/channel"), collected(x))
    assert scale[3] == 1
    assert np.isfinite(scale).all() and np.min(scale) >= 1e-4 and np.max(scale) <= 1e4


def test_without_tokens_nothing_is_scaled():
    weight, _ = problem()
    statistics = Statistics.zeros(32)
    scale = awq_scale(jnp.asarray(weight), Quantizer.parse("int3/channel"), statistics)
    np.testing.assert_array_equal(scale, np.ones(32))
