"""Comparisons on tables whose law is known, hold-outs by hand, criteria against closed forms."""

import dataclasses
import functools
import itertools

import numpy as np
import pandas as pd
import pytest

from qat import laws
from qat.laws.compare import _not_worse, compare
from qat.laws.holdout import ORDERED, folds, predicted_apart
from tests.laws.runs import TRAINED

pytestmark = pytest.mark.usefixtures("optimized")

TRUE = {
    "precision_plain": {"gamma_w": 2.67},
    "precision_weibull_plain": {"gamma_w": 2.2, "k_w": 0.6},
    "precision_logistic_plain": {"gamma_w": 1.5},
}


@functools.cache
def runs(law, noise=2e-3):
    """A grid of sizes, budgets and widths from 1 bit up; 120 rows."""
    grid = itertools.product((3e7, 1e8, 3e8), (10, 30, 100, 300, 1000), (1, 2, 3, 4, 6, 8, 12, 16))
    frame = pd.DataFrame(grid, columns=["params", "ratio", "weight_bits"])
    frame["tokens"] = frame.params * frame.ratio
    missing = dict.fromkeys(laws.get_law(law).names, np.nan)
    loss = laws.get_law(law).predict(missing | TRAINED | TRUE[law], frame)
    noisy = loss * np.exp(noise * np.random.default_rng(5).standard_normal(len(frame)))
    return frame.assign(loss=noisy, wave=np.arange(len(frame)) % 3)


@functools.cache
def comparison(law):
    return compare(list(TRUE), runs(law), starts=32, bootstrap=20)


@pytest.mark.parametrize(
    "law", [*list(TRUE)[:1], *(pytest.param(n, marks=pytest.mark.slow) for n in list(TRUE)[1:])]
)
def test_the_law_that_made_the_rows_is_preferred(law):
    found = comparison(law)
    assert found.preferred == law
    assert found.verdict.startswith(f"{law}: no criterion speaks against it (aicc, bic, ")
    rows = found.table.set_index("law")
    assert rows.bic.idxmin() == law
    assert (rows.loc[law, list(ORDERED)] < 0.006).all()


def test_criteria_are_those_of_the_normal_likelihood():
    frame = runs("precision_plain")
    found = compare(list(TRUE), frame, holdout=(), loss="l2", bootstrap=0, starts=32)
    expected = {}
    for name, parameters in zip(TRUE, (6, 7, 6), strict=True):
        fit = laws.fit(name, frame, loss="l2", bootstrap=0, starts=32)
        count, k = len(frame), parameters + 1
        variance = np.mean(np.log(fit.predict(frame) / frame.loss) ** 2)
        twice = count * (np.log(2 * np.pi * variance) + 1)
        corrected = 2 * k + 2 * k * (k + 1) / (count - k - 1)
        expected[name] = twice + corrected, twice + k * np.log(count)
    best = np.min(list(expected.values()), axis=0)
    for row in found.table.itertuples():
        np.testing.assert_allclose((row.aicc, row.bic), expected[row.law] - best, atol=1e-4)
    assert set(found.admitted) == {"aicc", "bic"}


def test_where_criteria_disagree_there_is_no_verdict_but_intervals():
    found = comparison("precision_plain")
    contradicting = type(found)(
        found.fits,
        found.table,
        {"aicc": ("precision_plain",), "bic": ("precision_weibull_plain",)},
        {},
        {},
    )
    assert contradicting.preferred is None
    assert "disagree" in contradicting.verdict
    shown = contradicting.intervals()
    assert set(shown[shown.parameter == "gamma_w"].law) == set(TRUE)
    told = shown[shown.parameter.isin(["E", "alpha", "beta", "gamma_w"])]
    assert (told.low < told.value).all()
    assert (told.value < told.high).all()
    assert "E" in set(shown.parameter)


def test_a_law_that_says_nothing_of_some_rows_is_not_preferred():
    true = laws.get_law("precision_plain")
    narrow = dataclasses.replace(true, name="narrow", domain=lambda p, c: c["weight_bits"] > 1)
    other = "precision_logistic_plain"
    found = compare([narrow, other], runs("precision_plain"), holdout=(), bootstrap=0, starts=32)
    assert found.fits["narrow"].diagnostics.rows_outside_domain == 15
    assert found.table.set_index("law").aicc.tolist() == [np.inf, 0.0]
    assert found.preferred == other


