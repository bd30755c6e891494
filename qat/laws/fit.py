"""Robust fits of a law, many lanes at once: every start and every bootstrap resample is a lane.

What is minimised is ``Σ_r w_r ρ(log L_pred - log L)``, ρ being Huber's function (Hoffmann et al.
2022; Besiroglu et al. 2024, arXiv 2404.10102). One δ covers the three losses: least squares is
δ = inf, least absolute deviation a δ far below any residual. A resample is a vector of row
weights w, so all lanes share one table and one compiled program.

L-BFGS from one start after another is slow, and treacherous: an objective of 1e-3 meets absolute
tolerances early, so it stops, reports success, and halves the bootstrap intervals. Instead:

* Levenberg steps with ``H = JᵀWJ``. W mixes the weights of iteratively reweighted least squares
  (safe far away, slow to finish) with those of ρ'' (exact near the end) and moves to the latter as
  steps succeed. The damping is a multiple of the identity: scaled by H's diagonal instead, a
  parameter that has lost its effect takes huge steps, and many starts never come back.
* δ is reached down a ladder of factors of ten: far from the optimum a small δ leaves ρ'' empty.
* A lane is finished when the decrease it predicts is a 1e-12th of its own objective. Whether the
  answer is good is judged by how many starts agree on it, never by that.
* A program advances a fixed number of lanes; the unfinished are packed together between rounds.
* The residual is differentiated row by row in reverse mode: the whole Jacobian in one fused pass,
  where a reduction per parameter would evaluate the exponentials again for each.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array
from numpy.typing import NDArray

from qat.laws import uncertainty
from qat.laws.forms import Law, float64_on_cpu, get_law
from qat.laws.table import Table, as_table

# Arrays end in their axes: L lanes, R rows (padded in a program), P parameters, S resamples.
Floats = NDArray[np.float64]

TOP_OF_LADDER = 1e-2
TOLERANCE = 1e-12
LOOSE_TOLERANCE = 1e-4  # of the rungs above the last, which only lead to it
NEGLIGIBLE = 1e-22  # an objective that small is float64's own noise, in a few hundred residuals
FIRST_DAMPING, FINAL_DAMPING = 1e-2, 1e-5  # relative to H's largest diagonal
LEAST_DAMPING, MOST_DAMPING = 1e-9, 1e8
# Static sizes, so that tables and resamples of all sizes share compiled programs.
LANES = 128
ROW_MULTIPLE = 128
STEPS_PER_ROUND = 16
MAX_ROUNDS = 12
MAX_OPTIMA, RIVAL = 3, 1.2  # resamples start from optima up to so many times the best objective


def fit(
    law: str | Law,
    table: Table | pd.DataFrame,
    *,
    loss: str = "huber",
    delta: float = 1e-3,
    bootstrap: int = 1000,
    starts: int = 256,
    seed: int = 0,
) -> uncertainty.Fit:
    """Fits a law to a table of runs.

    Args:
        law: a name ("chinchilla", "precision") or a `Law`.
        table: runs with params, tokens, loss (nats per token) and the columns the law reads.
        loss: of the residual in log loss: "huber", "lad" (least absolute deviation) or "l2".
        delta: where Huber's function turns from quadratic to linear, in log loss (about the
            relative error of the loss). "lad" and "l2" ignore it.
        bootstrap: resamples of (row, loss) pairs for the intervals; 0 for none.
        starts: random starts within the ranges the law declares.
        seed: of starts and resamples; the same seed gives the same fit.

    Returns:
        The fit. Parameters of a group no row informs are left out of the law and are NaN.

    Raises:
        ValueError: for an unknown law or loss, a missing column or a bad value, fewer rows than
            parameters to fit, or a single value in a column whose exponent is to be fitted.
    """
    settings = uncertainty.Settings(loss, delta, bootstrap, starts, seed)
    law, table = get_law(law), as_table(table)
    free_P = uncertainty.free_parameters(law, table)
    rng = np.random.default_rng(seed)
    start_LP = rng.uniform(*_coordinates(law, "starts"), (starts, len(law.names)))
    weight_SR = uncertainty.resample_weights(rng, bootstrap, len(table))
    with float64_on_cpu():
        problem = _pose(law, table, free_P)
        found = _minimise(law, problem, settings.threshold, start_LP, np.ones((starts, len(table))))
        drawn = _minimise_resamples(law, problem, settings.threshold, found, weight_SR)
        best = _take(found, found.objective.argmin())
        values = law.decode(best.u, problem.mean_log, problem.free)
        draws = law.decode(drawn.u, problem.mean_log, problem.free)
    known = dict(zip(law.names, free_P, strict=True))
    params = {name: float(values[name]) if known[name] else np.nan for name in law.names}
    samples = {name: np.asarray(draws[name]) for name in law.names if known[name]}
    intervals = {name: uncertainty.percentile_interval(samples.get(name)) for name in law.names}
    unit = settings.threshold if loss == "lad" else 1.0
    solver = _solver_diagnostics(law, problem, found, unit)
    solver |= {"bootstrap_converged": float(drawn.converged.mean()) if bootstrap else np.nan}
    diagnostics = uncertainty.diagnose(law, table, params, intervals, solver)
    return uncertainty.Fit(law, params, intervals, samples, diagnostics, settings)


class _Problem(NamedTuple):
    """A table as the solver sees it, its rows padded to a multiple."""

    columns: dict[str, Array]  # (R,) each
    log_loss: Array  # (R,)
    mean_log: dict[str, Array]
    free: Array  # (P,), as are the bounds
    low: Array
    high: Array


class _Lanes(NamedTuple):
    """The state of the solver: NumPy arrays with a leading axis L, or one lane under `vmap`."""

    u: Any  # (P,), the fitted coordinates
    objective: Any
    gradient: Any  # (P,)
    irls: Any  # (P, P), JᵀWJ with the weights of iteratively reweighted least squares
    newton: Any  # (P, P), JᵀWJ with W = ρ''
    damping: Any
    mix: Any  # share of irls in H
    done: Any
    converged: Any


def _pose(law: Law, table: Table, free_P: NDArray[np.bool_]) -> _Problem:
    columns = table.columns((*law.columns, "loss"))
    padding = (0, -len(table) % ROW_MULTIPLE)
    padded = {name: np.pad(column_R, padding, "edge") for name, column_R in columns.items()}
    log_loss_R = np.log(padded.pop("loss"))
    mean_log = {name: np.log(columns[name]).mean() for name in law.columns}
    problem = (padded, log_loss_R, mean_log, free_P, *_coordinates(law, "bounds"))
    return _Problem(*jax.tree.map(jnp.asarray, problem))


def _coordinates(law: Law, which: str) -> tuple[Floats, Floats]:
    """Ends of the parameters' "bounds" or "starts" in fitted coordinates, shape (P,) each."""
    ends = [[p.coordinate(end) for end in getattr(p, which)] for p in law.parameters]
    low_P, high_P = np.array(ends).T
    return low_P, high_P


