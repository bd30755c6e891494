"""Power laws, against scipy's regression and simulations."""

import numpy as np
import pytest
from scipy import stats

from qat.analysis.powers import power_law


def test_one_variable_equals_scipy():
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 100, 12)
    y = 3 * x**0.7 * np.exp(rng.normal(0, 0.1, 12))
    found = power_law(y, {"x": x})
    expected = stats.linregress(np.log(x), np.log(y))
    row = found.exponents.loc["x"]
    assert row.exponent == pytest.approx(expected.slope)
    half = stats.t.ppf(0.975, 10) * expected.stderr
    assert row.high - row.exponent == pytest.approx(half)
    assert row.exponent - row.low == pytest.approx(half)
    assert found.r2 == pytest.approx(expected.rvalue**2)


def test_two_variables_are_found_and_covered():
    rng = np.random.default_rng(1)
    n, d = map(np.ravel, np.meshgrid(np.geomspace(1, 30, 5), np.geomspace(1, 100, 6)))
    covered = 0
    for _ in range(300):
        y = 2 * n**-0.4 * d**0.6 * np.exp(rng.normal(0, 0.2, n.size))
        row = power_law(y, {"n": n, "d": d}).exponents.loc["n"]
        covered += row.low <= -0.4 <= row.high
    assert 0.91 <= covered / 300 <= 0.985
    exact = power_law(2 * n**-0.4 * d**0.6, {"n": n, "d": d})
    np.testing.assert_allclose(exact.exponents.exponent, [-0.4, 0.6])
    means = np.exp([np.log(n).mean(), np.log(d).mean()])
    assert exact.factor == pytest.approx(2 * means[0] ** -0.4 * means[1] ** 0.6)


@pytest.mark.parametrize(
    ("y", "columns", "message"),
    [
        ([1, 0, 2, 3], {"x": [1, 2, 3, 4]}, "y has 0: a power law"),
        ([1, 2], {"x": [1, 2]}, "2 rows: expected more than 2"),
        ([1, 2, 3, 4], {"a": [1, 2, 3, 4], "b": [2, 4, 6, 8]}, "a, b: the rows do not tell"),
    ],
)
def test_what_is_no_power_law_is_refused(y, columns, message):
    with pytest.raises(ValueError, match=message):
        power_law(np.array(y), {name: np.array(x) for name, x in columns.items()})
