"""The laws against closed forms in NumPy, at the edge of their domain, and as declarations."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from qat.laws import LAWS, Law, fit, get_law, load
from qat.laws.forms.efficiency import MIN_EFFICIENCY
from qat.laws.law import float64_on_cpu

# Kumar et al. 2024, arXiv 2411.04330, Table 2.
TABLE_2 = {
    "A": 4.299e3,
    "B": 1.806e4,
    "E": 2.7648,
    "alpha": 0.4965,
    "beta": 0.4965,
    "gamma_w": 2.6745,
    "n_w": 0.3037,
    "gamma_a": 2.2102,
    "n_a": 1.4072,
    "gamma_kv": 0.9578,
    "n_kv": 2.4185,
    "C_T": 0.0598,
    "gamma_D": 0.5068,
    "gamma_N": 0.3439,
    "gamma_post": 0.5907,
}
BITS = ("weight_bits", "activation_bits", "kv_bits", "ptq_bits")


# What the laws of formats read, of three formats: E2M1, E4M3, unquantized.
FORMATS = {
    "exponent_bits": np.array([2.0, 4.0, 8.0]),
    "mantissa_bits": np.array([1.0, 3.0, 7.0]),
    "scale_group": np.array([32.0, 128.0, 128.0]),
    "weight_group": np.array([32.0, 128.0, 128.0]),
    **dict.fromkeys(("weight_error", "activation_error", "kv_error"), np.array([0.01, 1e-4, 0.0])),
}


def runs(params=1e8, tokens=1e10, **bits):
    columns = {"params": params, "tokens": tokens} | dict.fromkeys(BITS, 16.0) | bits
    rows = np.broadcast_arrays(*np.atleast_1d(*columns.values()))
    return pd.DataFrame(dict(zip(columns, rows, strict=True)))


def kumar(frame, k):
    """The paper's formula, written out once more in float64 NumPy."""
    n, d, w, a, kv, post = (frame[c].to_numpy(float) for c in ("params", "tokens", *BITS))
    n_eff = n * (1 - np.exp(-w / k["gamma_w"] + k["n_w"]))
    n_eff *= 1 - np.exp(-a / k["gamma_a"] + k["n_a"])
    n_eff *= 1 - np.exp(-kv / k["gamma_kv"] + k["n_kv"])
    ptq = k["C_T"] * d ** k["gamma_D"] / n ** k["gamma_N"] * np.exp(-post / k["gamma_post"])
    loss = k["A"] * n_eff ** -k["alpha"] + k["B"] * d ** -k["beta"] + k["E"]
    return loss + np.where(post == 16, 0.0, ptq)


def test_precision_with_the_papers_constants_is_the_closed_form():
    rng = np.random.default_rng(0)
    frame = runs(
        params=10 ** rng.uniform(7, 10, 200),
        tokens=10 ** rng.uniform(9, 12, 200),
        weight_bits=rng.uniform(1, 16, 200),
        activation_bits=rng.uniform(3.2, 16, 200),
        kv_bits=rng.uniform(2.4, 16, 200),
        ptq_bits=rng.choice([2.0, 3.0, 4.0, 8.0, 16.0], 200),
    )
    predicted = get_law("precision").predict(TABLE_2, frame)
    np.testing.assert_allclose(predicted, kumar(frame, TABLE_2), rtol=1e-12)


def test_chinchilla_is_the_closed_form():
    frame = runs(params=np.array([1e7, 3e8, 7e10]), tokens=np.array([2e9, 1e10, 1.4e12]))
    params = {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658}
    n, d = frame["params"].to_numpy(), frame["tokens"].to_numpy()
    expected = 482.01 / n**0.3478 + 2085.43 / d**0.3658 + 1.8172
    np.testing.assert_allclose(get_law("chinchilla").predict(params, frame), expected, rtol=1e-13)


