"""Which runs to do next: those that would narrow the interval of a chosen quantity most.

Least squares near the optimum (a local, or Fisher, design): with J the derivatives of the log loss
by the fitted coordinates, one row a run, and σ the scale of the residuals, the coordinates have
covariance C = (JᵀJ/σ² + Λ)⁻¹, a quantity with gradient g the variance gᵀCg, and one more run with
row j lowers it by (gᵀCj)² / (σ² + jᵀCj). No loss enters but σ, so what a run is worth is known
before it is done. Runs are chosen one by one, each given those before it.

Least squares knows nothing of outliers and of runs that share their luck, so the errors are scaled
until the first is that of the fit's bootstrap, if it has one. The order does not depend on it.

Every row counts the same: that one happens to be an outlier says nothing of where to look next.

Λ is a weak prior, one over the squared width of the bounds the law declares, for each coordinate.
It matters only where no row informs a direction: the variance there is then the width squared
instead of infinite, and runs that inform it come first.
"""

import functools
from collections.abc import Callable, Mapping
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array
from numpy.typing import NDArray

from qat.laws.checklist import check_same_rows
from qat.laws.law import Law, Parameter, Values, float64_on_cpu
from qat.laws.planning.cost import TRAINING_BITS, Cost, bits_of, get_cost
from qat.laws.planning.draws import Floats, draws_of
from qat.laws.record import Fit
from qat.laws.table import Table, as_table
from qat.spelling import expected_one_of

# Arrays end in their axes: R rows of a table, P fitted parameters.
Target = str | Callable[[Mapping[str, Array]], Array]
NO_SCATTER = 1e-12  # of the log loss: rounding errors
MEDIAN_TO_SIGMA = 1.4826  # of absolute residuals, if these are normal


def next_runs(
    fit: Fit,
    table: Table | pd.DataFrame,
    candidates: Table | pd.DataFrame,
    target: Target,
    count: int = 5,
    cost: str | Cost | None = None,
) -> pd.DataFrame:
    """The candidates that would narrow the interval of a quantity most, in order.

    Args:
        fit: of any law.
        table: the runs it was fitted to. Those outside the fitted law's domain are left out.
        candidates: runs that could be done, with the columns the law reads. Each is chosen at most
            once; a run with another seed is another row.
        target: a parameter's name, or a function in `jax.numpy` from parameters by name to the
            quantity, such as ``lambda p: p["beta"] / (p["alpha"] + p["beta"])``. Parameters that
            were not fitted are NaN.
        count: how many to choose.
        cost: what runs cost; then the narrowing per FLOP decides.

    Returns:
        The chosen candidates under their own index, with the columns standard_error_before and
        standard_error (of the target, in its unit, before and after this run) and, with a cost,
        price (FLOPs of bfloat16).

    Raises:
        ValueError: for a target that is unknown, not finite or not of any fitted parameter, fewer
            candidates than ``count``, a candidate for which the fit predicts nothing, a missing
            column, or residuals that are all zero.
    """
    table = as_table(table, required=("loss",))
    candidates = as_table(candidates, required=())
    if not (isinstance(count, Integral) and 1 <= count <= len(candidates)):
        raise ValueError(f"count must be 1 to {len(candidates)}, the candidates, not {count}")
    check_same_rows(fit, table)
    gradient_P = _gradient(fit, target)
    unknown_R = np.isnan(fit.predict(candidates))
    if unknown_R.any():
        row = candidates.frame.index[int(unknown_R.argmax())]
        raise ValueError(f"the fit of law {fit.law.name!r} predicts no loss of candidate {row}")
    inside_R, sigma = _scatter(fit, table)
    known_RP = np.vstack([np.diag(_prior(fit)), _derivatives(fit, table)[inside_R] / sigma])
    offered_RP = _derivatives(fit, candidates) / sigma
    price_R = _prices(candidates, cost)
    order, errors = _choose(known_RP, offered_RP, gradient_P, price_R, count)
    errors = [*(np.array(errors) * _bootstrap_over(fit, target, errors[0]))]
    chosen = candidates.frame.iloc[order].copy()
    chosen["standard_error_before"], chosen["standard_error"] = errors[:-1], errors[1:]
    if cost is not None:
        chosen["price"] = price_R[order]
    return chosen


def _bootstrap_over(fit: Fit, target: Target, error: float) -> float:
    """What the bootstrap makes of a standard error, as a factor; 1 without draws."""
    draws_S = fit.draws(target)
    return 1.0 if draws_S is None else float(np.std(draws_S)) / error


def _scatter(fit: Fit, table: Table) -> tuple[NDArray[np.bool_], float]:
    """Which rows the fit predicts, shape (R,), and a robust scale of their residuals."""
    predicted_R = fit.predict(table)
    inside_R: NDArray[np.bool_] = ~np.isnan(predicted_R)
    if not inside_R.any():
        raise ValueError(
            f"the fit of law {fit.law.name!r} predicts no loss of any row of the table"
        )
    residual_R = (np.log(predicted_R) - np.log(table.columns(["loss"])["loss"]))[inside_R]
    sigma = MEDIAN_TO_SIGMA * float(np.median(np.abs(residual_R)))
    if sigma < NO_SCATTER:
        raise ValueError("the residuals of the fit are zero: without scatter no run is worth more")
    return inside_R, sigma


