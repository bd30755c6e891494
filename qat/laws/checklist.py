"""What a reader needs to judge a scaling law, gathered from the table and the fit.

The topics are those of "(Mis)fitting: A Survey of Scaling Laws" (Li et al. 2025, arXiv 2502.18969),
which found most published fits to leave several out. What neither the table nor the caller says is
None, and every program prints it as missing.
"""

import hashlib
import importlib.metadata

import numpy as np
import pandas as pd

from qat.laws.law import Law
from qat.laws.record import Fit, Settings
from qat.laws.table import BITS_COLUMNS, UNITS, UNQUANTIZED_BITS, Table

_RANGES = ("params", "tokens", "flops", "loss")
_LIBRARIES = ("qat-jax", "jax", "numpy")


def checklist(law: Law, table: Table, settings: Settings) -> dict[str, str | None]:
    """Every topic with what is known of it, None where nothing is."""
    frame = table.frame
    return {
        "form": law.formula,
        "units": "; ".join(f"{name}: {UNITS[name]}" for name in ("params", "tokens", "loss")),
        "runs": f"{len(frame)} rows; {_ranges(frame)}; {_precisions(frame)}",
        "hyper-parameters": _listed(frame, ("learning_rate", "schedule", "batch_size")),
        "seeds": _listed(frame, ("seed",)),
        "checkpoints": _checkpoints(frame),
        "left out": f"{table.left_out} rows with a status other than ok",
        "objective": _objective(settings),
        "optimiser": f"batched Levenberg-Newton in float64 from {settings.starts} random starts, "
        f"seed {settings.seed}",
        "ranges of starts": _starts(law),
        "held-out validation": None,
        "uncertainty": f"bootstrap by {settings.resampling}, {settings.bootstrap} resamples"
        if settings.bootstrap
        else None,
        "data": fingerprint(law, table),
        "code": ", ".join(_version(name) for name in _LIBRARIES),
    }


def _ranges(frame: pd.DataFrame) -> str:
    spans = {name: frame[name] for name in _RANGES if name in frame}
    if {"params", "tokens"} <= set(frame):
        spans["tokens / params"] = frame["tokens"] / frame["params"]
    named = (f"{name} {column.min():.3g}…{column.max():.3g}" for name, column in spans.items())
    return ", ".join(named)


def _precisions(frame: pd.DataFrame) -> str:
    named = []
    for name in BITS_COLUMNS:
        widths = sorted(set(frame[name]) - {UNQUANTIZED_BITS})
        if widths:
            named.append(f"{name} {', '.join(f'{width:g}' for width in widths)}")
    return "; ".join(named) or "none quantized"


def _listed(frame: pd.DataFrame, names: tuple[str, ...]) -> str | None:
    """Distinct values of the columns there are; None if there is none of them."""
    found = []
    for name in names:
        if name in frame:
            values = sorted(frame[name].dropna().unique(), key=str)
            more = f" and {len(values) - 8} more" if len(values) > 8 else ""
            found.append(f"{name} {', '.join(map(str, values[:8]))}{more}")
    return "; ".join(found) or None


def _checkpoints(frame: pd.DataFrame) -> str | None:
    if "run_id" not in frame:
        return None
    budgets = frame.groupby("run_id")["tokens"].nunique()
    several = int((budgets > 1).sum())
    return f"{several} of {len(budgets)} runs are in the table at more than one number of tokens"


def _objective(settings: Settings) -> str:
    names = {"huber": f"Huber with delta {settings.delta:g}", "lad": "absolute", "l2": "squared"}
    weights = "equal weights" if settings.weights == "equal" else "weights from loss_se"
    fixed = ", ".join(f"{name} fixed at {value:g}" for name, value in settings.fixed.items())
    return ", ".join(filter(None, (f"{names[settings.loss]} log residual", weights, fixed)))


def _starts(law: Law) -> str:
    spans = (f"{p.name} {p.starts[0]:g}…{p.starts[1]:g}" for p in law.parameters)
    return f"{', '.join(spans)}; amplitudes as nats at the mean log params and log tokens"


def fingerprint(law: Law, table: Table) -> str:
    """Of what a fit of a law sees of a table: its columns, the losses, and which rows are a run."""
    names = [*law.columns, "loss", *(n for n in ("run_id", "loss_se") if n in table.frame)]
    seen = table.frame[names].astype(str)
    hashed = pd.util.hash_pandas_object(seen, index=False).to_numpy(np.uint64)
    return f"sha256 {hashlib.sha256(hashed.tobytes()).hexdigest()[:16]}"


def check_same_rows(fit: Fit, table: Table) -> None:
    """Raises ValueError if a fit was made of another table; published ones were made of none."""
    there, here = fit.checklist.get("data"), fingerprint(fit.law, table)
    if there is not None and there != here:
        raise ValueError(
            f"the table is not the one of the fit: its rows are {here}, those of the fit {there}; "
            "give the same file and the same choice of rows"
        )


def _version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} from source"
