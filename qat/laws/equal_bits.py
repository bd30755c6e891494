"""Loss at equal total bits: which width should the weights have, if memory is what is scarce?

Dettmers & Zettlemoyer 2023 (arXiv 2212.09720) compare models not at equal size but at equal bits: a
model of twice the parameters at half the width. No law in D is needed, so none is assumed. Models
of one width form a curve of loss against total bits, and where curves overlap the lowest wins.
"""

import numpy as np
import pandas as pd

from qat.laws.table import Table, as_table

_POINTS = 25


def equal_bits(
    table: Table | pd.DataFrame, width: str = "ptq_bits", points: int = _POINTS
) -> pd.DataFrame:
    """The width of lowest loss at each total of bits.

    Args:
        table: runs with params, loss (nats per token), the column of widths and, if there is one,
            ``total_bits`` in every row (of the whole model, scales included); else it is params
            times width. Rows of one total and width, such as other texts and seeds, are averaged,
            so choose rows of one training length and text.
        width: column of the widths.
        points: totals, evenly spaced in the logarithm; those with one curve alone are left out.

    Returns:
        Columns ``total_bits``, ``bits`` (of the lowest loss), ``loss``, ``second`` (the width that
        comes next) and ``margin`` (nats per token between them).

    Raises:
        ValueError: a column is missing, or no two widths have models of overlapping totals.
    """
    table = as_table(table)
    columns = table.columns(("params", "loss", width))
    total_R = columns["params"] * columns[width]
    if "total_bits" in table.frame and (table.frame["total_bits"] > 0).all():
        total_R = table.columns(("total_bits",))["total_bits"]
    rows = pd.DataFrame({"bits": columns[width], "total": np.log(total_R), "loss": columns["loss"]})
    means = rows.groupby(["bits", "total"], as_index=False).mean()
    curves = [curve for _, curve in means.groupby("bits") if len(curve) > 1]
    found = [_at(total, curves) for total in np.linspace(*_span(means.total), points)]
    if not any(found):
        raise ValueError(
            f"no two values of {width} have models of overlapping total bits: "
            "each needs at least two sizes"
        )
    return pd.DataFrame([row for row in found if row])


def _span(values: pd.Series) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _at(total: float, curves: list[pd.DataFrame]) -> dict[str, float]:
    """The two best widths at a total, by interpolation within each curve; {} with fewer."""
    reached = sorted(
        (float(np.interp(total, curve.total, curve.loss)), float(curve.bits.iloc[0]))
        for curve in curves
        if curve.total.min() <= total <= curve.total.max()
    )
    if len(reached) < 2:
        return {}
    (loss, bits), (next_loss, second) = reached[:2]
    return {
        "total_bits": float(np.exp(total)),
        "bits": bits,
        "loss": loss,
        "second": second,
        "margin": next_loss - loss,
    }
