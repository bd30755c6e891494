"""Resamples, intervals, profiles and sensitivities against theory, scipy and plain refits."""

import functools
from typing import Annotated

import numpy as np
import pandas as pd
import pytest
from jax import Array
from scipy import stats
from scipy.optimize import least_squares

from qat import laws
from qat.laws import uncertainty
from qat.laws.diagnostics import standard_deviations
from qat.laws.likelihood import (
    _log_normaliser,
    deviance_unit,
    huber,
    log_likelihood,
    overdispersion,
)
from qat.laws.profile import profile
from qat.laws.sensitivity import sensitivity
from qat.laws.solver import Rows
from tests.laws.runs import CHINCHILLA, ROWS, chinchilla_runs

pytestmark = pytest.mark.usefixtures("optimized")

NAMES = ("A", "B", "E", "alpha", "beta")


@functools.cache
def runs():
    return chinchilla_runs(noise=5e-3, seed=1)


@functools.cache
def squares(resampling="runs"):
    return laws.fit("chinchilla", runs(), loss="l2", bootstrap=400, resampling=resampling)


def residual(u, frame):
    """Chinchilla in plain NumPy, u = log A, log B, log E, alpha, beta."""
    log_n, log_d, log_loss = np.log(frame[["params", "tokens", "loss"]].to_numpy().T)
    terms = np.exp(u[0] - u[3] * log_n) + np.exp(u[1] - u[4] * log_d) + np.exp(u[2])
    return np.log(terms) - log_loss


def solve(frame, held=None, value=None, start=None):
    """Least squares by scipy, with one coordinate held; the sum of squares and the optimum."""
    free = [i for i in range(5) if i != held]

    def full(v):
        u = np.zeros(5)
        u[free] = v
        if held is not None:
            u[held] = value
        return u

    start = np.array([*np.log([480, 2100, 1.8]), 0.35, 0.37]) if start is None else start
    found = least_squares(
        lambda v: residual(full(v), frame), start[free], x_scale="jac", xtol=1e-15, ftol=1e-15
    )
    return 2 * found.cost, full(found.x)


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_ends_where_refits_by_scipy_pass_the_threshold_of_f(name):
    fit, index = squares(), NAMES.index(name)
    best, u = solve(runs())
    low, high = profile(fit, runs(), name).interval
    threshold = best * (1 + stats.f.ppf(0.95, 1, ROWS - 5) / (ROWS - 5))
    for end in (low, high):
        coordinate = end if name in ("alpha", "beta") else np.log(end)
        reached, _ = solve(runs(), index, coordinate, start=u)
        rise = (reached - best) / (threshold - best)
        assert np.sqrt(rise) == pytest.approx(1, abs=0.02)
    assert low < fit.params[name] < high


def test_a_profile_of_what_the_data_do_not_bound_has_no_end():
    """Over a factor of three in size and data, E may be anything below the losses."""
    frame = chinchilla_runs(noise=0.0)
    frame["params"], frame["tokens"] = (3e8**0.8 * frame[n] ** 0.2 for n in ("params", "tokens"))
    frame["loss"] = laws.get_law("chinchilla").predict(CHINCHILLA, frame)
    frame["loss"] *= np.exp(0.01 * np.random.default_rng(0).standard_normal(ROWS))
    fit = laws.fit("chinchilla", frame, loss="l2", bootstrap=0, starts=64)
    low, high = profile(fit, frame, "E").interval
    assert low == 0.0
    assert fit.params["E"] < high < frame.loss.min()


def test_wild_pairs_and_theory_agree_where_noise_is_normal():
    best, u = solve(runs())
    jacobian = least_squares(residual, u, args=(runs(),), max_nfev=1).jac
    variance = best / (ROWS - 5) * np.linalg.inv(jacobian.T @ jacobian)
    expected = np.sqrt(np.diag(variance))
    for resampling in ("runs", "wild"):
        samples = squares(resampling).samples
        spread = [np.log(samples[p]).std() for p in "ABE"]
        spread += [samples[p].std() for p in ("alpha", "beta")]
        np.testing.assert_allclose(spread, expected, rtol=0.3)


def test_rows_of_one_run_are_drawn_together():
    """Every run four times over says no more than once: by row the interval is half as wide."""
    frame = pd.concat([runs().assign(run_id=range(ROWS))] * 4, ignore_index=True)
    widths = {}
    for resampling in ("runs", "rows"):
        fit = laws.fit("chinchilla", frame, loss="l2", bootstrap=200, resampling=resampling)
        low, high = fit.interval("E")
        widths[resampling] = high - low
        assert (fit.diagnostics.runs, fit.diagnostics.rows) == (ROWS, 4 * ROWS)
    low, high = squares().interval("E")
    assert widths["runs"] == pytest.approx(high - low, rel=0.15)
    assert widths["rows"] == pytest.approx(widths["runs"] / 2, rel=0.25)


