"""SmoothQuant's scales against their formula."""

import jax.numpy as jnp
import numpy as np
import pytest

from qat.ptq.smoothquant import smoothing_scale
from qat.ptq.statistics import Statistics


def problem(inputs=16):
    random = np.random.default_rng(0)
    weight = random.standard_normal((inputs, 8)).astype(np.float32)
    parts = [m * random.standard_normal((20, inputs)) for m in (0.1, 10, 1)]
    return weight, [np.asarray(part, np.float32) for part in parts]


def collected(parts):
    statistics = Statistics.zeros(parts[0].shape[1])
    for part in parts:
        statistics = statistics.add(jnp.asarray(part))
    return statistics


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_the_formula_over_all_batches(alpha):
    """The batches differ a hundredfold: the largest decides, wherever it stands."""
    weight, parts = problem()
    of_inputs = np.abs(np.concatenate(parts)).max(axis=0).astype(np.float64)
    of_weights = np.abs(weight).max(axis=1).astype(np.float64)
    expected = of_inputs**alpha / of_weights ** (1 - alpha)
    for order in (parts, parts[::-1]):
        scale = smoothing_scale(jnp.asarray(weight), collected(order), alpha)
        np.testing.assert_allclose(scale, expected, rtol=1e-5)


def test_at_one_half_inputs_and_weights_are_equally_large():
    weight, parts = problem()
    scale = np.asarray(smoothing_scale(jnp.asarray(weight), collected(parts)))
    of_inputs = np.abs(np.concatenate(parts) / scale).max(axis=0)
    np.testing.assert_allclose(of_inputs, np.abs(weight * scale[:, None]).max(axis=1), rtol=1e-5)


def test_what_is_always_zero_stays_and_extremes_are_finite():
    weight, parts = problem()
    parts[0][:] = 0
    parts[1][:, 2] = parts[2][:, 2] = 0
    weight[4] = 0
    parts[1][:, 6], weight[6] = 1e18, 1e-30
    parts[1][:, 7], parts[2][:, 7], weight[7] = 1e-30, 1e-30, 1e18
    scale = np.asarray(smoothing_scale(jnp.asarray(weight), collected(parts)))
    assert scale[2] == scale[4] == 1
    assert (scale >= 1e-5).all() and (scale <= 1e5 * (1 + 1e-6)).all()


@pytest.mark.parametrize("alpha", [-0.1, 1.5, np.nan])
def test_a_share_out_of_range_is_named(alpha):
    weight, parts = problem()
    with pytest.raises(ValueError, match=f"alpha: expected a number from 0 to 1, got {alpha}"):
        smoothing_scale(jnp.asarray(weight), collected(parts), alpha)