def test_four_bits_leave_a_fifth_of_the_parameters():
    """The paper's claim that 4 bits need more than four times the parameters (0.19 of N left)."""
    law, four = get_law("precision"), dict.fromkeys(BITS[:3], 4.0)
    (loss,) = law.predict(TABLE_2, runs(**four))
    data_term = TABLE_2["B"] * 1e10 ** -TABLE_2["beta"]
    effective = ((loss - data_term - TABLE_2["E"]) / TABLE_2["A"]) ** (-1 / TABLE_2["alpha"])
    assert effective / 1e8 == pytest.approx(0.19, abs=0.01)


@pytest.mark.parametrize(
    ("column", "zero"), [("weight_bits", 0.81), ("activation_bits", 3.11), ("kv_bits", 2.32)]
)
def test_no_number_below_the_zero_of_an_efficiency(column, zero):
    below, above = get_law("precision").predict(
        TABLE_2, runs(**{column: np.array([zero - 0.05, zero + 0.05])})
    )
    assert np.isnan(below)
    assert np.isfinite(above)


def test_continuation_below_the_zero_joins_smoothly_and_keeps_rising():
    law = get_law("precision")
    # The offset at which four bits have the efficiency MIN_EFFICIENCY.
    edge = 4 / TABLE_2["gamma_w"] + np.log1p(-MIN_EFFICIENCY)
    step = 1e-7
    offsets = edge + np.array([-2 * step, -step, step, 2 * step, 0.1, 1.0, 10.0, 100.0])
    with float64_on_cpu():
        columns = {
            name: jnp.asarray(x) for name, x in runs(weight_bits=4.0).to_dict("list").items()
        }
        values = {name: jnp.asarray(value) for name, value in TABLE_2.items()}
        log_loss = np.log([law.loss(values | {"n_w": jnp.asarray(n)}, columns) for n in offsets])
    left, right = np.diff(log_loss[:2, 0]) / step, np.diff(log_loss[2:4, 0]) / step
    np.testing.assert_allclose(left, right, rtol=1e-3)
    assert np.isfinite(log_loss).all()
    assert (np.diff(log_loss[:, 0]) > 0).all()


@pytest.mark.parametrize("name", LAWS)
def test_finite_and_positive_wherever_a_fit_may_look(name):
    law, rng = get_law(name), np.random.default_rng(0)
    low_P, high_P = law.coordinates("bounds")
    unit_SP = rng.uniform(size=(200, len(low_P)))
    unit_SP[:100] = rng.integers(0, 2, size=(100, len(low_P)))  # corners
    frame = runs(
        params=np.array([1e7, 1e8, 1e9]),
        tokens=np.array([1e9, 1e11, 1e10]),
        **dict.fromkeys(BITS, np.array([2.0, 4.0, 16.0])),
        **FORMATS,
    )
    with float64_on_cpu():
        columns = {name: jnp.asarray(frame[name].to_numpy())[None] for name in law.columns}
        mean_log = {name: jnp.log(columns[name]).mean() for name in law.centred}
        u_S1P = jnp.asarray(low_P + unit_SP * (high_P - low_P))[:, None]
        values = law.decode(u_S1P, mean_log, jnp.full(len(low_P), jnp.nan))
        loss_SR = np.asarray(law.loss(values, columns))
    assert loss_SR.shape == (200, 3)
    assert np.isfinite(loss_SR).all()
    assert (loss_SR > 0).all()


@pytest.mark.parametrize("name", LAWS)
def test_declaration_is_consistent(name):
    law = get_law(name)
    assert len(set(law.names)) == len(law.names)
    for parameter in law.parameters:
        coordinates = [parameter.coordinate(x) for x in (*parameter.bounds, *parameter.starts)]
        low, high, first, last = coordinates
        assert low <= first < last <= high
        for column, exponent, sign in parameter.powers:
            assert column in law.columns
            assert exponent in (*law.names, 1.0)
            assert sign in (-1, 1)
    for group in law.groups:
        assert set(group.columns) <= set(law.columns)
        assert set(group.parameters) <= set(law.names)


