"""Profile likelihood: how far a parameter may go, when all others follow.

At every value of a grid the other parameters are fitted again, each value one lane of the solver.
The interval is where the objective has risen by what chance allows (see `likelihood`), so it needs
neither resamples nor symmetry, and a parameter the data do not bound has an interval that does not
end: infinity there says so.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from qat.laws import solver
from qat.laws.checklist import check_same_rows
from qat.laws.diagnostics import held_parameters
from qat.laws.law import Parameter, float64_on_cpu
from qat.laws.likelihood import deviance_unit
from qat.laws.record import Fit
from qat.laws.solver import Lanes, Problem, Rows
from qat.laws.table import Table, as_table, unknown_name

# Arrays end in their axes: L values of the grid, R rows, P parameters.
Floats = NDArray[np.float64]

_POINTS = 32  # on each side
_REACH = 8.0  # of the farthest point, in the logarithm of a parameter or in a signed one itself


@dataclasses.dataclass(frozen=True)
class Profile:
    """The profile of one parameter.

    Attributes:
        interval: (low, high) at the level asked for; infinite or zero where the data set no end.
        curve: the columns ``value`` of the parameter, ``deviance`` (the rise of the objective as a
            chi-squared variable) and ``converged``.
    """

    interval: tuple[float, float]
    curve: pd.DataFrame


def profile(fit: Fit, table: Table | pd.DataFrame, parameter: str, level: float = 0.95) -> Profile:
    """The profile of a fitted parameter on the table it was fitted to.

    Args:
        fit: with equal weights.
        table: the rows of the fit.
        parameter: its name.
        level: of confidence.

    Raises:
        ValueError: for another table than the fit's, a parameter that is unknown or was not fitted,
            a level outside (0, 1), or a fit with other weights.
    """
    law, table = fit.law, as_table(table)
    check_same_rows(fit, table)
    held_P = held_parameters(law, table, fit.settings.fixed)
    fitted = [name for name, held in zip(law.names, held_P, strict=True) if np.isnan(held)]
    if parameter not in fitted:
        raise unknown_name("fitted parameter", parameter, fitted)
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level}")
    if fit.settings.weights != "equal":
        raise ValueError(f"a profile needs equal weights; the fit has {fit.settings.weights!r}")
    which = law.names.index(parameter)
    with float64_on_cpu():
        curve = _curve(fit, table, held_P, which)
    freedom = max(fit.diagnostics.runs - fit.diagnostics.parameters, 1)
    threshold = float(special.fdtri(1, freedom, level))
    best = fit.params[parameter]
    low = _end(curve[curve.value < best][::-1], threshold)
    high = _end(curve[curve.value > best], threshold)
    nowhere = -np.inf if law.parameters[which].signed else 0.0
    return Profile((nowhere if low is None else low, np.inf if high is None else high), curve)


def _curve(fit: Fit, table: Table, held_P: Floats, which: int) -> pd.DataFrame:
    """Deviance at values of the parameter on both sides of the optimum."""
    law, parameter, delta = fit.law, fit.law.parameters[which], fit.settings.threshold
    log_loss_R = np.log(table.columns(["loss"])["loss"])
    residual_R = np.log(fit.predict(table)) - log_loss_R
    unit = deviance_unit(residual_R, np.ones(len(table)), delta, fit.diagnostics.parameters)
    problem = _uncentred(solver.pose(law, table, held_P), parameter)

    def minimise(problem: Problem, start_LP: Floats) -> Lanes:
        shape = (len(start_LP), len(table))
        rows = Rows(np.ones(shape), np.broadcast_to(log_loss_R, shape))
        return solver.minimise(law, problem, delta, start_LP, rows)

    best_P = solver.coordinates_of(law, problem, fit.params)
    best = minimise(problem, best_P[None]).take(0)
    start_LP = best.u + _moves(best.irls, np.isnan(held_P), which, unit)
    alone = problem._replace(moving=problem.moving & (jnp.arange(len(best_P)) != which))
    lanes = minimise(alone, start_LP)
    value_L = lanes.u[:, which] if parameter.signed else np.exp(lanes.u[:, which])
    deviance_L = np.maximum(lanes.objective - best.objective, 0.0) * unit
    return pd.DataFrame({"value": value_L, "deviance": deviance_L, "converged": lanes.converged})


def _uncentred(problem: Problem, parameter: Parameter) -> Problem:
    """The problem whose coordinate of an amplitude is the amplitude, not its term at the mean."""
    if not parameter.powers:
        return problem
    zero = {column: jnp.asarray(0.0) for column, _, _ in parameter.powers}
    everywhere = jnp.full_like(problem.low, jnp.inf)
    return problem._replace(mean_log=problem.mean_log | zero, low=-everywhere, high=everywhere)


def _moves(curvature_PP: Floats, fitted_P: NDArray[np.bool_], which: int, unit: float) -> Floats:
    """Moves away from the optimum, shape (L, P), in order; the others follow as in a quadratic."""
    inverse_PP = np.zeros_like(curvature_PP)
    fitted = np.ix_(fitted_P, fitted_P)
    inverse_PP[fitted] = np.linalg.pinv(curvature_PP[fitted], hermitian=True)
    variance = max(float(inverse_PP[which, which]), 1e-300)
    near = np.linspace(0.0, 6.0, _POINTS // 2 + 1)[1:] * np.sqrt(2 * variance / unit)
    far = np.geomspace(near[-1], max(_REACH, 2 * near[-1]), _POINTS // 2 + 1)[1:]
    steps = np.concatenate([near, far])
    return np.outer(np.concatenate([-steps[::-1], steps]), inverse_PP[which] / variance)


def _end(side: pd.DataFrame, threshold: float) -> float | None:
    """Where the deviance first passes the threshold, going away from the optimum."""
    outside = np.flatnonzero(side.deviance.to_numpy() > threshold)
    if not outside.size:
        return None
    # The root of the deviance is nearly straight; at the optimum it is zero.
    root, value = np.sqrt(side.deviance.to_numpy()), side.value.to_numpy()
    last = outside[0]
    if last == 0:
        return float(value[0])
    share = (np.sqrt(threshold) - root[last - 1]) / (root[last] - root[last - 1])
    return float(value[last - 1] + share * (value[last] - value[last - 1]))