def _choose(
    known_RP: Floats, offered_RP: Floats, gradient_P: Floats, price_R: Floats, count: int
) -> tuple[list[int], list[float]]:
    """Rows of ``offered`` one by one, and the target's standard error before and after each.

    Rows are scaled to unit noise. C = SSᵀ is kept as its root, from a triangle of the rows
    themselves: JᵀJ would square a condition number that is large already.
    """
    order: list[int] = []
    errors: list[float] = []
    while True:
        root_PP = np.linalg.inv(np.linalg.qr(known_RP, mode="r"))
        target_P = gradient_P @ root_PP
        errors.append(float(np.linalg.norm(target_P)))
        if len(order) == count:
            return order, errors
        row_RP = offered_RP @ root_PP
        gain_R = (row_RP @ target_P) ** 2 / (1 + np.sum(row_RP**2, axis=1)) / price_R
        gain_R[order] = -np.inf
        order.append(int(gain_R.argmax()))
        known_RP = np.vstack([known_RP, offered_RP[order[-1:]]])


def _fitted(fit: Fit) -> tuple[Parameter, ...]:
    """The parameters of the P axis."""
    return tuple(p for p in fit.law.parameters if not np.isnan(fit.params[p.name]))


def _gradient(fit: Fit, target: Target) -> Floats:
    """Of the target by the fitted coordinates, shape (P,)."""
    fitted = _fitted(fit)
    names = [p.name for p in fitted]
    if isinstance(target, str) and target not in names:
        raise ValueError(expected_one_of("fitted parameter", target, names))

    def value(u_P: Array) -> Array:
        params = {name: jnp.asarray(each) for name, each in fit.params.items()}
        params |= _natural(fitted, u_P)
        return params[target] if isinstance(target, str) else target(params)

    with float64_on_cpu():
        now, slope_P = jax.value_and_grad(value)(jnp.asarray(_coordinates(fit)))
    gradient_P = np.asarray(slope_P)
    if not np.isfinite([now, *gradient_P]).all() or not gradient_P.any():
        raise ValueError(
            f"the target must change, and be finite, with the fitted parameters {', '.join(names)}"
        )
    return gradient_P


def _derivatives(fit: Fit, table: Table) -> Floats:
    """Of the log loss of every row by the fitted coordinates, shape (R, P)."""
    neutral = {name: value_S[0] for name, value_S in draws_of(fit).values.items()}
    with float64_on_cpu():
        columns = table.columns(fit.law.columns)
        arrays = jax.tree.map(jnp.asarray, (neutral, columns, _coordinates(fit)))
        return np.asarray(_log_loss_derivatives(fit.law, _fitted(fit), *arrays))


@functools.partial(jax.jit, static_argnames=("law", "fitted"))
def _log_loss_derivatives(
    law: Law, fitted: tuple[Parameter, ...], params: Values, columns_R: Values, u_P: Array
) -> Array:
    def log_loss(u_P: Array, columns: Values) -> Array:
        return jnp.log(law.loss({**params, **_natural(fitted, u_P)}, columns))

    by_row: Callable[[Array, Values], Array] = jax.vmap(jax.grad(log_loss), in_axes=(None, 0))
    return by_row(u_P, columns_R)


def _natural(fitted: tuple[Parameter, ...], u_P: Array) -> dict[str, Array]:
    """Parameters from coordinates: logarithms of the positive ones, the signed ones themselves."""
    return {p.name: u_P[i] if p.signed else jnp.exp(u_P[i]) for i, p in enumerate(fitted)}


def _coordinates(fit: Fit) -> Floats:
    """The coordinates of the fitted parameters, shape (P,)."""
    return np.array([p.coordinate(fit.params[p.name]) for p in _fitted(fit)])


def _prior(fit: Fit) -> Floats:
    """One over the width of each coordinate's bounds, shape (P,).

    Bounds of an amplitude are those of its term, whose logarithm is as wide as its own.
    """
    ends = [[p.coordinate(end) for end in p.bounds] for p in _fitted(fit)]
    low_P, high_P = np.array(ends).T
    width_P: Floats = high_P - low_P
    return 1 / width_P


def _prices(candidates: Table, cost: str | Cost | None) -> Floats:
    """FLOPs of each candidate, shape (R,); ones without a cost."""
    if cost is None:
        return np.ones(len(candidates))
    with float64_on_cpu():
        columns = jax.tree.map(
            jnp.asarray, candidates.columns((*TRAINING_BITS, "params", "tokens"))
        )
        price_R = get_cost(cost).training(columns["params"], columns["tokens"], bits_of(columns))
    return np.asarray(price_R)
