"""Sensitivity: what the fit would have been with another δ, another loss, or a run less.

Dropping a run is a zero in the row weights, so all of it is one batch of lanes.
"""

import dataclasses

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qat.laws import solver
from qat.laws.checklist import check_same_rows
from qat.laws.diagnostics import held_parameters
from qat.laws.law import float64_on_cpu
from qat.laws.record import LAD_DELTA, Fit
from qat.laws.solver import Rows
from qat.laws.table import Table, as_table
from qat.laws.uncertainty import runs_of

Floats = NDArray[np.float64]

_DELTAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """How a fit answers to choices that were not the data's.

    Attributes:
        by_loss: a row for each loss ("lad", "huber 0.001", "l2"), a column for each parameter.
        by_dropped: a row for each run left out: ``run`` (its run_id, or the row's index), ``shift``
            (the largest move of a parameter, in its bootstrap standard errors; NaN without
            bootstrap), ``moved`` (which one) and a column for each parameter.
    """

    by_loss: pd.DataFrame
    by_dropped: pd.DataFrame


def sensitivity(fit: Fit, table: Table | pd.DataFrame) -> Sensitivity:
    """Fits again with other losses, and without one run after another.

    Args:
        fit: whose optimum all start from.
        table: the rows of the fit.

    Raises:
        ValueError: for another table.
    """
    law, table = fit.law, as_table(table)
    check_same_rows(fit, table)
    held_P = held_parameters(law, table, fit.settings.fixed)
    log_loss_R, run_R = np.log(table.columns(["loss"])["loss"]), runs_of(table)
    with float64_on_cpu():
        problem = solver.pose(law, table, held_P)
        best_P = solver.coordinates_of(law, problem, fit.params)

        def params(delta: float, weight_LR: Floats) -> pd.DataFrame:
            rows = Rows(weight_LR, np.broadcast_to(log_loss_R, weight_LR.shape))
            start_LP = np.tile(best_P, (len(weight_LR), 1))
            found = solver.minimise(law, problem, delta, start_LP, rows)
            values = law.decode(found.u, problem.mean_log, problem.held)
            return pd.DataFrame({n: np.asarray(values[n]) for n in fit.samples or fit.params})

        everything = np.ones((1, len(table)))
        deltas = {"lad": LAD_DELTA, **{f"huber {d:g}": d for d in _DELTAS}, "l2": np.inf}
        by_loss = pd.concat({name: params(delta, everything) for name, delta in deltas.items()})
        without_UR = 1.0 - (run_R == np.arange(run_R.max() + 1)[:, None])
        by_dropped = params(fit.settings.threshold, without_UR)
    first = table.frame.groupby(run_R).head(1)
    names = first["run_id"].to_numpy() if "run_id" in first else first.index.to_numpy()
    shift = pd.DataFrame(
        {n: (by_dropped[n] - fit.params[n]).abs() / draws.std() for n, draws in fit.samples.items()}
    )
    largest = shift.max(axis=1) if fit.samples else np.nan
    moved = shift.idxmax(axis=1) if fit.samples else ""
    by_dropped = by_dropped.assign(run=names, shift=largest, moved=moved)
    order = ["run", "shift", "moved"]
    by_dropped = by_dropped[[*order, *by_dropped.columns.drop(order)]]
    return Sensitivity(
        by_loss.droplevel(1).rename_axis("loss").reset_index(),
        by_dropped.sort_values("shift", ascending=False, ignore_index=True),
    )
