"""Bootstrap resamples, and the intervals their fits give.

A resample is a vector of row weights and one of log losses, so that all resamples share one table
and one compiled program. Three kinds:

    runs   pairs of a row and its loss drawn with replacement, all rows of a ``run_id`` together:
           rows of one run (rounded in many ways, evaluated on many texts) share its luck. Assumes
           neither a distribution of residuals nor a constant variance, and shows the skew that
           amplitudes have. Without that column every row is a run.
    rows   pairs, each row by itself.
    wild   the design stays, and the residuals of every run change sign together at random (Wu
           1986; by cluster Cameron, Gelbach & Miller 2008). For designs of few sizes, where a
           resample of rows may leave one out.

Percentile intervals of n runs are too narrow by about ``n / (n - P)`` and by the tails that Student
has and the normal curve has not. The t-corrected ones take percentiles further out by both
(Hesterberg 2015, the expanded percentile interval), which keeps the skew. All see sampling error
only; that another form of law would fit as well is not in them: see `compare`.
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from qat.laws.solver import Rows
from qat.laws.table import Table

# Arrays end in their axes: S resamples, R rows.
Floats = NDArray[np.float64]
Intervals = dict[str, tuple[float, float]]

RESAMPLINGS = ("runs", "rows", "wild")
INTERVALS = ("t", "percentile")


def runs_of(table: Table) -> NDArray[np.intp]:
    """The number of the run of every row, shape (R,); a row without ``run_id`` is a run."""
    if "run_id" not in table.frame:
        return np.arange(len(table))
    run_R, known = pd.factorize(table.frame["run_id"])
    nameless_R = run_R < 0
    run_R[nameless_R] = len(known) + np.arange(nameless_R.sum())
    return np.asarray(run_R, np.intp)


def resample(
    rng: np.random.Generator,
    resampling: str,
    count: int,
    run_R: NDArray[np.intp],
    rows: Rows,
    predicted_R: Floats,
    parameters: int,
) -> Rows:
    """Weights and log losses of resampled tables, shape (S, R) each.

    Args:
        rng: draws them.
        resampling: "runs", "rows" or "wild".
        count: of resamples.
        run_R: the run of every row.
        rows: weights and log losses of the table itself, shape (R,) each.
        predicted_R: logarithm of the fitted loss.
        parameters: how many were fitted; the wild residuals are larger by ``sqrt(n / (n - P))``.
    """
    shape = (count, len(run_R))
    if resampling == "wild":
        sign_SU = rng.choice([-1.0, 1.0], (count, run_R.max() + 1))
        widened = np.sqrt(len(run_R) / max(len(run_R) - parameters, 1))
        residual_R = widened * (rows.log_loss - predicted_R)
        log_loss_SR = predicted_R + residual_R * sign_SU[:, run_R]
        return Rows(np.broadcast_to(rows.weight, shape), log_loss_SR)
    unit_R = run_R if resampling == "runs" else np.arange(len(run_R))
    units = unit_R.max() + 1
    drawn_SU = rng.multinomial(units, np.full(units, 1 / units), size=count)
    return Rows(rows.weight * drawn_SU[:, unit_R], np.broadcast_to(rows.log_loss, shape))


def interval(
    draws_S: Floats | None, level: float, kind: str, runs: int, parameters: int
) -> tuple[float, float]:
    """An interval of bootstrap draws; (nan, nan) of none.

    Args:
        draws_S: fitted values of the resamples.
        level: of confidence, such as 0.95.
        kind: "t" or "percentile".
        runs: how many were resampled.
        parameters: how many were fitted to them.
    """
    if draws_S is None or not draws_S.size:
        return (np.nan, np.nan)
    outside = (1 - level) / 2
    if kind == "t":
        freedom = max(runs - parameters, 1)
        further = np.sqrt(runs / freedom) * special.stdtrit(freedom, outside)
        outside = float(special.ndtr(further))
    low, high = np.quantile(draws_S, (outside, 1 - outside))
    return (float(low), float(high))
