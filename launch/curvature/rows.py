"""Rows of an analysis: one for each spectrum, one for each expansion, each in a file of its own.

Columns that result rows have too mean the same and have the same names, so that tables can be
joined by `run_id`, `ptq_method` and `ptq_quantizer`. What there is one of for each tensor or
eigenvalue is an object in the files of rows, and a column each in the CSV files, such as
`trace_of.blocks/mlp/down/kernel` and `eigenvalue.1`; `eigenvalue.-1` is the smallest.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pandas as pd

from qat.training.files import write_whole

Kind = TypeVar("Kind", bound="RunRow")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRow:
    """Of which model, on which text.

    Attributes:
        run_id: of the run.
        checkpoint: its folder.
        params: N, non-embedding parameters.
        tokens: D, training tokens; 0 of a converted model.
        seed: of the run.
        policy: of training.
        learning_rate: peak.
        schedule: name.
        config_hash: of the run's config.
        loss: of the run's own row, nats per token.
        loss_se: its standard error.
        eval_set: text on which the curvature is.
        data_fingerprint: of that text's corpus.
        basis: "none", or "quarot": coordinates of the weights.
        wall_s: seconds it took.
    """

    run_id: str
    checkpoint: str
    params: int
    tokens: int
    seed: int
    policy: str
    learning_rate: float
    schedule: str
    config_hash: str
    loss: float
    loss_se: float
    eval_set: str
    data_fingerprint: str
    basis: str
    wall_s: float

    @property
    def key(self) -> tuple[str, ...]:
        """What it is of, of all rows of its kind."""
        return self.run_id, self.eval_set, self.basis


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectrumRow(RunRow):
    """Gradient and Hessian of the mean loss in the weights that methods round, nats per token.

    Attributes:
        weights: how many there are.
        gradient_norm: Euclidean.
        gradient_noise: the norm that sampling text alone would give it, see `qat.analysis`.
        trace: of the Hessian.
        trace_se: its standard error, over probes and text.
        trace_of: of the diagonal block of each tensor.
        trace_se_of: standard error.
        eigenvalue: by rank from 1, the largest; from -1, the smallest.
        eigenvalue_bound: of their error on the text they are of.
        eigenvalue_converged: whether that is within the tolerance.
        products: with the Hessian that the eigenvalues took.
    """

    weights: int
    gradient_norm: float
    gradient_noise: float
    trace: float
    trace_se: float
    trace_of: Mapping[str, float]
    trace_se_of: Mapping[str, float]
    eigenvalue: Mapping[str, float]
    eigenvalue_bound: Mapping[str, float]
    eigenvalue_converged: Mapping[str, bool]
    products: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpansionRow(RunRow):
    """What rounding by a method to a format costs, and why; nats per token.

    Attributes:
        ptq_method: as in result rows, like all that begin so.
        ptq_quantizer: of the weights.
        ptq_format: name.
        ptq_bits: of a weight.
        ptq_calibration: how much of which text the method saw, or "none".
        ptq_delta: loss minus that of the same model unquantized, on all sequences.
        ptq_delta_se: standard error, paired by sequence.
        change: the same on the sequences of the expansion, like all that follows.
        change_se: standard error over batches, like those below.
        linear: gᵀΔ.
        linear_se: standard error.
        quadratic: ½ ΔᵀHΔ.
        quadratic_se: standard error.
        remaining: change − linear − quadratic.
        remaining_se: standard error, paired by batch.
        squared_norm: ΔᵀΔ.
        squared_norm_of: of each tensor.
        quadratic_of: ½ ΔᵀHΔ were this tensor alone rounded; empty unless asked for.
        status: "ok", or "diverged" where a number is not finite.
    """

    ptq_method: str
    ptq_quantizer: str
    ptq_format: str
    ptq_bits: float
    ptq_calibration: str
    ptq_delta: float
    ptq_delta_se: float
    change: float
    change_se: float
    linear: float
    linear_se: float
    quadratic: float
    quadratic_se: float
    remaining: float
    remaining_se: float
    squared_norm: float
    squared_norm_of: Mapping[str, float]
    quadratic_of: Mapping[str, float]
    status: str

    @property
    def key(self) -> tuple[str, ...]:
        """What it is of, of all rows of its kind."""
        return self.run_id, self.eval_set, self.ptq_method, self.ptq_quantizer


def save(path: Path, row: RunRow) -> None:
    """Writes a row as a JSON line; the file appears whole or not at all."""
    write_whole(path, json.dumps(dataclasses.asdict(row)) + "\n")


def saved(folder: Path, kind: type[Kind]) -> list[Kind]:
    """The rows of a folder, ordered by file name.

    Raises:
        ValueError: a file holds something else than such rows.
    """
    fields = {field.name for field in dataclasses.fields(kind)}
    found: list[Kind] = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: expected a JSON object a line; {error}") from None
            if not isinstance(row, dict) or set(row) != fields:
                raise ValueError(f"{path}: a line is not a row of {kind.__name__}")
            found.append(kind(**row))
    return found


def write_table(path: Path, rows: Sequence[RunRow]) -> None:
    """Writes rows as CSV, whole or not at all."""
    frame = pd.json_normalize([dataclasses.asdict(row) for row in rows])
    write_whole(path, frame.to_csv(index=False, na_rep="NaN"))
