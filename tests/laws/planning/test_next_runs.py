"""Designs against least squares theory, simulated refits and a brute-force search."""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from qat.laws import get_law
from qat.laws.law import law, signed
from qat.laws.planning.next_runs import next_runs
from qat.laws.published import published

WIDTH = 20.0


@law("exp(a + b log N)")
def line(
    params,
    *,
    a: Annotated[object, signed("intercept", (-10.0, 10.0), (0.0, 1.0))],
    b: Annotated[object, signed("slope", (-10.0, 10.0), (0.0, 1.0))],
):
    """Linear in both coordinates, so that least squares theory is exact."""
    return jnp.exp(a + b * jnp.log(params))


LINE = dataclasses.replace(published("besiroglu"), law=line, params={"a": 2.0, "b": -0.1})
NOISE = 0.01


def runs(log_params, noise=NOISE, seed=0):
    log_params = np.asarray(log_params, float)
    scatter = noise * np.random.default_rng(seed).standard_normal(len(log_params))
    return pd.DataFrame(
        {"params": np.exp(log_params), "loss": np.exp(2.0 - 0.1 * log_params + scatter)}
    )


TABLE = runs([16, 16.5, 17, 17.2, 17.4, 18])
CANDIDATES = runs([16.8, 17.5, 19.0, 21.0, 24.0]).drop(columns="loss")


def sigma(table):
    """The robust scale of what the line leaves."""
    residual = np.log(table["loss"]) - 2.0 + 0.1 * np.log(table["params"])
    return 1.4826 * np.median(np.abs(residual))


def standard_error(log_params, scale, gradient):
    design = np.stack([np.ones(len(log_params)), log_params], axis=1)
    information = design.T @ design / scale**2 + np.eye(2) / WIDTH**2
    return np.sqrt(gradient @ np.linalg.inv(information) @ gradient)


@pytest.mark.parametrize(
    ("target", "gradient"),
    [
        ("b", [0.0, 1.0]),
        ("a", [1.0, 0.0]),
        # For the loss at this size the farthest run is not the best.
        (lambda p: jnp.exp(p["a"] + 17.5 * p["b"]), np.exp(2.0 - 1.75) * np.array([1.0, 17.5])),
    ],
)
def test_errors_are_those_of_the_covariance_and_the_choice_is_greedy(target, gradient):
    chosen = next_runs(LINE, TABLE, CANDIDATES, target, count=3)
    scale, done = sigma(TABLE), np.log(TABLE["params"]).tolist()
    offered = np.log(CANDIDATES["params"]).to_dict()
    for row, found in chosen.iterrows():
        before = standard_error(done, scale, np.array(gradient))
        assert found["standard_error_before"] == pytest.approx(before, rel=1e-9)
        after = {
            i: standard_error([*done, x], scale, np.array(gradient)) for i, x in offered.items()
        }
        assert row == min(after, key=after.get)
        assert found["standard_error"] == pytest.approx(after[row], rel=1e-9)
        done.append(offered.pop(row))


def test_what_is_chosen_narrows_a_real_refit_most():
    """Standard deviations of 4000 simulated fits, each with one candidate more."""
    (best,) = next_runs(LINE, TABLE, CANDIDATES, "b", count=1).index
    rng, spread = np.random.default_rng(1), {}
    for row, x in np.log(CANDIDATES["params"]).items():
        log_params = np.append(np.log(TABLE["params"]), x)
        design = np.stack([np.ones(len(log_params)), log_params], axis=1)
        losses = rng.standard_normal((len(log_params), 4000))
        spread[row] = np.linalg.lstsq(design, losses, rcond=None)[0][1].std()
    assert best == min(spread, key=spread.get)
    assert spread[best] < 0.7 * np.median(list(spread.values()))


def precision_runs(seed=0, rows=60):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "params": 10 ** rng.uniform(7, 9, rows),
            "tokens": 10 ** rng.uniform(9, 11, rows),
            "weight_bits": rng.choice([4.0, 6.0, 16.0], rows),
        }
    )
    noise = np.exp(2e-3 * rng.standard_normal(rows))
    return frame.assign(loss=WEIGHTS.predict(frame) * noise)


REST = ("gamma_a", "n_a", "gamma_kv", "n_kv", "C_T", "gamma_D", "gamma_N", "gamma_post")
WEIGHTS = published("kumar")
WEIGHTS = dataclasses.replace(WEIGHTS, params=WEIGHTS.params | dict.fromkeys(REST, np.nan))
FITTED = ("A", "B", "E", "alpha", "beta", "gamma_w", "n_w")
OFFERED = pd.DataFrame(
    {
        "params": [3e8, 3e8, 3e9, 3e7],
        "tokens": [1e10, 1e10, 1e11, 1e12],
        "weight_bits": [3.0, 12.0, 16.0, 16.0],
    }
)