def _minimise(
    law: Law, problem: _Problem, threshold: float, start_LP: Floats, weight_LR: Floats
) -> _Lanes:
    """Minimises every lane from its start with its row weights, down the ladder to δ."""
    padding = len(problem.log_loss) - weight_LR.shape[1]
    weight_LR = np.pad(weight_LR, ((0, 0), (0, padding)))
    rungs = [threshold]
    while rungs[-1] < TOP_OF_LADDER:
        rungs.append(10 * rungs[-1])
    lanes = _unstarted(start_LP)
    for delta in reversed(rungs):
        tolerance = TOLERANCE if delta == threshold else LOOSE_TOLERANCE
        lanes = _unstarted(lanes.u)
        pending = np.arange(len(start_LP))
        for _ in range(MAX_ROUNDS):
            for first in range(0, len(pending), LANES):
                # Short of lanes, some are repeated: the same state gives the same result.
                index_L = np.resize(pending[first : first + LANES], LANES)
                chunk = _take(lanes, index_L)
                advanced = _advance(law, problem, delta, tolerance, weight_LR[index_L], chunk)
                for state_L, advanced_L in zip(lanes, advanced, strict=True):
                    state_L[index_L] = advanced_L
            pending = pending[~lanes.done[pending]]
    return lanes


def _minimise_resamples(
    law: Law, problem: _Problem, threshold: float, found: _Lanes, weight_SR: Floats
) -> _Lanes:
    """Minimises every resample from the best few distinct optima and keeps the best of each."""
    order = np.argsort(found.objective, kind="stable")
    optima = [order[0]]
    rivals = found.converged[order] & (found.objective[order] < RIVAL * found.objective[order[0]])
    for lane in order[rivals]:
        distinct = found.objective[lane] > found.objective[optima[-1]] * (1 + 1e-4)
        if distinct and len(optima) < MAX_OPTIMA:
            optima.append(lane)
    start_LP = np.tile(found.u[optima], (len(weight_SR), 1))
    weight_LR = weight_SR.repeat(len(optima), axis=0)
    lanes = _minimise(law, problem, threshold, start_LP, weight_LR)
    winner_S = lanes.objective.reshape(-1, len(optima)).argmin(axis=1)
    return _take(lanes, np.arange(len(weight_SR)) * len(optima) + winner_S)


