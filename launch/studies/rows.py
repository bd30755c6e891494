"""The rows of a study, and those of them that a question is about.

Bits alone do not say how a model was quantized: rows of blocks, floats or ternary weights have the
same columns as those of integers with a scale a channel, but are other points of the design. Each
is told by its policy.
"""

import dataclasses
import functools
import gzip
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from configs.studies import precision_micro
from launch.experiment import Experiment
from qat.policy import Policy
from qat.sweep import apply
from qat.sweep.table import as_csv, collect
from qat.training.files import write_whole

# All runs; some trained a second time; some rounded with rotation and without; some with a rounded
# cache, by position in the context.
TABLES = ("runs", "again", "rotated", "positions")
_PLAIN = Policy.parse("none").structure  # a scale for every channel, tensor and token
FORMATS = ("weight_format", "activation_format", "kv_format")


class NoRowsError(ValueError):
    """There is no row that a question is about."""


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """A study, and how thoroughly it is asked.

    Attributes:
        folder: holds its tables and README.
        resamples: of every bootstrap.
        starts: of every fit.
    """

    folder: Path
    resamples: int = 200
    starts: int = 64

    @functools.cached_property
    def rows(self) -> pd.DataFrame:
        """All rows of the sweeps, those of diverged and failed runs too."""
        return self.table("runs")

    def table(self, name: str) -> pd.DataFrame:
        """All rows of one of `TABLES`.

        Raises:
            NoRowsError: there is no such file.
            ValueError: it cannot be read, or a line of it is no row.
        """
        if not self.path(name).exists():
            raise NoRowsError(f"{self.path(name)} is missing")
        found = collect([self.path(name)])
        if found.left_out:
            raise ValueError(found.left_out[0])
        return found.table

    def path(self, name: str) -> Path:
        """Where a table is."""
        return self.folder / f"{name}.csv.gz"

    @functools.cached_property
    def trained(self) -> pd.DataFrame:
        """Runs that ended well, as they were trained."""
        return self.rows[(self.rows.status == "ok") & (self.rows.ptq_method == "none")]

    @functools.cached_property
    def rounded(self) -> pd.DataFrame:
        """What they are after rounding, at their ends and on the way."""
        return self.rows[
            self.rows.status.isin(("ok", "unfinished")) & (self.rows.ptq_method != "none")
        ]

    @functools.cached_property
    def rates(self) -> Mapping[int, float]:
        """Learning rate of the grid, by number of parameters."""
        config, rates = precision_micro.get_sweep().config, precision_micro.RATES
        sizes = (Experiment.from_config(apply(config, {"model.width": each})) for each in rates)
        return dict(zip((size.model.params for size in sizes), rates.values(), strict=True))

    def grid(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Dense models at the rate of their size, each with a cosine of its own."""
        rate = rows.params.map(self.rates)
        own = (rows.learning_rate == rate) & (rows.schedule == "cosine") & (rows.experts == 0)
        return rows[own]


def gather(path: Path, table: Path) -> int:
    """Adds rows to a table, which is made if it is missing; returns how many it then has.

    Raises:
        ValueError: a table cannot be read, or a line of it is no row.
        OSError: the table cannot be written.
    """
    found = collect([*([path] if path.exists() else []), table])
    if found.left_out:
        raise ValueError(found.left_out[0])
    order = ["params", "tokens", "policy", "seed", "run_id", "ptq_method", "ptq_bits"]
    rows = found.table.sort_values(order, kind="stable", ignore_index=True)
    write_whole(path, gzip.compress(as_csv(rows).encode(), mtime=0))  # equal rows, equal bytes
    return len(rows)


def some(rows: pd.DataFrame, what: str) -> pd.DataFrame:
    """The rows, if there are any.

    Raises:
        NoRowsError: there are none.
    """
    if rows.empty:
        raise NoRowsError(f"no rows of {what}")
    return rows


def integers(rows: pd.DataFrame) -> pd.DataFrame:
    """Integers with a scale for every channel of weights, tensor of activations, key and value."""
    kept = rows.policy.map(_has_plain_scales)
    for column in FORMATS:
        kept &= rows[column].str.fullmatch("none|binary|int[0-9]+")
    return rows[kept]


def alone(rows: pd.DataFrame, bits: str) -> pd.DataFrame:
    """Rows that quantize nothing, or nothing but one operand, such as "weight_bits"."""
    others = {"weight_bits", "activation_bits", "kv_bits"} - {bits}
    return rows[(rows[sorted(others)] == 16).all(axis=1)]


def with_plain(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with ``plain``, the loss of the unquantized run of the same cell, and ``delta``.

    That is what precision adds to it. Rows without such a run are left out.
    """
    cell = ["params", "tokens", "seed", "schedule", "learning_rate", "experts"]
    cell += ["experts_per_token"]
    plain = rows[rows.policy == "none"][[*cell, "loss"]].rename(columns={"loss": "plain"})
    found = rows.merge(plain, on=cell)
    return found.assign(delta=found.loss - found.plain)


def lines_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def groups(table: pd.DataFrame, *columns: str) -> Iterator[tuple[Any, ...]]:
    """For each combination of columns' values these, and then its rows."""
    for values, rows in table.groupby(list(columns)):
        yield *values, rows


@functools.cache
def _has_plain_scales(policy: str) -> bool:
    return Policy.parse(policy).structure == _PLAIN
