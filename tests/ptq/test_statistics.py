"""Sums over calibration tokens against float64 NumPy; the output error against its definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from qat.ptq.statistics import Statistics, output_error


def batches(random, inputs=12, magnitudes=(1.0, 10.0, 0.1)):
    """Of different sizes and magnitudes, with correlated inputs."""
    mixing = random.standard_normal((inputs, inputs))
    return [m * random.standard_normal((20 + i, inputs)) @ mixing for i, m in enumerate(magnitudes)]


def collected(parts, dtype=jnp.float32):
    statistics = Statistics.zeros(parts[0].shape[1])
    for part in parts:
        statistics = statistics.add(jnp.asarray(part, dtype))
    return statistics


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_add_up_to_all_tokens(dtype):
    parts = batches(np.random.default_rng(0))
    statistics = collected(parts, dtype)
    x = np.concatenate([np.asarray(jnp.asarray(part, dtype), np.float64) for part in parts])
    size = np.abs(x).max() ** 2 * len(x)
    np.testing.assert_allclose(statistics.second_moment_KK, x.T @ x, atol=1e-6 * size)
    np.testing.assert_allclose(statistics.absmax_K, np.abs(x).max(axis=0), rtol=1e-7)
    np.testing.assert_allclose(statistics.absmean, np.abs(x).mean(axis=0), rtol=1e-6)
    assert statistics.tokens == len(x)
    assert all(leaf.dtype == jnp.float32 for leaf in (statistics.absmax_K, statistics.tokens))


def test_no_tokens_have_no_magnitude():
    statistics = Statistics.zeros(3).add(jnp.ones((0, 3)))
    np.testing.assert_array_equal(statistics.absmean, np.zeros(3))
    np.testing.assert_array_equal(statistics.absmax_K, np.zeros(3))


def test_what_is_not_a_number_shows():
    x = jnp.ones((4, 3)).at[1, 2].set(jnp.nan)
    statistics = Statistics.zeros(3).add(x)
    np.testing.assert_array_equal(statistics.absmax_K, [1, 1, np.inf])
    assert not np.isfinite(np.asarray(statistics.second_moment_KK)).all()


def test_the_output_error_is_that_of_the_outputs():
    random = np.random.default_rng(1)
    x = np.concatenate(batches(random))
    weight = random.standard_normal((12, 5)).astype(np.float32)
    quantized = np.round(weight * 4) / 4
    second_moment_KK = collected([x]).second_moment_KK
    exact, rounded = x @ weight.astype(np.float64), x @ quantized.astype(np.float64)
    expected = np.linalg.norm(exact - rounded) / np.linalg.norm(exact)
    error = output_error(jnp.asarray(weight), jnp.asarray(quantized), second_moment_KK)
    np.testing.assert_allclose(error, expected, rtol=1e-5)


def test_the_output_error_of_equal_and_of_zero_weights():
    moment = jnp.eye(3)
    assert output_error(jnp.zeros((3, 2)), jnp.zeros((3, 2)), moment) == 0
    assert output_error(jnp.ones((3, 2)), jnp.ones((3, 2)), 0 * moment) == 0
    assert output_error(jnp.zeros((3, 2)), jnp.ones((3, 2)), moment) == jnp.inf
