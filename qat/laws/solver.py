"""Robust minimisation of many lanes at once: every start, resample and profile point is a lane.

What is minimised is ``Σ_r w_r ρ(log L_pred - log L)``, ρ being Huber's function (Hoffmann et al.
2022; Besiroglu et al. 2024, arXiv 2404.10102). One δ covers the three losses: least squares is
δ = inf, least absolute deviation a δ far below any residual. A lane has its own row weights w and
its own log L, so that all kinds of resamples share one table and one compiled program.

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
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from qat.laws.law import Law
from qat.laws.table import Table

# Arrays end in their axes: L lanes, R rows (padded in a program), P parameters.
Floats = NDArray[np.float64]

NEGLIGIBLE = 1e-22  # an objective that small is float64's own noise, in a few hundred residuals
_TOP_OF_LADDER = 1e-2
_TOLERANCE = 1e-12
_LOOSE_TOLERANCE = 1e-4  # of the rungs above the last, which only lead to it
_FIRST_DAMPING, _FINAL_DAMPING = 1e-2, 1e-5  # relative to H's largest diagonal
_LEAST_DAMPING, _MOST_DAMPING = 1e-9, 1e8
# Static sizes, so that tables and resamples of all sizes share compiled programs.
_LANES = 128
_ROW_MULTIPLE = 128
_STEPS_PER_ROUND = 16
_MAX_ROUNDS = 12


class Problem(NamedTuple):
    """A table as the solver sees it, its rows padded to a multiple.

    Attributes:
        columns: what the law reads, (R,) each.
        mean_log: mean logarithm of each, the centre of amplitudes.
        held: values at which parameters are held, NaN for those that are fitted, (P,).
        moving: False where the fitted coordinate stays at its start, (P,).
        low: least fitted coordinates, (P,).
        high: greatest, (P,).
    """

    columns: dict[str, Array]
    mean_log: dict[str, Array]
    held: Array
    moving: Array
    low: Array
    high: Array


class Rows(NamedTuple):
    """What a lane makes of the table: NumPy arrays with a leading axis L, or one lane's."""

    weight: Any  # (R,)
    log_loss: Any  # (R,)


class Lanes(NamedTuple):
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

    def take(self, index: Any) -> "Lanes":
        """Some of the lanes, or one."""
        return Lanes(*(state_L[index] for state_L in self))


def pose(law: Law, table: Table, held_P: Floats) -> Problem:
    """A problem of a law and a table; `minimise` takes the losses apart from it."""
    columns = table.columns(law.columns)
    padding = (0, -len(table) % _ROW_MULTIPLE)
    padded = {name: np.pad(column_R, padding, "edge") for name, column_R in columns.items()}
    mean_log = {name: np.log(columns[name]).mean() for name in law.centred}
    low_P, high_P = law.coordinates("bounds")
    problem = (padded, mean_log, held_P, np.isnan(held_P), low_P, high_P)
    return Problem(*jax.tree.map(jnp.asarray, problem))


def coordinates_of(law: Law, problem: Problem, params: Mapping[str, float]) -> Floats:
    """Fitted coordinates of parameters, to start from, shape (P,); NaN is what has no data."""
    known = law.neutral | {name: x for name, x in params.items() if not np.isnan(x)}
    mean_log = {name: float(mean) for name, mean in problem.mean_log.items()}
    return np.where(np.isnan(problem.held), law.encode(known, mean_log), 0.0)


def minimise(law: Law, problem: Problem, threshold: float, start_LP: Floats, rows: Rows) -> Lanes:
    """Minimises every lane from its start, down the ladder to δ.

    Args:
        law: gives the predicted loss.
        problem: the table.
        threshold: δ of Huber's function.
        start_LP: fitted coordinates to start from.
        rows: weights and log losses of the table's rows, shape (L, R) each.

    Returns:
        The lanes as they ended; `Lanes.converged` says which met the tolerance.
    """
    # The law reads one row's columns, all of the same padded length.
    padding = len(next(iter(problem.columns.values()))) - rows.weight.shape[1]
    padded = Rows(*(np.pad(each_LR, ((0, 0), (0, padding))) for each_LR in rows))
    rungs = [threshold]
    while rungs[-1] < _TOP_OF_LADDER:
        rungs.append(10 * rungs[-1])
    lanes = _unstarted(start_LP)
    for delta in reversed(rungs):
        tolerance = _TOLERANCE if delta == threshold else _LOOSE_TOLERANCE
        lanes = _unstarted(lanes.u)
        pending = np.arange(len(start_LP))
        for _ in range(_MAX_ROUNDS):
            for first in range(0, len(pending), _LANES):
                # Short of lanes, some are repeated: the same state gives the same result.
                index_L = np.resize(pending[first : first + _LANES], _LANES)
                chosen = Rows(*(each_LR[index_L] for each_LR in padded))
                advanced = _advance(law, problem, delta, tolerance, chosen, lanes.take(index_L))
                for state_L, advanced_L in zip(lanes, advanced, strict=True):
                    state_L[index_L] = advanced_L
            pending = pending[~lanes.done[pending]]
    return lanes