def _solver_diagnostics(
    law: Law, problem: _Problem, found: _Lanes, unit: float
) -> dict[str, float | tuple[str, ...]]:
    """The fields of `uncertainty.Diagnostics` that only the solver knows."""
    best = _take(found, found.objective.argmin())
    free_P, low_P, high_P = map(np.asarray, (problem.free, problem.low, problem.high))
    distance_P = np.minimum(best.u - low_P, high_P - best.u)
    at_bound_P = free_P & (distance_P < 1e-6 * (high_P - low_P))
    agree_L = found.objective <= best.objective * (1 + 1e-6) + NEGLIGIBLE
    return {
        "objective": float(best.objective) / unit,
        "gradient_norm": float(np.linalg.norm(best.gradient[free_P & ~at_bound_P])) / unit,
        "condition_number": uncertainty.condition_number(best.irls[np.ix_(free_P, free_P)]),
        "share_at_best": float(agree_L.mean()),
        "at_bound": tuple(name for name, at in zip(law.names, at_bound_P, strict=True) if at),
    }


def _unstarted(u_LP: Floats) -> _Lanes:
    """Lanes that have evaluated nothing yet: their first step moves nowhere and is accepted."""
    lanes, parameters = u_LP.shape
    return _Lanes(
        u=u_LP.copy(),
        objective=np.full(lanes, np.inf),
        gradient=np.zeros((lanes, parameters)),
        irls=np.zeros((lanes, parameters, parameters)),
        newton=np.zeros((lanes, parameters, parameters)),
        damping=np.full(lanes, FIRST_DAMPING),
        mix=np.ones(lanes),
        done=np.zeros(lanes, bool),
        converged=np.zeros(lanes, bool),
    )


def _take(lanes: _Lanes, index: Any) -> _Lanes:
    return _Lanes(*(state_L[index] for state_L in lanes))


@functools.partial(jax.jit, static_argnames="law")
def _advance(
    law: Law, problem: _Problem, delta: Array, tolerance: Array, weight_LR: Array, lanes: _Lanes
) -> _Lanes:
    """Up to STEPS_PER_ROUND steps of each lane that is not done."""
    step = jax.vmap(functools.partial(_step, law, problem, delta, tolerance))

    def unfinished(carry: tuple[Array, _Lanes]) -> Array:
        return (carry[0] < STEPS_PER_ROUND) & ~jnp.all(carry[1].done)

    def proceed(carry: tuple[Array, _Lanes]) -> tuple[Array, _Lanes]:
        return carry[0] + 1, step(weight_LR, carry[1])

    count_and_lanes: tuple[Array, _Lanes] = (jnp.asarray(0), lanes)
    return jax.lax.while_loop(unfinished, proceed, count_and_lanes)[1]


