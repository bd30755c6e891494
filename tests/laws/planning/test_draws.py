"""Intervals of draws, also of infinite ones and of none, and what a fit does not know."""

import dataclasses

import numpy as np
import pytest

from qat.laws.planning.draws import Estimate, draws_of, estimate
from qat.laws.planning.plan import plan
from qat.laws.published import published

KUMAR = published("kumar")


def test_an_interval_ends_at_draws():
    draws = np.random.default_rng(0).permutation(np.arange(1000.0))
    found = estimate(np.append(7.5, draws))
    assert found == Estimate(7.5, 24.0, 975.0)
    infinite = estimate(np.array([1.0, 1.0, 2.0, np.inf, np.inf]))
    assert (infinite.low, infinite.high) == (1.0, np.inf)


def test_no_interval():
    assert str(estimate(np.array([2.0]))) == "2"
    assert np.isnan(estimate(np.array([2.0])).low)
    assert np.isnan(estimate(np.array([2.0, 1.0, np.nan])).high)
    assert str(Estimate(2.0, 1.5, 2.5)) == "2 (1.5 to 2.5)"


def test_the_fit_comes_first_and_what_was_not_fitted_is_neutral():
    fit = dataclasses.replace(
        KUMAR,
        params=KUMAR.params | {"gamma_kv": np.nan, "n_kv": np.nan},
        samples={"E": np.array([2.0, 3.0])},
    )
    draws = draws_of(fit)
    assert [group.columns for group in draws.unfitted] == [("kv_bits",)]
    np.testing.assert_array_equal(draws.values["E"], [2.7648, 2.0, 3.0])
    np.testing.assert_array_equal(draws.values["A"], [4299, 4299, 4299])
    np.testing.assert_array_equal(draws.values["n_kv"], [-np.inf] * 3)


def test_a_fit_without_a_necessary_value():
    with pytest.raises(ValueError, match="no value for E"):
        draws_of(dataclasses.replace(KUMAR, params=KUMAR.params | {"E": np.nan}))


def test_a_draw_that_allows_nothing_leaves_no_interval():
    """At 4 bits a draw whose efficiency of activations is zero has no best size."""
    samples = {name: np.full(3, value) for name, value in KUMAR.params.items()}
    fit = dataclasses.replace(KUMAR, samples=samples | {"n_a": np.array([1.4, 1.4, 2.0])})
    found = plan(fit, 1e21, bits=4)
    assert np.isnan(found.params.low)
    assert found.loss.high == np.inf
    assert np.isfinite(found.params.value)
