"""Ordered hold-outs: fit the near, predict the far, as a plan will.

A random split asks for interpolation, which every flexible law does well. What a law is for is
larger models, more tokens, fewer bits; so the rows that are farthest in one of these are left out
of the fit and predicted by it.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from qat.laws.record import Fit
from qat.laws.table import BITS_COLUMNS, Table
from qat.spelling import expected_one_of

# Arrays end in their axes: R rows.
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

ORDERED = ("largest-params", "largest-compute", "lowest-bits", "longest-ratio")
_LEAST_SHARE = 0.1  # of the rows are held out, whole values of what orders them
_MOST_SHARE = 0.5


def folds(holdout: str, table: Table) -> list[Bools]:
    """Which rows are held out, for every fold of a hold-out, shape (R,) each.

    Args:
        holdout: "largest-params", "largest-compute" (the column flops, else 6 N D),
            "lowest-bits" (of any operand), "longest-ratio" (of tokens to params), or
            "each:COLUMN" to leave out every value of a column in turn.
        table: whose rows they are.

    Raises:
        ValueError: for an unknown hold-out or column, or one that leaves nothing to fit.
    """
    kind, _, column = holdout.partition(":")
    if kind == "each" and column:
        if column not in table.frame:
            raise ValueError(
                expected_one_of("column of a hold-out", column, table.frame.columns.tolist())
            )
        values = table.frame[column].to_numpy()
        groups = [values == value for value in dict.fromkeys(values.tolist())]
        if len(groups) < 2:
            raise ValueError(f"all rows have {column} = {values[0]}")
        return [np.asarray(group, bool) for group in groups]
    if holdout not in ORDERED:
        raise ValueError(expected_one_of("hold-out", holdout, (*ORDERED, "each:COLUMN")))
    return [_farthest(_order(holdout, table))]


def predicted_apart(
    holdout: str | Sequence[str], table: Table, fitted: Sequence[Callable[[Table], Fit]]
) -> tuple[dict[str, Floats], dict[str, str]]:
    """Log residuals of rows as predicted without them.

    Args:
        holdout: one or more.
        table: all rows.
        fitted: fits a law to the rows that are left; one for each law.

    Returns:
        For each hold-out the residuals, shape (L, R): NaN for rows in no fold, infinite for those
        a law cannot predict. And why some hold-outs could not be made.

    Raises:
        ValueError: a hold-out that was asked for by name cannot be made; of `ORDERED` as it stands,
            what the table does not allow is left out.
    """
    asked = (holdout,) if isinstance(holdout, str) else tuple(holdout)
    found, impossible = {}, {}
    for name in asked:
        try:
            masks = folds(name, table)
            found[name] = np.array([_errors(table, masks, each) for each in fitted])
        except ValueError as error:
            reason = f"hold-out {name!r}: {error}"
            if asked != ORDERED:
                raise ValueError(reason) from None
            impossible[name] = reason
    return found, impossible


def _errors(table: Table, masks: Sequence[Bools], fitted: Callable[[Table], Fit]) -> Floats:
    """Log residual of every row as predicted without its fold, (R,)."""
    log_loss_R = np.log(table.columns(["loss"])["loss"])
    error_R = np.full(len(table), np.nan)
    for held_R in masks:
        near = dataclasses.replace(table, frame=table.frame[~held_R])
        predicted_R = np.log(fitted(near).predict(table))
        error_R[held_R] = (predicted_R - log_loss_R)[held_R]
        error_R[held_R & np.isnan(predicted_R)] = np.inf
    return error_R


def _order(holdout: str, table: Table) -> Floats:
    """What the rows are ordered by; the largest are held out."""
    columns = table.columns(("params", "tokens"))
    if holdout == "largest-params":
        return columns["params"]
    if holdout == "largest-compute":
        if "flops" in table.frame:
            return table.columns(("flops",))["flops"]
        return 6 * columns["params"] * columns["tokens"]
    if holdout == "longest-ratio":
        return columns["tokens"] / columns["params"]
    fewest_R: Floats = np.min(list(table.columns(BITS_COLUMNS).values()), axis=0)
    return -fewest_R


def _farthest(order_R: Floats) -> Bools:
    """The fewest of the largest distinct values that are a tenth of the rows."""
    for value in np.unique(order_R)[:0:-1]:
        held_R: Bools = order_R >= value
        if held_R.mean() >= _LEAST_SHARE:
            break
    else:
        raise ValueError(f"all rows have one value, {abs(order_R[0]):g}")
    if held_R.mean() > _MOST_SHARE:
        raise ValueError(f"it would leave out {held_R.mean():.0%} of the rows")
    return held_R
