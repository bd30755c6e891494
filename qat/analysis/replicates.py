"""How far repetitions of one setting scatter: what a difference has to exceed to be an effect."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Scatter:
    """A standard deviation, pooled over settings.

    Attributes:
        deviation: root of the mean variance within settings, in the values' unit; NaN if no setting
            was repeated, or a value is NaN.
        low: end of its 95% interval, for normal values.
        high: the other end.
        freedom: repetitions beyond the first of each setting.
    """

    deviation: float
    low: float
    high: float
    freedom: int


def scatter(table: pd.DataFrame, settings: Sequence[str], column: str) -> Scatter:
    """The scatter of a column among rows that agree in others.

    Args:
        table: one repetition a row.
        settings: columns that make a setting.
        column: of the values.
    """
    groups = table.groupby(list(settings))[column]
    freedom = int((groups.size() - 1).sum())
    if freedom == 0:
        return Scatter(np.nan, np.nan, np.nan, 0)
    squares = float(np.sum((table[column] - groups.transform("mean")).to_numpy() ** 2))
    ends = stats.chi2.ppf((0.975, 0.025), freedom)
    low, high = np.sqrt(squares / ends).tolist()
    return Scatter(float(np.sqrt(squares / freedom)), low, high, freedom)
