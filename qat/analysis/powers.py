"""Does a measured quantity grow as a power of others? Least squares of logarithms."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats


@dataclasses.dataclass(frozen=True, eq=False)
class PowerLaw:
    """``y = factor · Π_x (x / mean_x)^exponent_x``, with the geometric mean of each x.

    Attributes:
        factor: in the unit of y.
        exponents: a row for each x: ``exponent`` and the ends ``low``, ``high`` of its 95%
            interval, as if logarithms scattered normally and independently.
        r2: share of the variance of log y that the law explains.
        deviation: standard deviation of log y about the law.
        rows: how many were fitted.
    """

    factor: float
    exponents: pd.DataFrame
    r2: float
    deviation: float
    rows: int


def power_law(
    y_R: Float[np.ndarray, " R"], columns: Mapping[str, Float[np.ndarray, " R"]]
) -> PowerLaw:
    """Fits a power law.

    Args:
        y_R: what grows, above 0.
        columns: by what, each above 0, by name.

    Raises:
        ValueError: a value is not above 0, or there are not more rows than exponents and factor.
    """
    for name, values_R in {"y": y_R, **columns}.items():
        if not (np.asarray(values_R) > 0).all():
            raise ValueError(f"{name} has {np.min(values_R):g}: a power law is of what is above 0")
    log_RX = np.log(np.stack([np.asarray(x_R, np.float64) for x_R in columns.values()], axis=1))
    design_RP = np.column_stack([np.ones(len(log_RX)), log_RX - log_RX.mean(axis=0)])
    rows, parameters = design_RP.shape
    if rows <= parameters:
        raise ValueError(f"{rows} rows: expected more than {parameters}, to tell how sure it is")
    log_y_R = np.log(np.asarray(y_R, np.float64))
    found_P, _, rank, _ = np.linalg.lstsq(design_RP, log_y_R, rcond=None)
    if rank < parameters:
        raise ValueError(f"{', '.join(columns)}: the rows do not tell their exponents apart")
    residual_R = log_y_R - design_RP @ found_P
    variance = float(residual_R @ residual_R) / (rows - parameters)
    error_P = np.sqrt(variance * np.diag(np.linalg.inv(design_RP.T @ design_RP)))
    half_P = stats.t.ppf(0.975, rows - parameters) * error_P
    exponents = pd.DataFrame(
        {"exponent": found_P[1:], "low": (found_P - half_P)[1:], "high": (found_P + half_P)[1:]},
        index=list(columns),
    )
    spread = float(((log_y_R - log_y_R.mean()) ** 2).sum())
    r2 = 1 - float(residual_R @ residual_R) / spread if spread > 0 else np.nan
    return PowerLaw(float(np.exp(found_P[0])), exponents, r2, float(np.sqrt(variance)), rows)
