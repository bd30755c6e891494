"""The table a law is fitted to: one training run a row, checked once at the door.

Every later step (fitting, resampling, prediction) assumes positive, finite numbers and one
meaning of "unquantized". Checking here keeps those steps free of special cases, and lets an
error name the row that caused it. The rules:

* ``params`` and ``tokens`` count non-embedding parameters and training tokens; ``loss`` is in
  nats per token.
* Bits lie in (0, 16], and 16 means unquantized. A bits column that is absent is all 16. An empty
  cell of ``ptq_bits`` also means 16, because most runs are never quantized after training; an
  empty cell of another bits column is an error, because there it hides a missing measurement.
* A row whose ``status`` is not "ok" (a diverged or failed run) has no loss to fit. Such rows are
  left out, and their count is kept so that every fit reports it.
* All other columns (group, seed, ...) are kept as they are.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qat.spelling import expected_one_of

UNQUANTIZED_BITS = 16.0
BITS_COLUMNS = ("weight_bits", "activation_bits", "kv_bits", "ptq_bits")
UNITS = {
    "params": "non-embedding parameters",
    "tokens": "training tokens",
    "weight_bits": "bits in training, 16 = unquantized",
    "activation_bits": "bits in training, 16 = unquantized",
    "kv_bits": "bits in training, 16 = unquantized",
    "ptq_bits": "weight bits after post-training quantization, 16 = none",
    "loss": "nats per token",
}

_READERS: dict[str, Callable[[pathlib.Path], pd.DataFrame]] = {
    ".csv": pd.read_csv,
    ".parquet": pd.read_parquet,
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Checked runs, one a row.

    Attributes:
        frame: all columns of the source; the numeric ones that laws read are float64, every bits
            column is present, and the index is the source's, so that row names stay valid.
        left_out: how many rows of the source had a ``status`` other than "ok".
    """

    frame: pd.DataFrame
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.frame)

    def columns(self, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Numeric columns by name, each of shape (R,) and dtype float64.

        Raises:
            ValueError: if a column is missing or holds something other than finite numbers.
        """
        _require(self.frame, names)
        return {name: _numbers(self.frame, name) for name in names}


def read_table(path: str | pathlib.Path) -> Table:
    """Reads runs from a file.

    Args:
        path: a ``.csv``, ``.parquet`` (needs pyarrow) or ``.jsonl`` (one object a line) file with
            the columns of `as_table`; ``.gz`` after one of these is a compressed file.

    Returns:
        The checked table.

    Raises:
        ValueError: for an unknown suffix, or as `as_table` does.
    """
    return as_table(read_frame(path))


def read_frame(path: str | pathlib.Path) -> pd.DataFrame:
    """Reads a file of rows as they are, unchecked.

    Raises:
        ValueError: for an unknown suffix, or a file that is not what its suffix says.
        OSError: if it cannot be opened.
    """
    path = pathlib.Path(path)
    kind = pathlib.Path(path.stem if path.suffix.lower() == ".gz" else path).suffix.lower()
    reader = _READERS.get(kind)
    if reader is None:
        expected = ", ".join(_READERS)
        raise ValueError(f"cannot read {path.name!r}: expected a file ending in {expected}")
    try:
        return reader(path)
    except (ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"cannot read {path} as {kind}: {error}") from None


def as_table(
    runs: "Table | pd.DataFrame", *, required: Sequence[str] = ("params", "tokens", "loss")
) -> Table:
    """Checks a data frame of runs and gives the bits columns their meaning.

    Args:
        runs: one run a row, with the columns params (non-embedding parameters), tokens (training
            tokens), loss (nats per token) and any of weight_bits, activation_bits, kv_bits and
            ptq_bits (bits, absent = 16 = unquantized). Other columns are kept. A `Table` is
            returned as it is once the required columns are there.
        required: columns that must be present. A table to predict for needs no loss.

    Returns:
        The checked table, without the rows whose ``status`` is not "ok".

    Raises:
        ValueError: if a required column is missing, no row is left, or a value is out of range;
            the message names the row by its index in ``runs``.
    """
    if isinstance(runs, Table):
        _require(runs.frame, required)
        return runs
    _require(runs, required)
    frame = runs[runs["status"] == "ok"].copy() if "status" in runs else runs.copy()
    if frame.empty:
        raise ValueError(f"the table has no usable row: {len(runs)} rows, none with status 'ok'")
    for name in BITS_COLUMNS:
        frame[name] = _bits(frame, name)
    for name in ("params", "tokens", "loss"):
        if name in frame:
            frame[name] = _checked(frame, name, lambda x: x > 0, "positive and finite")
    return Table(frame, left_out=len(runs) - len(frame))


def unknown_name(kind: str, name: str, known: Collection[str]) -> ValueError:
    """The error for a name that is not among the known ones, with the nearest of them."""
    return ValueError(expected_one_of(kind, name, known))


def _require(frame: pd.DataFrame, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in frame]
    if missing:
        raise ValueError(
            f"the table has no column {', '.join(missing)}; "
            f"its columns are {', '.join(map(str, frame.columns))}"
        )


def _bits(frame: pd.DataFrame, name: str) -> NDArray[np.float64]:
    if name not in frame:
        return np.full(len(frame), UNQUANTIZED_BITS)
    if name == "ptq_bits":
        frame = frame.fillna({name: UNQUANTIZED_BITS})
    expected = f"in (0, {UNQUANTIZED_BITS:g}], with {UNQUANTIZED_BITS:g} for unquantized"
    return _checked(frame, name, lambda x: (x > 0) & (x <= UNQUANTIZED_BITS), expected)


def _numbers(frame: pd.DataFrame, name: str) -> NDArray[np.float64]:
    return _checked(frame, name, np.isfinite, "a finite number")


def _checked(
    frame: pd.DataFrame,
    name: str,
    allowed: Callable[[NDArray[np.float64]], NDArray[np.bool_]],
    expected: str,
) -> NDArray[np.float64]:
    """The column in float64, or a ValueError naming the first row that is not allowed."""
    numeric = pd.to_numeric(frame[name], errors="coerce")
    values: NDArray[np.float64] = numeric.to_numpy(np.float64, na_value=np.nan)
    bad = np.flatnonzero(~(np.isfinite(values) & allowed(values)))
    if bad.size:
        row, value = frame.index[bad[0]], frame[name].iloc[bad[0]]
        raise ValueError(f"{name} must be {expected}; row {row} has {value}")
    return values
