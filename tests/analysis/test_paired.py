"""Standard errors, of means and of ratios, and what pairing gains."""

import numpy as np
import pytest

from qat.analysis import mean_and_standard_error

RANDOM = np.random.default_rng(0)


def test_standard_error_is_that_of_the_mean():
    losses = np.random.default_rng(0).normal(size=400)
    mean, error = mean_and_standard_error(losses)
    assert mean == losses.mean()
    assert error == pytest.approx(losses.std(ddof=1) / 20)


def test_one_sequence_has_no_standard_error():
    mean, error = mean_and_standard_error(np.array([1.5]))
    assert mean == 1.5
    assert np.isnan(error)


def test_sequences_of_unlike_length_count_by_their_tokens():
    values_R, tokens_R = RANDOM.normal(2, 1, 50), RANDOM.integers(1, 100, 50).astype(float)
    mean, error = mean_and_standard_error(values_R, tokens_R)
    assert mean == pytest.approx((values_R * tokens_R).sum() / tokens_R.sum())
    equal = mean_and_standard_error(values_R, np.full(50, 7.0))
    assert equal == pytest.approx(mean_and_standard_error(values_R))
    drawn = RANDOM.integers(0, 50, (4000, 50))
    means = (values_R * tokens_R)[drawn].sum(axis=1) / tokens_R[drawn].sum(axis=1)
    assert error == pytest.approx(means.std(), rel=0.1)  # the bootstrap's


def test_pairing_resolves_what_lies_within_the_error_of_each():
    original_R = RANDOM.normal(2, 0.5, 200)
    quantized_R = original_R + 0.005 + RANDOM.normal(0, 0.01, 200)
    _, unpaired = mean_and_standard_error(quantized_R)
    delta, paired = mean_and_standard_error(quantized_R - original_R)
    assert unpaired > 0.03
    assert paired < 0.001
    assert delta == pytest.approx(0.005, abs=4 * paired)
