"""The best clip for a normal variable, by integrals over each rounding cell and a minimiser."""

import functools

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import norm


@functools.cache
def _gaussian_clip(values):
    levels = np.array(values) / values[-1]
    starts = np.geomspace(0.3, 20, 400)
    errors = [gaussian_error(levels * c) for c in starts]
    best = int(np.argmin(errors))
    bounds = starts[max(best - 1, 0)], starts[min(best + 1, starts.size - 1)]
    found = minimize_scalar(
        lambda c: gaussian_error(levels * c),
        bounds=bounds,
        method="bounded",
        options={"xatol": 1e-9},
    )
    return float(found.x)


def gaussian_clip(fmt):
    """Where the highest value belongs, in standard deviations, for the least squared error."""
    return _gaussian_clip(tuple(fmt.values))


def gaussian_error(levels):
    """Mean squared error of rounding a standard normal variable, by integrals over each cell.

    Over a < t < b: ∫(t - v)² φ = (1 + v²)(Φ(b) - Φ(a)) + aφ(a) - bφ(b) - 2v(φ(a) - φ(b)).
    """
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    density = norm.pdf(edges)
    finite = np.where(np.isfinite(edges), edges, 0.0)
    # From the tail that is nearer, so that small cells keep their digits.
    mass = np.where(levels > 0, -np.diff(norm.sf(edges)), np.diff(norm.cdf(edges)))
    inner = (1 + levels**2) * mass - np.diff(finite * density) + 2 * levels * np.diff(density)
    return float(inner.sum())