def test_resampled_weights_and_signs_are_those_of_whole_runs():
    rng, run_R = np.random.default_rng(0), np.array([0, 0, 1, 2, 2, 2])
    rows = Rows(np.full(6, 2.0), np.arange(6.0))
    drawn = uncertainty.resample(rng, "runs", 50, run_R, rows, np.zeros(6), 1)
    assert (drawn.weight[:, 0] == drawn.weight[:, 1]).all()
    assert (drawn.weight[:, [0, 2, 3]].sum(axis=1) == 2.0 * 3).all()
    wild = uncertainty.resample(rng, "wild", 50, run_R, rows, np.ones(6), 1)
    moved_SR = (wild.log_loss - 1.0) / np.where(rows.log_loss == 1.0, 1.0, rows.log_loss - 1.0)
    np.testing.assert_allclose(np.abs(moved_SR[:, [0, 2, 5]]), np.sqrt(6 / 5))
    assert (moved_SR[:, 3] == moved_SR[:, 5]).all()
    assert len(np.unique(moved_SR[:, 3])) == 2
    assert (wild.weight == 2.0).all()


def test_t_corrected_intervals_are_those_of_student_for_a_mean():
    """The mean of 8 normal values: Student's interval, where percentiles are too narrow."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(8)
    means = rng.choice(values, (200_000, 8)).mean(axis=1)
    student = stats.t.interval(0.95, 7, values.mean(), values.std(ddof=1) / np.sqrt(8))
    corrected = uncertainty.interval(means, 0.95, "t", runs=8, parameters=1)
    plain = uncertainty.interval(means, 0.95, "percentile", runs=8, parameters=1)
    assert np.diff(corrected) == pytest.approx(np.diff(student), rel=0.1)
    assert np.diff(plain) < 0.8 * np.diff(student)
    np.testing.assert_allclose(plain, np.percentile(means, [2.5, 97.5]))


def test_interval_of_what_is_derived_follows_the_draws():
    fit = squares()
    low, high = fit.interval(lambda p: p["beta"] / (p["alpha"] + p["beta"]), kind="percentile")
    share = fit.samples["beta"] / (fit.samples["alpha"] + fit.samples["beta"])
    np.testing.assert_allclose((low, high), np.percentile(share, [2.5, 97.5]))
    narrow = fit.interval("E", level=0.5)
    assert fit.interval("E")[0] < narrow[0] < narrow[1] < fit.interval("E")[1]
    with pytest.raises(ValueError, match=r"unknown parameter 'alhpa'.*nearest is 'alpha'"):
        fit.interval("alhpa")
    with pytest.raises(ValueError, match="level must be between 0 and 1, not 95"):
        fit.interval("E", level=95)


def test_log_likelihood_is_that_of_gauss_and_laplace_at_the_ends():
    rng = np.random.default_rng(0)
    values, ones = rng.standard_normal(300) * 0.02, np.ones(300)
    gauss = stats.norm.logpdf(values, scale=np.sqrt(np.mean(values**2))).sum()
    laplace = stats.laplace.logpdf(values, scale=np.mean(np.abs(values))).sum()
    assert log_likelihood(values, ones, np.inf)[0] == pytest.approx(gauss, abs=1e-6)
    assert log_likelihood(values, ones, 1e-9)[0] == pytest.approx(laplace, abs=1e-3)
    weighted = np.where(values > 0, 4.0, 1.0)
    expected = max(
        stats.norm.logpdf(values, scale=scale / np.sqrt(weighted)).sum()
        for scale in np.geomspace(0.01, 0.1, 2000)
    )
    assert log_likelihood(values, weighted, np.inf)[0] == pytest.approx(expected, abs=1e-3)


def test_differences_of_likelihoods_are_chi_squared_once_divided_by_the_overdispersion():
    """Of normal noise taken for Laplace's, at the mean and at the truth."""
    rng, delta = np.random.default_rng(0), 0.05
    found = []
    for _ in range(300):
        values = rng.standard_normal(200)
        grid = np.linspace(-0.5, 0.5, 401)
        best = values - grid[huber(values[None] - grid[:, None], delta).sum(axis=1).argmin()]
        rise = log_likelihood(best, np.ones(200), delta)[0]
        rise -= log_likelihood(values, np.ones(200), delta)[0]
        found.append(2 * rise / overdispersion(best, np.ones(200), delta))
    assert np.mean(np.array(found) < stats.chi2.ppf(0.9, 1)) == pytest.approx(0.9, abs=0.04)
    assert overdispersion(values, np.ones(200), np.inf) == pytest.approx(1.0, abs=1e-3)
    assert overdispersion(values, np.ones(200), delta) == pytest.approx(np.pi / 2, rel=0.15)