def evaluate(
    law: Law, problem: Problem, delta: Array, rows: Rows, u_P: Array
) -> tuple[Array, Array, Array, Array]:
    """The objective, its gradient (P,) and JᵀWJ (P, P) for both kinds of W, of one lane."""

    def residual(u_P: Array, columns: dict[str, Array], log_loss: Array) -> Array:
        params = law.decode(u_P, problem.mean_log, problem.held)
        return jnp.log(law.loss(params, columns)) - log_loss

    by_row = jax.vmap(jax.value_and_grad(residual), in_axes=(None, 0, 0))
    residual_R, jacobian_RP = by_row(u_P, problem.columns, rows.log_loss)
    size_R = jnp.abs(residual_R)
    inside_R = size_R <= delta
    irls_R = rows.weight * jnp.where(inside_R, 1.0, delta / size_R)
    weights_KR = jnp.stack([irls_R, jnp.where(inside_R, rows.weight, 0.0)])
    irls_PP, newton_PP = jnp.einsum("kr,rp,rq->kpq", weights_KR, jacobian_RP, jacobian_RP)
    objective = rows.weight @ huber(residual_R, delta)
    return objective, (irls_R * residual_R) @ jacobian_RP, irls_PP, newton_PP


def huber(residual: Array, delta: Array | float) -> Array:
    """Huber's function: half the square up to δ, δ times the excess over δ/2 beyond."""
    size = jnp.abs(residual)
    return jnp.where(size <= delta, residual**2 / 2, delta * (size - delta / 2))


def _unstarted(u_LP: Floats) -> Lanes:
    """Lanes that have evaluated nothing yet: their first step moves nowhere and is accepted."""
    lanes, parameters = u_LP.shape
    return Lanes(
        u=u_LP.copy(),
        objective=np.full(lanes, np.inf),
        gradient=np.zeros((lanes, parameters)),
        irls=np.zeros((lanes, parameters, parameters)),
        newton=np.zeros((lanes, parameters, parameters)),
        damping=np.full(lanes, _FIRST_DAMPING),
        mix=np.ones(lanes),
        done=np.zeros(lanes, bool),
        converged=np.zeros(lanes, bool),
    )


@functools.partial(jax.jit, static_argnames="law")
def _advance(
    law: Law, problem: Problem, delta: Array, tolerance: Array, rows: Rows, lanes: Lanes
) -> Lanes:
    """Up to _STEPS_PER_ROUND steps of each lane that is not done."""
    step = jax.vmap(functools.partial(_step, law, problem, delta, tolerance))

    def unfinished(carry: tuple[Array, Lanes]) -> Array:
        return (carry[0] < _STEPS_PER_ROUND) & ~jnp.all(carry[1].done)

    def proceed(carry: tuple[Array, Lanes]) -> tuple[Array, Lanes]:
        return carry[0] + 1, step(rows, carry[1])

    count_and_lanes: tuple[Array, Lanes] = (jnp.asarray(0), lanes)
    return jax.lax.while_loop(unfinished, proceed, count_and_lanes)[1]


def _step(
    law: Law, problem: Problem, delta: Array, tolerance: Array, rows: Rows, lane: Lanes
) -> Lanes:
    """One step of one lane: propose, evaluate once, accept or damp."""
    move_P, decrease = _propose(problem, lane)
    bounded_P = jnp.clip(lane.u + move_P, problem.low, problem.high)
    trial_P = jnp.where(problem.moving, bounded_P, lane.u)
    trial = (trial_P, *evaluate(law, problem, delta, rows, trial_P))
    better = trial[1] < lane.objective
    small = decrease <= tolerance * lane.objective + NEGLIGIBLE
    converged = jnp.isfinite(lane.objective) & small & (lane.damping <= _FINAL_DAMPING)
    damping = jnp.where(better, jnp.maximum(lane.damping / 10, _LEAST_DAMPING), lane.damping * 4)
    mix = jnp.where(better, 0.5 * lane.mix, jnp.minimum(10 * lane.mix + 1e-4, 1.0))
    done = converged | (damping > _MOST_DAMPING)
    state = [jnp.where(better, new, old) for new, old in zip(trial, lane[:5], strict=True)]
    stepped = (*state, damping, mix, done, converged)
    kept = (jnp.where(lane.done, old, new) for new, old in zip(stepped, lane, strict=True))
    return Lanes._make(kept)


def _propose(problem: Problem, lane: Lanes) -> tuple[Array, Array]:
    """The damped step, shape (P,), and the decrease of the objective its model predicts."""
    leaves_low_P = (lane.u <= problem.low) & (lane.gradient > 0)
    leaves_high_P = (lane.u >= problem.high) & (lane.gradient < 0)
    moving_P = problem.moving & ~leaves_low_P & ~leaves_high_P
    slope_P = jnp.where(moving_P, lane.gradient, 0.0)
    curvature_PP = lane.mix * lane.irls + (1 - lane.mix) * lane.newton
    curvature_PP = jnp.where(jnp.outer(moving_P, moving_P), curvature_PP, 0.0)
    largest = jnp.where(moving_P, jnp.diagonal(lane.irls), 0.0).max() + jnp.finfo(float).tiny
    system_PP = curvature_PP / largest + lane.damping * jnp.eye(len(slope_P))
    factor_PP = jnp.linalg.cholesky(system_PP)
    move_P = -jax.scipy.linalg.cho_solve((factor_PP, True), slope_P) / largest
    return move_P, -0.5 * slope_P @ move_P