def finite_differences(frame, step=1e-5):
    columns = []
    for name in FITTED:
        value, both = WEIGHTS.params[name], []
        for sign in (1, -1):
            moved = value + sign * step if name == "n_w" else value * np.exp(sign * step)
            both.append(np.log(get_law("precision").predict(WEIGHTS.params | {name: moved}, frame)))
        columns.append((both[0] - both[1]) / (2 * step))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("target", ["gamma_w", "n_w", "E"])
def test_a_law_with_parameters_left_out(target):
    table = precision_runs()
    chosen = next_runs(WEIGHTS, table, OFFERED, target, count=2)
    residual = np.log(WEIGHTS.predict(table)) - np.log(table["loss"])
    scale = 1.4826 * np.median(np.abs(residual))
    bounds = {p.name: p.bounds for p in WEIGHTS.law.parameters}
    widths = [np.ptp(bounds[name] if name == "n_w" else np.log(bounds[name])) for name in FITTED]
    gradient = np.zeros(len(FITTED))
    gradient[FITTED.index(target)] = 1 if target == "n_w" else WEIGHTS.params[target]
    for count in (0, 1, 2):
        rows = pd.concat([table.drop(columns="loss"), OFFERED.loc[chosen.index[:count]]])
        jacobian = finite_differences(rows) / scale
        information = jacobian.T @ jacobian + np.diag(np.array(widths) ** -2.0)
        error = np.sqrt(gradient @ np.linalg.solve(information, gradient))
        found = [*chosen["standard_error_before"], chosen["standard_error"].iloc[-1]][count]
        assert found == pytest.approx(error, rel=1e-3)
    if target != "E":
        assert chosen.index[0] == 0  # the only one of few bits


def test_a_direction_that_no_row_informs_comes_first():
    """All rows of one size: the slope is known only to the width of its bounds."""
    table = runs([17.0] * 5)
    offered = runs([17.0, 17.0, 18.0]).drop(columns="loss")
    chosen = next_runs(LINE, table, offered, "b", count=1)
    assert chosen.index.tolist() == [2]
    assert chosen["standard_error_before"].item() > 0.05 * WIDTH
    assert chosen["standard_error"].item() < 5 * NOISE


def test_with_a_price_the_narrowing_per_flop_decides():
    table = precision_runs()
    near = pd.DataFrame({"params": 1e8, "tokens": [1e10, 1e13], "weight_bits": 4.0})
    free_of_charge = next_runs(WEIGHTS, table, near, "gamma_w", count=1)
    priced = next_runs(WEIGHTS, table, near, "gamma_w", count=1, cost="linear")
    assert free_of_charge.index.tolist() == [1]
    assert priced.index.tolist() == [0]
    assert priced["price"].item() == pytest.approx(6e18 * 12 / 16)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"target": "c"}, "unknown fitted parameter 'c'"),
        ({"target": lambda p: jnp.asarray(1.0) * p["b"] * 0}, "must change"),
        ({"target": lambda p: jnp.log(p["b"])}, "finite"),
        ({"count": 0}, "count must be 1 to 5, the candidates, not 0"),
        ({"count": 6}, "not 6"),
        ({"count": 2.5}, "not 2.5"),
        ({"cost": "linear"}, "no column tokens"),
        ({"candidates": pd.DataFrame({"tokens": [1e9]}), "count": 1}, "no column params"),
        ({"table": runs([16.0, 17.0], noise=0)}, "residuals of the fit are zero"),
        ({"table": TABLE.drop(columns="loss")}, "no column loss"),
    ],
)
def test_refuses(changed, words):
    asked = {"table": TABLE, "candidates": CANDIDATES, "target": "b", "count": 2} | changed
    with pytest.raises(ValueError) as caught:
        next_runs(LINE, **asked)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_candidates_and_targets_the_fit_knows_nothing_of():
    offered = OFFERED.assign(kv_bits=[16.0, 16.0, 4.0, 16.0])
    with pytest.raises(ValueError, match="predicts no loss of candidate 2"):
        next_runs(WEIGHTS, precision_runs(), offered, "E", count=1)
    with pytest.raises(ValueError, match="unknown fitted parameter 'gamma_a'"):
        next_runs(WEIGHTS, precision_runs(), OFFERED, "gamma_a", count=1)
