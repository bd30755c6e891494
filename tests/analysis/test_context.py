"""Bins of positions, and what is in them."""

import numpy as np
import pytest

from qat.analysis import by_position, edges, mean_and_standard_error


@pytest.mark.parametrize(
    ("positions", "bins", "spacing", "expected"),
    [
        (512, 4, "log", (0, 64, 128, 256, 512)),
        (64, 20, "log", (0, 1, 2, 4, 8, 16, 32, 64)),
        (100, 4, "log", (0, 12, 25, 50, 100)),
        (100, 4, "equal", (0, 25, 50, 75, 100)),
        (3, 8, "equal", (0, 1, 2, 3)),
        (1, 1, "log", (0, 1)),
    ],
)
def test_edges(positions, bins, spacing, expected):
    assert edges(positions, bins, spacing) == expected


def test_every_position_is_in_one_bin_with_the_error_of_its_difference():
    random = np.random.default_rng(0)
    growing_T = np.linspace(0, 0.1, 64)
    values_RT = growing_T + random.normal(0, 0.5, (100, 1)) + random.normal(0, 0.01, (100, 64))
    ends = edges(64, 5)
    found = by_position(values_RT, ends)
    for (mean, error), start, stop in zip(found, ends[:-1], ends[1:], strict=True):
        expected = mean_and_standard_error(values_RT[:, start:stop].sum(axis=1) / (stop - start))
        assert (mean, error) == pytest.approx(expected)
    sizes = np.diff(ends)
    assert np.dot([mean for mean, _ in found], sizes) / 64 == pytest.approx(values_RT.mean())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "0 positions in 4 bins: expected at least 1"),
        ((4, 0), "4 positions in 0 bins"),
        ((4, 2, "logs"), "unknown spacing 'logs'.*nearest is 'log'"),
    ],
)
def test_bad_bins_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        edges(*arguments)
