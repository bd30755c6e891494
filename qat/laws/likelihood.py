"""Likelihood of robust fits: how much worse a value is than the best, in comparable numbers.

A fit that minimises ``Σ ρ(r)`` maximises the likelihood of residuals with density
``exp(-ρ(r)/τ) / Z(τ)`` at any τ, normal where ρ is a square and exponential in the tails. With τ at
its own maximum that is a likelihood for AICc and BIC which needs no other assumption than the
objective: Gauss at δ = inf, Laplace as δ goes to zero. Residuals need not have that density, and
then twice a difference of log likelihoods is no chi-squared variable but a multiple of one, which
`overdispersion` tells: the ĉ of quasi-likelihood criteria (Burnham & Anderson 2002).

A profile asks less: how far a parameter may go before the objective rises by more than chance
allows. The rise times ``2 E[ρ''] / E[ρ'²]`` is a chi-squared variable of one degree of freedom
(Schrader & Hettmansperger 1980); for squares that is the F test.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

# Arrays end in their axes: R rows.
Floats = NDArray[np.float64]

_NO_SPREAD = 1e-40  # of squared residuals: float64's own noise


def huber(residual_R: Floats, delta: float) -> Floats:
    """Huber's function, in NumPy."""
    size_R = np.abs(residual_R)
    if np.isinf(delta):
        return residual_R**2 / 2
    return np.where(size_R <= delta, size_R**2 / 2, delta * (size_R - delta / 2))


def log_likelihood(residual_R: Floats, weight_R: Floats, delta: float) -> tuple[float, float]:
    """Highest log likelihood of residuals over the scale τ, as the module says, and that scale.

    A row of weight w has the density of scale τ/w.

    Args:
        residual_R: of the log loss.
        weight_R: of the objective, positive.
        delta: of Huber's function, inf for least squares.
    """
    rho_R = huber(residual_R, delta)
    middle = max(float((weight_R @ rho_R) / len(rho_R)), 1e-300)

    def negative(log_scale: float) -> float:
        scale_R = np.exp(log_scale) / weight_R
        return float((_log_normaliser(scale_R, delta) + rho_R / scale_R).sum())

    span = (np.log(middle) - 5, np.log(middle) + 5)
    found = optimize.minimize_scalar(negative, span, bounds=span, method="bounded")
    return -float(found.fun), float(np.exp(found.x))


def overdispersion(residual_R: Floats, weight_R: Floats, delta: float) -> float:
    """How many times a chi-squared variable twice a difference of log likelihoods is.

    Args:
        residual_R: of the best law there is.
        weight_R: of the objective, positive.
        delta: of Huber's function; for least squares the answer is 1.
    """
    _, scale = log_likelihood(residual_R, weight_R, delta)
    return 2 / scale / deviance_unit(residual_R, weight_R, delta, parameters=0)


def _log_normaliser(scale_R: Floats, delta: float) -> Floats:
    """Log Z: half a normal density's mass within δ, exponential tails beyond."""
    inside_R = 0.5 * np.log(2 * np.pi * scale_R)
    if np.isinf(delta):
        return inside_R
    inside_R = inside_R + np.log(special.erf(delta / np.sqrt(2 * scale_R)))
    tails_R = np.log(2 * scale_R / delta) - delta**2 / (2 * scale_R)
    total_R: Floats = np.logaddexp(inside_R, tails_R)
    return total_R


def deviance_unit(residual_R: Floats, weight_R: Floats, delta: float, parameters: int) -> float:
    """What the objective's rise is multiplied by to be a chi-squared variable.

    Args:
        residual_R: at the optimum.
        weight_R: of the objective.
        delta: of Huber's function.
        parameters: fitted, for the residuals they took away.

    Few residuals lie within a small δ, so the density at zero is counted in a window as wide as the
    data's own (half their median size).
    """
    size_R = np.abs(residual_R) * np.sqrt(weight_R)
    slope_R = weight_R * np.clip(residual_R, -delta, delta)
    window = max(delta, float(np.median(size_R)) / 2)
    inside = float(np.mean(np.abs(residual_R) <= window))
    curvature = float(weight_R.mean()) * inside * (1.0 if np.isinf(delta) else delta / window)
    spread = float(slope_R @ slope_R) / max(len(slope_R) - parameters, 1)
    return 2 * curvature / max(spread, _NO_SPREAD)