def _step(
    law: Law, problem: _Problem, delta: Array, tolerance: Array, weight_R: Array, lane: _Lanes
) -> _Lanes:
    """One step of one lane: propose, evaluate once, accept or damp."""
    move_P, decrease = _propose(problem, lane)
    trial_P = jnp.clip(lane.u + move_P, problem.low, problem.high)
    trial = (trial_P, *_evaluate(law, problem, delta, weight_R, trial_P))
    better = trial[1] < lane.objective
    small = decrease <= tolerance * lane.objective + NEGLIGIBLE
    converged = jnp.isfinite(lane.objective) & small & (lane.damping <= FINAL_DAMPING)
    damping = jnp.where(better, jnp.maximum(lane.damping / 10, LEAST_DAMPING), lane.damping * 4)
    mix = jnp.where(better, 0.5 * lane.mix, jnp.minimum(10 * lane.mix + 1e-4, 1.0))
    done = converged | (damping > MOST_DAMPING)
    state = [jnp.where(better, new, old) for new, old in zip(trial, lane[:5], strict=True)]
    stepped = (*state, damping, mix, done, converged)
    kept = (jnp.where(lane.done, old, new) for new, old in zip(stepped, lane, strict=True))
    return _Lanes._make(kept)


def _propose(problem: _Problem, lane: _Lanes) -> tuple[Array, Array]:
    """The damped step, shape (P,), and the decrease of the objective its model predicts."""
    leaves_low_P = (lane.u <= problem.low) & (lane.gradient > 0)
    leaves_high_P = (lane.u >= problem.high) & (lane.gradient < 0)
    moving_P = problem.free & ~leaves_low_P & ~leaves_high_P
    slope_P = jnp.where(moving_P, lane.gradient, 0.0)
    curvature_PP = lane.mix * lane.irls + (1 - lane.mix) * lane.newton
    curvature_PP = jnp.where(jnp.outer(moving_P, moving_P), curvature_PP, 0.0)
    largest = jnp.where(moving_P, jnp.diagonal(lane.irls), 0.0).max() + jnp.finfo(float).tiny
    system_PP = curvature_PP / largest + lane.damping * jnp.eye(len(slope_P))
    factor_PP = jnp.linalg.cholesky(system_PP)
    move_P = -jax.scipy.linalg.cho_solve((factor_PP, True), slope_P) / largest
    return move_P, -0.5 * slope_P @ move_P


def _evaluate(
    law: Law, problem: _Problem, delta: Array, weight_R: Array, u_P: Array
) -> tuple[Array, Array, Array, Array]:
    """The objective, its gradient (P,) and JᵀWJ (P, P) for both kinds of W."""

    def residual(u_P: Array, columns: dict[str, Array], log_loss: Array) -> Array:
        params = law.decode(u_P, problem.mean_log, problem.free)
        return jnp.log(law.loss(params, columns)) - log_loss

    by_row = jax.vmap(jax.value_and_grad(residual), in_axes=(None, 0, 0))
    residual_R, jacobian_RP = by_row(u_P, problem.columns, problem.log_loss)
    size_R = jnp.abs(residual_R)
    inside_R = size_R <= delta
    huber_R = jnp.where(inside_R, residual_R**2 / 2, delta * (size_R - delta / 2))
    irls_R = weight_R * jnp.where(inside_R, 1.0, delta / size_R)
    weights_KR = jnp.stack([irls_R, jnp.where(inside_R, weight_R, 0.0)])
    irls_PP, newton_PP = jnp.einsum("kr,rp,rq->kpq", weights_KR, jacobian_RP, jacobian_RP)
    return weight_R @ huber_R, (irls_R * residual_R) @ jacobian_RP, irls_PP, newton_PP
