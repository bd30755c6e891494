"""The front door of fitting: a law and a table in, a `Fit` with intervals and diagnostics out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qat.laws import solver, uncertainty
from qat.laws.checklist import checklist
from qat.laws.diagnostics import (
    WIDEST_INTERVAL,
    condition_number,
    diagnose,
    held_parameters,
    standard_deviations,
)
from qat.laws.forms import get_law
from qat.laws.law import Law, float64_on_cpu
from qat.laws.likelihood import deviance_unit
from qat.laws.record import Fit, Settings
from qat.laws.solver import Lanes, Problem, Rows
from qat.laws.table import Table, as_table

# Arrays end in their axes: L lanes, R rows, P parameters, S resamples.
Floats = NDArray[np.float64]

MAX_OPTIMA, RIVAL = 3, 1.2  # resamples start from optima up to so many times the best objective


def fit(
    law: str | Law,
    table: Table | pd.DataFrame,
    *,
    loss: str = "huber",
    delta: float = 1e-3,
    weights: str = "equal",
    fixed: Mapping[str, float] | None = None,
    bootstrap: int = 1000,
    resampling: str = "runs",
    starts: int = 256,
    seed: int = 0,
) -> Fit:
    """Fits a law to a table of runs.

    Args:
        law: a name ("chinchilla", "precision") or a `Law`.
        table: runs with params, tokens, loss (nats per token) and the columns the law reads.
        loss: of the residual in log loss: "huber", "lad" (least absolute deviation) or "l2".
        delta: where Huber's function turns from quadratic to linear, in log loss (about the
            relative error of the loss). "lad" and "l2" ignore it.
        weights: of the rows: "equal", or "loss_se" for the inverse variance of each log loss, its
            own from the column loss_se (nats per token) and the scatter all rows share beyond it.
        fixed: values of parameters that are known, by name; they are not fitted.
        bootstrap: resamples for the intervals; 0 for none.
        resampling: what is resampled: "runs" (rows of one ``run_id`` together), "rows", or "wild",
            the signs of residuals; see `qat.laws.uncertainty`.
        starts: random starts within the ranges the law declares.
        seed: of starts and resamples; the same seed gives the same fit.

    Returns:
        The fit. Parameters of a group no row informs are left out of the law and are NaN.

    Raises:
        ValueError: for an unknown name or a bad value, a missing column, fewer rows than
            parameters to fit, or a single value in a column whose exponent is to be fitted.
    """
    chosen = dict(fixed or {})
    settings = Settings(loss, delta, weights, resampling, bootstrap, starts, seed, chosen)
    law, table = get_law(law), as_table(table)
    held_P = held_parameters(law, table, chosen)
    with float64_on_cpu():
        params, samples, findings = _solve(law, table, settings, held_P)
    runs, fitted = int(uncertainty.runs_of(table).max()) + 1, findings["parameters"]
    intervals = {
        name: uncertainty.interval(samples.get(name), 0.95, "t", runs, fitted) for name in law.names
    }
    diagnostics = diagnose(law, table, params, intervals, findings)
    columns = table.columns(law.columns)
    ranges = {name: (float(x_R.min()), float(x_R.max())) for name, x_R in columns.items()}
    said = checklist(law, table, settings)
    return Fit(law, params, samples, diagnostics, settings, said, ranges)


def _solve(
    law: Law, table: Table, settings: Settings, held_P: Floats
) -> tuple[dict[str, float], dict[str, Floats], dict[str, Any]]:
    """Parameters, their bootstrap draws, and what the solver says of its optimum."""
    rng, fits_P = np.random.default_rng(settings.seed), np.isnan(held_P)
    start_LP = rng.uniform(*law.coordinates("starts"), (settings.starts, len(law.names)))
    problem = solver.pose(law, table, held_P)
    rows, found = _minimise(law, problem, table, settings, start_LP)
    best = found.take(found.objective.argmin())
    values = law.decode(best.u, problem.mean_log, problem.held)
    with np.errstate(invalid="ignore", divide="ignore"):  # and refused
        predicted_R = np.log(np.asarray(law.loss(values, problem.columns))[: len(table)])
    _check_finite(law, table, predicted_R, best)
    fitted, run_R = int(fits_P.sum()), uncertainty.runs_of(table)
    kind, count = settings.resampling, settings.bootstrap
    resampled = uncertainty.resample(rng, kind, count, run_R, rows, predicted_R, fitted)
    drawn = _minimise_resamples(law, problem, settings.threshold, found, resampled)
    draws = law.decode(drawn.u, problem.mean_log, problem.held)
    residual_R = predicted_R - rows.log_loss
    unit = deviance_unit(residual_R, rows.weight, settings.threshold, fitted)
    findings = _of_solver(law, problem, found, settings) | {
        "flat": _flat(law, best, held_P, unit),
        "bootstrap_converged": float(drawn.converged.mean()) if count else np.nan,
        "parameters": fitted,
        "fixed": tuple(settings.fixed),
    }
    known = {n for n, fits in zip(law.names, fits_P, strict=True) if fits or n in settings.fixed}
    params = {name: float(values[name]) if name in known else np.nan for name in law.names}
    drawn_names = [name for name in law.names if name in known - settings.fixed.keys()]
    samples = {name: np.asarray(draws[name]) for name in drawn_names} if count else {}
    return params, samples, findings


def _minimise(
    law: Law, problem: Problem, table: Table, settings: Settings, start_LP: Floats
) -> tuple[Rows, Lanes]:
    """Every start's optimum, and the rows as they were weighted."""
    log_loss_R = np.log(table.columns(["loss"])["loss"])
    rows = Rows(np.ones(len(table)), log_loss_R)
    found = solver.minimise(law, problem, settings.threshold, start_LP, _repeat(rows, start_LP))
    if settings.weights == "equal":
        return rows, found
    best = found.take(found.objective.argmin())
    values = law.decode(best.u, problem.mean_log, problem.held)
    predicted_R = np.log(law.loss(values, problem.columns))[: len(table)]
    rows = Rows(_inverse_variance(table, np.asarray(predicted_R) - log_loss_R), log_loss_R)
    return rows, solver.minimise(
        law, problem, settings.threshold, start_LP, _repeat(rows, start_LP)
    )


