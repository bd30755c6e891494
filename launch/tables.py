"""Tables of runs as programs take them: a file, which of its rows, and what identifies them."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:  # take seconds to import
    import pandas as pd

    from qat.laws import Table

_TABLE = flags.DEFINE_string(
    "table", None, "Runs, one a row: a .csv, .parquet or .jsonl file, such as rows.csv of a sweep."
)
_WHERE = flags.DEFINE_string(
    "where", None, "Which rows, as pandas' query understands it, such as \"policy == 'none'\"."
)
_DROP_HIGHEST = flags.DEFINE_integer(
    "drop_highest", 0, "How many rows of highest loss to leave out.", lower_bound=0
)


def given() -> bool:
    """Whether the flags name a table."""
    return _TABLE.value is not None


def read() -> tuple["Table", str | None]:
    """The table the flags name, and what was left out of it, in words.

    Raises:
        ValueError: bad input; the message names it.
        OSError: the file cannot be read.
    """
    return load(Path(str(_TABLE.value)), _WHERE.value, _DROP_HIGHEST.value)


def load(path: Path, where: str | None = None, drop_highest: int = 0) -> tuple["Table", str | None]:
    """A file's table, as `read` returns it.

    Args:
        path: of the file.
        where: which rows, for pandas' query.
        drop_highest: how many of highest loss are left out.
    """
    from qat.analysis.format_columns import with_format_columns
    from qat.laws.table import as_table, read_frame

    frame, said = read_frame(path), []
    if where:
        chosen = _chosen(frame, where)
        said.append(f"{len(frame) - len(chosen)} rows by {where}")
        frame = chosen
    table = as_table(with_format_columns(frame))
    if drop_highest:
        if drop_highest >= len(table):
            raise ValueError(f"--drop_highest={drop_highest} leaves none of {len(table)} rows")
        kept = table.frame["loss"].rank(method="first") <= len(table) - drop_highest
        table = dataclasses.replace(table, frame=table.frame[kept])
        said.append(f"{drop_highest} rows of highest loss")
    return table, "; ".join(said) or None


def _chosen(frame: "pd.DataFrame", where: str) -> "pd.DataFrame":
    import pandas as pd

    try:
        kept: Any = frame.eval(where)
    except Exception as error:  # pandas raises what its parser, Python or NumPy does
        raise ValueError(f"--where={where!r} cannot be read: {error}") from None
    if not pd.api.types.is_bool_dtype(kept):
        raise ValueError(f"--where={where!r} is no condition: expected such as 'seed == 0'")
    chosen: pd.DataFrame = frame.loc[kept]
    if chosen.empty:
        raise ValueError(f"--where={where!r} leaves none of the {len(frame)} rows")
    return chosen