@pytest.mark.parametrize(
    ("name", "column"),
    [(n, c) for n in LAWS for c in BITS if any(c in g.columns for g in LAWS[n].groups)],
)
def test_neutral_values_take_the_column_out_of_the_law(name, column):
    law = get_law(name)
    params = {p.name: 0.5 * sum(p.starts) for p in law.parameters}
    groups = [group for group in law.groups if column in group.columns]
    neutral = {n: v for g in groups for n, v in zip(g.parameters, g.neutral, strict=True)}
    frame = runs(**{column: np.array([2.0, 16.0])}, weight_group=32.0)
    few, all_bits = law.predict(params, frame)
    assert few > all_bits
    few, all_bits = law.predict(params | neutral, frame)
    assert few == all_bits


def test_amplitude_coordinate_is_its_term_at_the_mean():
    law = get_law("chinchilla")
    with float64_on_cpu():
        u_P = jnp.log(jnp.asarray([0.5, 0.4, 1.8, 0.34, 0.37]))
        mean_log = {"params": jnp.asarray(20.0), "tokens": jnp.asarray(23.0)}
        params = law.decode(u_P, mean_log, jnp.full(5, jnp.nan))
    params = {name: float(value) for name, value in params.items()}
    np.testing.assert_allclose(params["A"] * np.exp(-0.34 * 20.0), 0.5, rtol=1e-12)
    np.testing.assert_allclose(params["B"] * np.exp(-0.37 * 23.0), 0.4, rtol=1e-12)
    np.testing.assert_allclose([params["E"], params["alpha"], params["beta"]], [1.8, 0.34, 0.37])


def test_unfitted_group_predicts_nothing_for_rows_that_need_it():
    params = TABLE_2 | {"gamma_kv": np.nan, "n_kv": np.nan}
    unquantized, quantized = get_law("precision").predict(
        params, runs(weight_bits=5.0, kv_bits=np.array([16.0, 4.0]))
    )
    without_factor = TABLE_2 | {"n_kv": -np.inf}
    np.testing.assert_allclose(unquantized, kumar(runs(weight_bits=5.0), without_factor)[0])
    assert np.isnan(quantized)


def test_missing_parameter_and_unknown_law_are_named():
    params = {name: value for name, value in TABLE_2.items() if name != "gamma_w"}
    with pytest.raises(ValueError, match="gamma_w"):
        get_law("precision").predict(params, runs())
    with pytest.raises(ValueError, match="nearest is 'chinchilla'"):
        get_law("chincilla")


def test_a_law_passes_through_the_lookup():
    law = dataclasses.replace(get_law("chinchilla"), name="mine")
    assert get_law(law) is law


def test_a_law_of_ones_own_is_fitted_saved_and_loaded(tmp_path):
    chinchilla = get_law("chinchilla")
    law = Law(
        name="params_only",
        formula="A N^-alpha",
        loss=lambda p, c: p["A"] * jnp.exp(-p["alpha"] * jnp.log(c["params"])),
        parameters=tuple(p for p in chinchilla.parameters if p.name in ("A", "alpha")),
        columns=("params",),
    )
    table = runs(params=np.geomspace(1e7, 1e9, 40))
    table["loss"] = 50 * table["params"] ** -0.1
    found = fit(law, table, bootstrap=10, starts=32)
    assert found.params == pytest.approx({"A": 50, "alpha": 0.1}, rel=1e-7)
    found.save(tmp_path / "fit.json")
    assert load(tmp_path / "fit.json", law=law) == found
    with pytest.raises(ValueError, match="unknown law 'params_only'"):
        load(tmp_path / "fit.json")
    with pytest.raises(ValueError, match="of law 'params_only', not of 'chinchilla'"):
        load(tmp_path / "fit.json", law=chinchilla)