def _repeat(rows: Rows, start_LP: Floats) -> Rows:
    return Rows(*(np.broadcast_to(each_R, (len(start_LP), len(each_R))) for each_R in rows))


def _inverse_variance(table: Table, residual_R: Floats) -> Floats:
    """Weights of mean one: each row's own variance, and what the scatter has beyond it.

    The scatter is robust (1.4826 times the median absolute residual is a normal deviation), and
    what is common to all rows is never below zero, as in a random-effects meta-analysis.
    """
    columns = table.columns(["loss", "loss_se"])
    if (columns["loss_se"] < 0).any():
        raise ValueError(f"loss_se must not be negative; one is {columns['loss_se'].min():g}")
    own_R = (columns["loss_se"] / columns["loss"]) ** 2
    scatter = (1.4826 * float(np.median(np.abs(residual_R)))) ** 2
    common = max(scatter - float(np.median(own_R)), 1e-12)
    weight_R = 1 / (common + own_R)
    return np.asarray(weight_R / weight_R.mean())


def _minimise_resamples(
    law: Law, problem: Problem, threshold: float, found: Lanes, resampled: Rows
) -> Lanes:
    """Minimises every resample from the best few distinct optima and keeps the best of each."""
    order = np.argsort(found.objective, kind="stable")
    optima = [order[0]]
    rivals = found.converged[order] & (found.objective[order] < RIVAL * found.objective[order[0]])
    for lane in order[rivals]:
        distinct = found.objective[lane] > found.objective[optima[-1]] * (1 + 1e-4)
        if distinct and len(optima) < MAX_OPTIMA:
            optima.append(lane)
    count = len(resampled.weight)
    start_LP = np.tile(found.u[optima], (count, 1))
    repeated = Rows(*(each_SR.repeat(len(optima), axis=0) for each_SR in resampled))
    lanes = solver.minimise(law, problem, threshold, start_LP, repeated)
    winner_S = lanes.objective.reshape(-1, len(optima)).argmin(axis=1)
    return lanes.take(np.arange(count) * len(optima) + winner_S)


def _check_finite(law: Law, table: Table, predicted_R: Any, best: Lanes) -> None:
    """Raises ValueError if even the best start has an objective that is no number."""
    if np.isfinite(best.objective):
        return
    bad = np.flatnonzero(~np.isfinite(np.asarray(predicted_R)))
    where = f", for one at row {table.frame.index[bad[0]]}" if bad.size else ""
    raise ValueError(
        f"law {law.name!r} gives no finite, positive loss to all rows from any start{where}"
    )


def _flat(law: Law, best: Lanes, held_P: Floats, unit: float) -> tuple[str, ...]:
    """Parameters that the objective's curvature does not tell, by 95% intervals."""
    fitted_P = np.isnan(held_P)
    curvature_PP = best.irls[np.ix_(fitted_P, fitted_P)] * unit / 2
    width_P = 2 * 1.96 * standard_deviations(curvature_PP)
    names = [name for name, fits in zip(law.names, fitted_P, strict=True) if fits]
    return tuple(name for name, w in zip(names, width_P, strict=True) if w > WIDEST_INTERVAL)


def _of_solver(law: Law, problem: Problem, found: Lanes, settings: Settings) -> dict[str, Any]:
    """The fields of `Diagnostics` that only the solver knows."""
    best = found.take(found.objective.argmin())
    moving_P, low_P, high_P = map(np.asarray, (problem.moving, problem.low, problem.high))
    distance_P = np.minimum(best.u - low_P, high_P - best.u)
    at_bound_P = moving_P & (distance_P < 1e-6 * (high_P - low_P))
    agree_L = found.objective <= best.objective * (1 + 1e-6) + solver.NEGLIGIBLE
    unit = settings.threshold if settings.loss == "lad" else 1.0
    return {
        "objective": float(best.objective) / unit,
        "gradient_norm": float(np.linalg.norm(best.gradient[moving_P & ~at_bound_P])) / unit,
        "condition_number": condition_number(best.irls[np.ix_(moving_P, moving_P)]),
        "share_at_best": float(agree_L.mean()),
        "at_bound": tuple(name for name, at in zip(law.names, at_bound_P, strict=True) if at),
    }