def test_the_density_of_hubers_function_integrates_to_one():
    grid = np.linspace(-2, 2, 400_001)
    for delta, scale in ((0.01, 1e-4), (0.05, 1e-4), (0.2, 1e-3)):
        density = np.exp(-huber(grid, delta) / scale)
        z = np.exp(_log_normaliser(np.array([scale]), delta))[0]
        assert np.trapezoid(density, grid) == pytest.approx(z, rel=1e-4)


def test_deviances_of_a_robust_mean_are_chi_squared():
    """At the truth, the rise of Huber's objective for a mean of noise with heavy tails."""
    rng, delta = np.random.default_rng(0), 0.5
    found = []
    for _ in range(400):
        values = rng.standard_t(3, 100)
        grid = np.linspace(-1, 1, 2001)
        objective = huber(values[None] - grid[:, None], delta).sum(axis=1)
        best = grid[objective.argmin()]
        rise = huber(values, delta).sum() - objective.min()
        found.append(rise * deviance_unit(values - best, np.ones(100), delta, 1))
    share = np.mean(np.array(found) < stats.chi2.ppf(0.95, 1))
    assert share == pytest.approx(0.95, abs=0.03)


def test_dropped_runs_and_other_losses_are_refits():
    frame = runs().copy()
    frame.loc[17, "loss"] *= 1.1
    fit = laws.fit("chinchilla", frame, bootstrap=50, starts=64)
    answers = sensitivity(fit, frame)
    assert answers.by_dropped["shift"].is_monotonic_decreasing
    for run in (3, 17):
        again = laws.fit("chinchilla", frame.drop(index=run), bootstrap=0, starts=64)
        row = answers.by_dropped[answers.by_dropped.run == run].iloc[0]
        assert row["beta"] == pytest.approx(again.params["beta"], rel=1e-5)
    by_loss = answers.by_loss.set_index("loss")
    for name, options in {
        "l2": {"loss": "l2"},
        "lad": {"loss": "lad"},
        "huber 0.003": {"delta": 3e-3},
    }.items():
        again = laws.fit("chinchilla", frame, bootstrap=0, starts=64, **options)
        assert by_loss.beta[name] == pytest.approx(again.params["beta"], rel=1e-5)


def test_weights_of_standard_errors_outdo_equal_ones_where_noise_differs():
    """Half the runs ten times as noisy, and said to be."""
    errors = {"equal": [], "loss_se": []}
    for seed in range(12):
        frame = chinchilla_runs(noise=0.0)
        noise = np.where(np.arange(ROWS) % 2, 0.03, 0.003)
        rng = np.random.default_rng(seed)
        frame["loss_se"] = noise * frame.loss
        frame["loss"] *= np.exp(noise * rng.standard_normal(ROWS))
        for weights, found in errors.items():
            fit = laws.fit(
                "chinchilla", frame, loss="l2", weights=weights, bootstrap=0, starts=16, seed=seed
            )
            found.append(fit.params["E"] - CHINCHILLA["E"])
    assert np.std(errors["loss_se"]) < 0.5 * np.std(errors["equal"])


def test_weights_need_their_column():
    with pytest.raises(ValueError, match="no column loss_se"):
        laws.fit("chinchilla", runs(), weights="loss_se", bootstrap=0, starts=8)


def test_fixed_parameters_stay_and_are_known():
    fit = laws.fit("chinchilla", runs(), fixed={"E": 1.8}, bootstrap=50, starts=32)
    assert fit.params["E"] == 1.8
    assert "E" not in fit.samples
    assert fit.diagnostics.parameters == 4
    free = squares().interval("alpha")
    low, high = fit.interval("alpha")
    assert high - low < free[1] - free[0]
    with pytest.raises(ValueError, match="unknown fixed parameter 'e'"):
        laws.fit("chinchilla", runs(), fixed={"e": 1.8})
    with pytest.raises(ValueError, match="fixed E must be a positive number, not -1"):
        laws.fit("chinchilla", runs(), fixed={"E": -1})


