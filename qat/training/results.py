"""A result is a row, written by the program that measured it.

Every evaluation, also of a diverged run, is one `Row`. A run's rows go into one file of their own
in one atomic step, so readers never see half of them, and a table is the union of such files.
A field that has a default may be missing in a file: rows from before it was measured stay readable.
"""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from qat.training.files import write_whole

UNQUANTIZED_BITS = 16.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One evaluation of one trained model.

    Bits are per element; 16 stands for unquantized. Formats are names that `qat.parse_format`
    reads.

    Attributes:
        run_id: hash of the resolved config and the data; rows of one run share it.
        params: N, non-embedding parameters, those of all experts.
        tokens: D, training tokens.
        weight_bits: while training.
        activation_bits: while training.
        kv_bits: of the attention cache while training.
        weight_format: name.
        activation_format: name.
        kv_format: name.
        experts: of a mixture in place of each gated layer; 0 is none.
        experts_per_token: of these, how many a token passes through; 0 without a mixture.
        policy: of training, as `qat.Policy.parse` reads it.
        init: checkpoint that training began with, "folder@fingerprint", or "none"; `tokens` and
            `flops` do not count what it took.
        teacher: checkpoint whose soft labels were learned, as `init`, or "none".
        ptq_method: "none" or the name of a post-training method.
        ptq_bits: after training; 16 without post-training quantization.
        ptq_format: name.
        ptq_quantizer: of the weights, as `qat.Quantizer.parse` reads it, or "none".
        ptq_activations: quantizer of the activations after training, or "none".
        ptq_kv_cache: quantizer of the cache after training, or "none".
        ptq_calibration: how much of which text the method saw, or "none".
        eval_set: what was evaluated on.
        loss: nats per token; NaN if diverged.
        loss_se: its standard error over sequences, nats per token.
        ptq_delta: loss minus that of the same model unquantized, nats per token; NaN if diverged.
        ptq_delta_se: standard error of that difference, paired by sequence.
        ptq_kl: divergence of its next-token distributions from those of the same model unquantized,
            KL(unquantized ‖ quantized), nats per token.
        ptq_kl_se: its standard error over sequences.
        ptq_agreement: share of tokens where both models think the same next token most likely.
        ptq_wall_s: seconds it took to quantize and evaluate.
        total_bits: of the model after quantization, codes, scales and unquantized numbers; 0 where
            nobody counted.
        seed: of initialisation and data order.
        learning_rate: peak.
        schedule: name.
        flops: of training.
        status: "ok", "diverged", "failed", or "unfinished" of a run that was still going on.
        wall_s: training time of the process that finished the run, seconds; where it was the first
            of its shape there, with compiling.
        data_fingerprint: of the corpus of `eval_set`.
        config_hash: of the resolved config alone.
        versions: of the packages that matter.
    """

    run_id: str
    params: int
    tokens: int
    weight_bits: float
    activation_bits: float
    kv_bits: float
    weight_format: str
    activation_format: str
    kv_format: str
    experts: int = 0
    experts_per_token: int = 0
    policy: str
    init: str = "none"
    teacher: str = "none"
    ptq_method: str = "none"
    ptq_bits: float = UNQUANTIZED_BITS
    ptq_format: str = "none"
    ptq_quantizer: str = "none"
    ptq_activations: str = "none"
    ptq_kv_cache: str = "none"
    ptq_calibration: str = "none"
    eval_set: str
    loss: float
    loss_se: float
    ptq_delta: float = 0.0
    ptq_delta_se: float = 0.0
    ptq_kl: float = 0.0
    ptq_kl_se: float = 0.0
    ptq_agreement: float = 1.0
    ptq_wall_s: float = 0.0
    total_bits: float = 0.0
    seed: int
    learning_rate: float
    schedule: str
    flops: float
    status: str
    wall_s: float
    data_fingerprint: str
    config_hash: str
    versions: str


DEFAULTS: Mapping[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(Row)
    if field.default is not dataclasses.MISSING
}


def hash_of(value: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that identify a JSON-like value, whatever its key order."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def package_versions() -> str:
    """Interpreter and packages that decide a result's bits."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    versions = [f"{name} {metadata.version(name)}" for name in packages]
    return ", ".join([f"python {platform.python_version()}", *versions])


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes a run's rows as JSON lines; the file appears whole or not at all."""
    write_whole(path, "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))


def rows_of(folder: Path) -> list[Row]:
    """The rows of all runs of a folder, ordered by file name.

    Raises:
        ValueError: a file holds something else than rows.
    """
    found: list[Row] = []
    names = {field.name for field in dataclasses.fields(Row)}
    for path in sorted(folder.glob("*.jsonl")):
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: expected result rows, one JSON object a line; {error}"
            ) from None
        for row in rows:
            if not isinstance(row, dict) or {*DEFAULTS, *row} != names:
                raise ValueError(f"{path}: a line is not a result row")
        found += [Row(**row) for row in rows]
    return found


def read_rows(folder: Path) -> pd.DataFrame:
    """The rows of `rows_of` as a table."""
    columns = [field.name for field in dataclasses.fields(Row)]
    return pd.DataFrame([dataclasses.asdict(row) for row in rows_of(folder)], columns=columns)
