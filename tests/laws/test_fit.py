"""Fits against known parameters, scipy and finite differences; flags, files and bad input."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy.optimize import least_squares, minimize

from qat import laws
from qat.laws.diagnostics import condition_number
from qat.laws.law import float64_on_cpu
from qat.laws.solver import Rows, evaluate, pose
from tests.laws.runs import (
    CHINCHILLA,
    KV_CACHE,
    PRECISION,
    PTQ,
    ROWS,
    chinchilla_runs,
    precision_runs,
)

pytestmark = pytest.mark.usefixtures("optimized")


@functools.cache
def noisy_fit(name):
    runs = {"chinchilla": chinchilla_runs, "precision": precision_runs}[name]
    return laws.fit(name, runs(noise=2e-3), bootstrap=200)


def log_residual(u, runs):
    """Chinchilla in plain NumPy, u = log A, log B, log E, alpha, beta."""
    log_n, log_d, log_loss = np.log(runs[["params", "tokens", "loss"]].to_numpy().T)
    predicted = np.exp(u[0] - u[3] * log_n) + np.exp(u[1] - u[4] * log_d) + np.exp(u[2])
    return np.log(predicted) - log_loss


def huber(residual, delta):
    size = np.abs(residual)
    return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum()


@pytest.mark.parametrize("loss", ["huber", "lad", "l2"])
def test_chinchilla_recovers_exact_parameters(loss):
    fit = laws.fit("chinchilla", chinchilla_runs(noise=0), loss=loss, bootstrap=0, starts=64)
    for name, value in CHINCHILLA.items():
        assert fit.params[name] == pytest.approx(value, rel=1e-7)
    assert fit.diagnostics.share_at_best > 0.9


def test_precision_recovers_exact_parameters():
    fit = laws.fit("precision", precision_runs(noise=0), bootstrap=0)
    for name, value in PRECISION.items():
        assert fit.params[name] == pytest.approx(value, rel=1e-6), name
    assert fit.diagnostics.share_at_best > 0.5
    # Few sizes and no noise: some runs are drawn twice.
    assert [flag for flag in fit.diagnostics.flags if "repeat" not in flag] == []


@pytest.mark.parametrize(("name", "truth"), [("chinchilla", CHINCHILLA), ("precision", PRECISION)])
def test_intervals_cover_the_parameters_of_noisy_runs(name, truth):
    fit = noisy_fit(name)
    covered = [low <= truth[p] <= high for p, (low, high) in fit.intervals.items()]
    assert np.mean(covered) >= 0.8
    for parameter, (low, high) in fit.intervals.items():
        assert low < fit.params[parameter] < high
        assert len(fit.samples[parameter]) == 200
    assert fit.diagnostics.r2 > 0.99
    assert fit.diagnostics.median_relative_error == pytest.approx(0.67 * 2e-3, rel=0.3)


def test_bootstrap_spread_is_that_of_least_squares_theory():
    """With normal residuals the bootstrap must agree with the covariance s² (JᵀJ)⁻¹ of scipy."""
    runs = chinchilla_runs(noise=5e-3, seed=1)
    fit = laws.fit("chinchilla", runs, loss="l2", bootstrap=400)
    start = [*np.log([fit.params[p] for p in "ABE"]), fit.params["alpha"], fit.params["beta"]]
    solved = least_squares(log_residual, start, args=(runs,), xtol=1e-14, ftol=1e-14, gtol=1e-14)
    variance = 2 * solved.cost / (ROWS - 5) * np.linalg.inv(solved.jac.T @ solved.jac)
    spread = [np.log(fit.samples[p]).std() for p in "ABE"]
    spread += [fit.samples[p].std() for p in ("alpha", "beta")]
    np.testing.assert_allclose(spread, np.sqrt(np.diag(variance)), rtol=0.3)


def test_the_optimum_is_stationary():
    for name in ("chinchilla", "precision"):
        diagnostics = noisy_fit(name).diagnostics
        assert diagnostics.gradient_norm < 1e-4 * diagnostics.objective
        assert diagnostics.bootstrap_converged > 0.95


def test_condition_number_is_that_of_the_correlations():
    correlation = np.array([[1.0, 0.9], [0.9, 1.0]])
    scaled = correlation * np.outer([1.0, 1e5], [1.0, 1e5])
    assert condition_number(scaled) == pytest.approx(1.9 / 0.1)
    assert 1e15 < condition_number(np.zeros((2, 2))) < np.inf


def test_objective_is_not_worse_than_the_best_of_many_scipy_starts():
    runs, fit = chinchilla_runs(noise=2e-3), noisy_fit("chinchilla")
    rng = np.random.default_rng(0)
    bounds = [(0, 12), (0, 15), (-2, 2), (0.05, 1), (0.05, 1)]
    found = []
    for _ in range(20):
        solved = minimize(
            lambda u: 1e4 * huber(log_residual(u, runs), 1e-3),  # its tolerances are absolute
            rng.uniform([3, 4, 0, 0.2, 0.2], [8, 10, 1, 0.6, 0.6]),
            bounds=bounds,
            options={"ftol": 1e-13, "maxfun": 20000},
        )
        found.append(solved.fun / 1e4)
    assert fit.diagnostics.objective <= min(found) * (1 + 1e-9)
    assert fit.diagnostics.objective == pytest.approx(min(found), rel=1e-3)
    u = [*np.log([fit.params[p] for p in "ABE"]), fit.params["alpha"], fit.params["beta"]]
    assert huber(log_residual(u, runs), 1e-3) == pytest.approx(fit.diagnostics.objective, rel=1e-9)


def test_least_absolute_deviation_passes_through_as_many_runs_as_parameters():
    """The vertex property of an L1 fit; its objective is the sum of absolute residuals."""
    runs = chinchilla_runs(noise=2e-3)
    fit = laws.fit("chinchilla", runs, loss="lad", bootstrap=0)
    residual = np.abs(np.log(fit.predict(runs) / runs["loss"]))
    assert (residual < 2e-7).sum() == 5
    assert fit.diagnostics.objective == pytest.approx(residual.sum(), rel=1e-4)


def test_robust_losses_ignore_an_outlier_that_least_squares_does_not():
    runs = chinchilla_runs(noise=0)
    runs.loc[3, "loss"] *= 1.5
    errors = {}
    for loss in ("huber", "lad", "l2"):
        fit = laws.fit("chinchilla", runs, loss=loss, bootstrap=0, starts=64)
        errors[loss] = abs(fit.params["E"] - CHINCHILLA["E"])
    assert errors["lad"] < 1e-6
    assert errors["huber"] < 1e-3
    assert errors["l2"] > 3e-3


def test_gradient_of_the_objective_against_finite_differences():
    law, table = laws.get_law("precision"), laws.as_table(precision_runs(noise=2e-3))
    low_P, high_P = law.coordinates("starts")
    weight_R = np.random.default_rng(0).poisson(1.0, 128).astype(float)
    weight_R[ROWS:] = 0
    with float64_on_cpu():
        problem = pose(law, table, np.full(15, np.nan))
        log_loss_R = np.pad(np.log(table.frame["loss"].to_numpy()), (0, 128 - ROWS), "edge")
        rows = Rows(jnp.asarray(weight_R), jnp.asarray(log_loss_R))
        compiled = jax.jit(functools.partial(evaluate, law, problem))
        for delta in (1e-3, 0.1, np.inf):
            fixed = functools.partial(compiled, jnp.asarray(delta), rows)
            u_P = 0.5 * (low_P + high_P)
            differences_P = [
                float(fixed(u_P + step_P)[0] - fixed(u_P - step_P)[0]) / 2e-6
                for step_P in 1e-6 * np.eye(15)
            ]
            np.testing.assert_allclose(fixed(u_P)[1], differences_P, rtol=1e-5, atol=1e-7)


def test_parameters_without_data_are_left_out_and_flagged():
    runs = precision_runs(noise=0, varied=("weight_bits", "activation_bits"))
    fit = laws.fit("precision", runs, bootstrap=20, starts=64)
    assert fit.diagnostics.no_data == (*KV_CACHE, *PTQ)
    assert "no data: gamma_kv, n_kv, C_T, gamma_D, gamma_N, gamma_post" in fit.diagnostics.flags
    for name in PRECISION:
        missing = name in KV_CACHE | PTQ
        assert np.isnan(fit.params[name]) == missing
        assert np.isnan(fit.intervals[name]).all() == missing
        assert (name in fit.samples) != missing
    # Left out means a factor of exactly one: weights and activations keep their parameters.
    assert fit.params["gamma_w"] == pytest.approx(PRECISION["gamma_w"], rel=1e-3)
    np.testing.assert_allclose(fit.predict(runs), runs["loss"], rtol=1e-6)
    assert np.isnan(fit.predict(runs.assign(kv_bits=4))).all()


def test_two_widths_are_too_few_for_a_slope_and_an_offset():
    runs = precision_runs(noise=1e-3, varied=("weight_bits", "ptq_bits"))
    runs["weight_bits"] = runs["weight_bits"].clip(4, 5).where(runs["weight_bits"] < 16, 16)
    runs.loc[runs["ptq_bits"] < 16, "params"] = 6e7
    runs["loss"] = laws.get_law("precision").predict(PRECISION, runs)
    diagnostics = laws.fit("precision", runs, bootstrap=0, starts=64).diagnostics
    assert diagnostics.few_values == ("gamma_w", "n_w", "gamma_N")
    assert set(diagnostics.few_values) <= set(diagnostics.unidentified)
    assert any("gamma_w, n_w" in flag for flag in diagnostics.flags)


def test_a_term_the_data_lack_ends_at_a_bound_and_is_flagged():
    runs = chinchilla_runs(noise=0)
    runs["loss"] = 480.0 * runs["params"] ** -0.35 + 1.8
    diagnostics = laws.fit("chinchilla", runs, bootstrap=0, starts=64).diagnostics
    assert diagnostics.at_bound
    assert set(diagnostics.at_bound) <= {"B", "beta"}
    assert set(diagnostics.at_bound) <= set(diagnostics.unidentified)


def test_a_run_below_the_zero_of_an_efficiency_does_not_break_the_fit():
    runs = precision_runs(noise=0, varied=("activation_bits",))
    runs = pd.concat([runs, runs.iloc[:1].assign(activation_bits=1, loss=9.0)], ignore_index=True)
    fit = laws.fit("precision", runs, bootstrap=0, starts=64)
    assert np.isfinite(fit.diagnostics.objective)
    assert fit.params["E"] == pytest.approx(PRECISION["E"], rel=0.02)
    predicted = fit.predict(runs)
    assert np.isfinite(predicted[:-1]).all()
    assert np.isnan(predicted).sum() == fit.diagnostics.rows_outside_domain


def test_the_seed_decides_everything():
    runs = chinchilla_runs(noise=2e-3)
    first, again, other = (
        laws.fit("chinchilla", runs, bootstrap=20, starts=32, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    assert first.intervals["A"] != other.intervals["A"]


@pytest.mark.parametrize("bootstrap", [0, 20])
def test_a_saved_fit_loads_equal(tmp_path, bootstrap):
    runs = precision_runs(noise=1e-3, varied=("weight_bits",))
    fit = laws.fit("precision", runs, bootstrap=bootstrap, starts=32, seed=5)
    fit.save(tmp_path / "fit.json")
    loaded = laws.load(tmp_path / "fit.json")
    assert loaded == fit
    assert hash(loaded) == hash(fit)
    assert np.isnan(loaded.params["gamma_kv"])
    assert loaded.settings == fit.settings
    np.testing.assert_array_equal(loaded.predict(runs), fit.predict(runs))
    changed = dataclasses.replace(loaded, params=loaded.params | {"E": 1.0})
    assert changed != fit


def test_a_saved_fit_is_plain_json_with_units(tmp_path):
    noisy_fit("chinchilla").save(tmp_path / "fit.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((tmp_path / "fit.json").read_text(), parse_constant=refuse)
    assert content["law"] == "chinchilla"
    assert content["units"]["loss"] == "nats per token"
    assert "nats" in content["units"]["A"]
    assert content["settings"] == dataclasses.asdict(noisy_fit("chinchilla").settings)


def test_rows_and_sizes_are_counted():
    runs = chinchilla_runs(noise=1e-3).assign(status="ok")
    runs.loc[[0, 7], "status"] = "diverged"
    runs = pd.concat([runs, runs.iloc[1:2]], ignore_index=True)
    diagnostics = laws.fit("chinchilla", runs, bootstrap=0, starts=8).diagnostics
    assert (diagnostics.rows, diagnostics.sizes) == (ROWS - 1, ROWS - 2)
    assert diagnostics.rows_left_out == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"law": "precison"}, "unknown law 'precison': .*nearest is 'precision'"),
        ({"loss": "hubber"}, "unknown loss 'hubber': .*nearest is 'huber'"),
        ({"delta": 0.0}, "delta must be positive and finite, not 0.0"),
        ({"bootstrap": -1}, "bootstrap must be at least 0, not -1"),
        ({"starts": 0}, "starts must be at least 1, not 0"),
        ({"table": chinchilla_runs(0).iloc[:4]}, "4 rows cannot fit 5 parameters"),
        ({"table": chinchilla_runs(0).drop(columns="loss")}, "no column loss"),
        ({"table": chinchilla_runs(0).assign(params=1e8)}, "all 120 rows have params = 1e.08"),
        ({"table": chinchilla_runs(0).assign(tokens=1e9)}, "exponent beta needs at least two"),
    ],
)
def test_bad_input_is_named_in_one_line(arguments, message):
    call = {"law": "chinchilla", "table": chinchilla_runs(0), "bootstrap": 0} | arguments
    with pytest.raises(ValueError, match=message) as raised:
        laws.fit(call.pop("law"), call.pop("table"), **call)
    assert "\n" not in str(raised.value)
