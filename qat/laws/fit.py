"""The front door of fitting: a law and a table in, a `Fit` with intervals and diagnostics out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qat.laws import solver, uncertainty
from qat.laws.checklist import checklist
from qat.laws.diagnostics import condition_number, diagnose, held_parameters
from qat.laws.forms import get_law
from qat.laws.law import Law, float64_on_cpu
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
    rng = np.random.default_rng(seed)
    start_LP = rng.uniform(*law.coordinates("starts"), (starts, len(law.names)))
    run_R, fitted = uncertainty.runs_of(table), int(np.isnan(held_P).sum())
    with float64_on_cpu():
        problem = solver.pose(law, table, held_P)
        rows, found = _minimise(law, problem, table, settings, start_LP)
        best = found.take(found.objective.argmin())
        values = law.decode(best.u, problem.mean_log, problem.held)
        predicted_R = np.log(law.loss(values, problem.columns))[: len(table)]
        resampled = uncertainty.resample(
            rng, resampling, bootstrap, run_R, rows, predicted_R, fitted
        )
        drawn = _minimise_resamples(law, problem, settings.threshold, found, resampled)
        draws = law.decode(drawn.u, problem.mean_log, problem.held)
    known = np.isnan(held_P) | np.isin(law.names, list(chosen))
    params = {
        name: float(values[name]) if is_known else np.nan
        for name, is_known in zip(law.names, known, strict=True)
    }
    fitted_names = [name for name, held in zip(law.names, held_P, strict=True) if np.isnan(held)]
    samples = {name: np.asarray(draws[name]) for name in fitted_names} if bootstrap else {}
    units = int(run_R.max()) + 1
    intervals = {
        name: uncertainty.interval(samples.get(name), 0.95, "t", units, fitted)
        for name in law.names
    }
    findings = _of_solver(law, problem, found, settings) | {
        "bootstrap_converged": float(drawn.converged.mean()) if bootstrap else np.nan,
        "parameters": fitted,
        "fixed": tuple(chosen),
    }
    diagnostics = diagnose(law, table, params, intervals, findings)
    columns = table.columns(law.columns)
    ranges = {name: (float(x_R.min()), float(x_R.max())) for name, x_R in columns.items()}
    said = checklist(law, table, settings)
    return Fit(law, params, samples, diagnostics, settings, said, ranges)


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