def test_one_ratio_of_tokens_to_parameters_and_repeated_rows_are_flagged():
    frame = pd.DataFrame({"params": np.geomspace(1e7, 1e9, 20)})
    frame["tokens"] = 20 * frame.params
    frame["loss"] = laws.get_law("chinchilla").predict(CHINCHILLA, frame)
    frame = pd.concat([frame, frame.iloc[:3]], ignore_index=True)
    found = laws.fit("chinchilla", frame, bootstrap=0, starts=32).diagnostics
    assert set(found.few_values) == {"A", "B", "alpha", "beta"}
    assert found.duplicates == 3
    assert any("repeat" in flag for flag in found.flags)


def test_rows_whose_bits_the_law_does_not_read_are_flagged():
    frame = runs().assign(ptq_bits=np.where(np.arange(ROWS) % 2, 4, 16), kv_bits=8)
    found = laws.fit("chinchilla", frame, bootstrap=0, starts=16).diagnostics
    assert found.ignored == ("ptq_bits",)
    assert "the law does not read what differs between rows: ptq_bits" in found.flags


def test_parameters_that_trade_off_or_do_nothing_are_unidentified():
    @laws.law("A N^-alpha + B D^-beta + E + F")
    def doubled(
        params: Array,
        tokens: Array,
        *,
        A: Annotated[Array, laws.amplitude("nats", per={"params": "alpha"})],
        B: Annotated[Array, laws.amplitude("nats", per={"tokens": "beta"})],
        E: Annotated[Array, laws.irreducible()],
        F: Annotated[Array, laws.irreducible()],
        alpha: Annotated[Array, laws.exponent("of size")],
        beta: Annotated[Array, laws.exponent("of data")],
        idle: Annotated[Array, laws.positive("of nothing", (0.1, 10.0), (0.5, 2.0))],
    ) -> Array:
        return A * params**-alpha + B * tokens**-beta + E + F + 0 * idle

    found = laws.fit(doubled, runs(), bootstrap=50, starts=32).diagnostics
    assert set(found.flat) == {"E", "F", "idle"}
    assert set(found.flat) <= set(found.unidentified)


def test_standard_deviations_are_those_of_the_inverse():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((9, 4)) * [1.0, 1e3, 1e-3, 1.0]
    curvature = root.T @ root
    expected = np.sqrt(np.diag(np.linalg.inv(curvature)))
    np.testing.assert_allclose(standard_deviations(curvature), expected, rtol=1e-6)
    assert np.isinf(standard_deviations(np.diag([1.0, 0.0]))).tolist() == [False, True]


def test_a_law_without_a_finite_loss_is_refused():
    @laws.law("-A")
    def negative(params: Array, *, A: Annotated[Array, laws.irreducible()]) -> Array:
        return -A + 0 * params

    with pytest.raises(ValueError, match="law 'negative' gives no finite, positive loss"):
        laws.fit(negative, runs(), bootstrap=0, starts=8)
    unknown = runs().assign(weight_bits=np.where(np.arange(ROWS) == 5, 2, 16))
    with pytest.raises(ValueError, match=r"no finite, positive loss to all rows.*at row 5"):
        laws.fit("free_w3", unknown, bootstrap=0, starts=8)


def test_rows_without_a_run_id_are_runs_of_their_own():
    frame = runs().assign(run_id=["a", "a", None, "b", np.nan] * (ROWS // 5))
    run_R = uncertainty.runs_of(laws.as_table(frame))
    assert run_R.max() + 1 == 2 + 2 * ROWS // 5
    assert (run_R[:2] == 0).all()
    assert len(set(run_R[[2, 4, 7, 9]])) == 4
    found = laws.fit("chinchilla", frame.assign(run_id="a"), bootstrap=20, starts=8).diagnostics
    assert "only 1 runs for 5 parameters" in found.flags


def test_another_table_than_the_fits_is_refused():
    fit, other = squares(), runs().assign(loss=runs().loss * 1.001)
    for ask in (
        lambda: profile(fit, other, "E"),
        lambda: sensitivity(fit, other),
        lambda: laws.next_runs(fit, other, other, "E"),
    ):
        with pytest.raises(ValueError, match="the table is not the one of the fit"):
            ask()


def test_all_parameters_fixed_is_no_fit():
    with pytest.raises(ValueError, match="all parameters of 'chinchilla' are fixed"):
        laws.fit("chinchilla", runs(), fixed=CHINCHILLA)