def test_residuals_of_held_out_rows_are_those_that_the_table_sums_up():
    found = comparison("precision_plain")
    for name, error_LR in found.held_out.items():
        held_R = ~np.isnan(error_LR[0])
        assert 0 < held_R.sum() < error_LR.shape[1]
        rms_L = np.sqrt((error_LR[:, held_R] ** 2).mean(axis=1))
        np.testing.assert_allclose(found.table[name], rms_L)


def test_held_out_rows_are_the_farthest():
    table = laws.as_table(runs("precision_plain"))
    (largest,) = folds("largest-params", table)
    assert (largest == (table.frame.params == 3e8)).all()
    (bits,) = folds("lowest-bits", table)
    assert (bits == (table.frame.weight_bits == 1)).all()
    (ratio,) = folds("longest-ratio", table)
    assert (ratio == (table.frame.ratio == 1000)).all()
    (compute,) = folds("largest-compute", table)
    product = table.frame.params * table.frame.tokens
    assert compute.sum() >= 12
    assert product[compute].min() > product[~compute].max()
    waves = folds("each:wave", table)
    assert np.sum(waves, axis=0).tolist() == [1] * len(table)


def test_errors_are_those_of_a_fit_without_the_fold():
    table = laws.as_table(runs("precision_plain"))
    fitted = functools.partial(laws.fit, "precision_plain", bootstrap=0, starts=16)
    (held,) = folds("largest-params", table)
    found, impossible = predicted_apart("largest-params", table, [fitted])
    (error,) = found["largest-params"]
    assert impossible == {}
    again = fitted(table.frame[~held])
    expected = np.log(again.predict(table.frame[held]) / table.frame.loss[held])
    np.testing.assert_allclose(error[held], expected)
    assert np.isnan(error[~held]).all()


def test_worse_is_by_more_than_chance_and_by_run():
    rng = np.random.default_rng(0)
    good = rng.standard_normal(40)
    bad = 3 * rng.standard_normal(40)
    assert _not_worse(np.array([good, bad]), np.arange(40)).tolist() == [True, False]
    # All of it in one run: the difference is one draw.
    assert _not_worse(np.array([good, bad]), np.zeros(40, int)).tolist() == [True, False]
    one = good.copy()
    one[7] = 30.0
    assert _not_worse(np.array([good, one]), np.arange(40)).tolist() == [True, True]
    assert _not_worse(np.array([good, np.full(40, np.inf)]), np.arange(40)).tolist() == [
        True,
        False,
    ]


def test_what_cannot_be_held_out_is_said():
    table = laws.as_table(runs("precision_plain").query("weight_bits == 16"))
    fitted = functools.partial(laws.fit, "chinchilla", bootstrap=0, starts=8)
    held, impossible = predicted_apart(ORDERED, table, [fitted])
    assert set(held) == set(ORDERED) - {"lowest-bits"}
    assert impossible["lowest-bits"] == "hold-out 'lowest-bits': all rows have one value, 16"
    with pytest.raises(ValueError, match="one value, 16"):
        predicted_apart("lowest-bits", table, [fitted])


def test_a_hold_out_that_leaves_too_little_is_named():
    table = laws.as_table(runs("precision_plain").query("params < 3e8"))
    fitted = functools.partial(laws.fit, "chinchilla", bootstrap=0, starts=8)
    with pytest.raises(ValueError, match="hold-out 'largest-params': all 40 rows have params"):
        predicted_apart("largest-params", table, [fitted])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"laws": ["chinchilla"]}, "a comparison needs at least two laws, not chinchilla"),
        ({"holdout": "largest-param"}, "unknown hold-out 'largest-param': .*'largest-params'"),
        ({"holdout": "each:sed"}, "unknown column of a hold-out 'sed'"),
        ({"holdout": "each:status"}, "all rows have status = ok"),
    ],
)
def test_bad_input_is_named_in_one_line(arguments, message):
    call = {"laws": list(TRUE), "table": runs("precision_plain").assign(status="ok")} | arguments
    with pytest.raises(ValueError, match=message) as raised:
        compare(call.pop("laws"), call.pop("table"), bootstrap=0, starts=8, **call)
    assert "\n" not in str(raised.value)
