"""What a fit reports, and how far to trust it: intervals, diagnostics, and the record itself.

Intervals are percentiles of a pair bootstrap: rows are drawn with replacement together with their
loss, which assumes neither a distribution of the residuals nor a constant variance, and shows the
skew that A and B have. It sees sampling error only; that another form of law would fit as well is
not in it. A resample is a multinomial vector of row weights, so that all resamples share one table.

A converged fit can still mean nothing, so the diagnostics ask what an optimiser cannot: is there a
row that informs each parameter at all, are there enough bit widths to tell a slope from an offset,
do other starts find the same optimum, does a parameter sit at a bound of its range. What a fit
should report follows "(Mis)fitting: A Survey of Scaling Laws", arXiv 2502.18969.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qat.laws.forms import Law, get_law
from qat.laws.table import UNITS, Table, unknown_name

# Arrays end in their axes: S bootstrap resamples, R rows, P parameters.
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Intervals = dict[str, tuple[float, float]]

LOSSES = ("huber", "lad", "l2")
LAD_DELTA = 1e-7
PERCENTILES = (2.5, 97.5)
# A slope and an offset in bits are two numbers: a third width is the first to test them.
LEAST_WIDTHS = 3
LEAST_CONVERGED = 0.9
LEAST_AGREEMENT = 0.05
# Wider than this, in the logarithm of a positive parameter or in a signed one itself, an interval
# does not even give the order of magnitude of what the parameter multiplies.
WIDEST_INTERVAL = np.log(10.0)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a fit was made; `qat.laws.fit` gives the meaning of each."""

    loss: str
    delta: float
    bootstrap: int
    starts: int
    seed: int

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise unknown_name("loss", self.loss, LOSSES)
        if not 0 < self.delta < np.inf:
            raise ValueError(f"delta must be positive and finite, not {self.delta}")
        for name, least in (("bootstrap", 0), ("starts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")

    @property
    def threshold(self) -> float:
        """The δ of Huber's function that stands for the loss: inf for l2, tiny for lad."""
        return {"huber": self.delta, "lad": LAD_DELTA, "l2": np.inf}[self.loss]


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """What to look at before believing a fit.

    Attributes:
        objective: the loss summed over rows, of residuals in log loss. For "lad" the sum of their
            absolute values, for "l2" half the sum of their squares.
        gradient_norm: Euclidean norm of the objective's gradient in the fitted coordinates
            (logarithms of positive parameters, centred amplitudes) that are not at a bound.
        condition_number: of JᵀWJ in those coordinates, scaled to unit diagonal, with W the weights
            of iteratively reweighted least squares.
        share_at_best: share of starts whose objective is within 1e-6 (relative) of the best.
        bootstrap_converged: share of resamples whose fit met the solver's tolerance; NaN if none.
        rows: rows fitted.
        sizes: distinct pairs of params and tokens among them.
        rows_left_out: rows whose status was not "ok".
        rows_outside_domain: rows at which the fitted law has no meaning.
        r2: share of the variance of the log loss that the fit explains.
        median_relative_error: median of |predicted / observed - 1|, over rows.
        no_data: parameters left out because no row informs them.
        few_values: parameters whose column takes too few distinct values to tell them: a group
            with fewer than 3 quantized bit widths, an exponent in a group's rows with only one.
        at_bound: parameters at a bound of their range.
        unidentified: parameters at a bound, with too few values, or with an interval wider than a
            factor of ten (than 2.3 for signed parameters).
    """

    objective: float
    gradient_norm: float
    condition_number: float
    share_at_best: float
    bootstrap_converged: float
    rows: int
    sizes: int
    rows_left_out: int
    rows_outside_domain: int
    r2: float
    median_relative_error: float
    no_data: tuple[str, ...]
    few_values: tuple[str, ...]
    at_bound: tuple[str, ...]
    unidentified: tuple[str, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        """The findings that need attention, one readable line each."""
        lists = {
            "no data": self.no_data,
            "too few distinct values": self.few_values,
            "at bound": self.at_bound,
            "unidentified": self.unidentified,
        }
        lines = [f"{label}: {', '.join(names)}" for label, names in lists.items() if names]
        if self.share_at_best < LEAST_AGREEMENT:
            lines.append(f"best optimum found by only {self.share_at_best:.1%} of the starts")
        if self.bootstrap_converged < LEAST_CONVERGED:
            lines.append(f"only {self.bootstrap_converged:.0%} of the resamples converged")
        if self.rows_outside_domain:
            lines.append(f"outside the domain of the fitted law: {self.rows_outside_domain} rows")
        return tuple(lines)


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """A fitted law. Two fits are equal when what they save is equal, NaN included.

    Attributes:
        law: the law.
        params: value by name, in the units of the law's parameters; NaN without data.
        intervals: (low, high) by name, the 95% percentile interval of the pair bootstrap; NaN
            without data or without bootstrap.
        samples: the bootstrap draws by name, shape (S,), for intervals of derived quantities.
        diagnostics: what to look at before believing the numbers.
        settings: how the fit was made.
    """

    law: Law
    params: dict[str, float]
    intervals: Intervals
    samples: dict[str, Floats]
    diagnostics: Diagnostics
    settings: Settings

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fit) and self._text() == other._text()

    def __hash__(self) -> int:
        return hash(self._text())

    def predict(self, table: Table | pd.DataFrame) -> Floats:
        """Predicted loss in nats per token of each row, shape (R,), as `Law.predict` does."""
        return self.law.predict(self.params, table)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the fit as JSON, NaN as null, for `load`."""
        pathlib.Path(path).write_text(self._text())

    def _text(self) -> str:
        content = {
            "law": self.law.name,
            "formula": self.law.formula,
            "params": self.params,
            "intervals": self.intervals,
            "settings": dataclasses.asdict(self.settings),
            "diagnostics": dataclasses.asdict(self.diagnostics),
            "units": {name: UNITS.get(name, "") for name in (*self.law.columns, "loss")}
            | {parameter.name: parameter.meaning for parameter in self.law.parameters},
            "samples": {name: draws_S.tolist() for name, draws_S in self.samples.items()},
        }
        content = _map_leaves(lambda leaf: None if leaf != leaf else leaf, content)  # NaN != NaN
        return json.dumps(content, indent=1, allow_nan=False)


def load(path: str | pathlib.Path, law: Law | None = None) -> Fit:
    """Reads a fit that `Fit.save` wrote, equal to the one that was saved.

    Args:
        path: the JSON file.
        law: the law, if it is not one that `get_law` knows.

    Raises:
        ValueError: if the file is of another law, or of one that is not known.
    """
    saved = json.loads(pathlib.Path(path).read_text())
    saved = _map_leaves(lambda leaf: np.nan if leaf is None else leaf, saved)
    law = law or get_law(saved["law"])
    if law.name != saved["law"]:
        raise ValueError(f"{path} holds a fit of law {saved['law']!r}, not of {law.name!r}")
    findings: dict[str, Any] = {
        name: tuple(x) if isinstance(x, list) else x for name, x in saved["diagnostics"].items()
    }
    return Fit(
        law=law,
        params=saved["params"],
        intervals={name: (low, high) for name, (low, high) in saved["intervals"].items()},
        samples={name: np.asarray(draws) for name, draws in saved["samples"].items()},
        diagnostics=Diagnostics(**findings),
        settings=Settings(**saved["settings"]),
    )


def free_parameters(law: Law, table: Table) -> Bools:
    """Which parameters the table informs at all, shape (P,).

    Raises:
        ValueError: if the rows are fewer than those parameters, or a column with an exponent that
            every row informs has a single value.
    """
    columns = table.columns(law.columns)
    grouped = {name for group in law.groups for name in group.parameters}
    idle = {n for g in law.groups if not g.informed_by(columns).any() for n in g.parameters}
    free_P = np.array([name not in idle for name in law.names])
    if len(table) < free_P.sum():
        raise ValueError(f"{len(table)} rows cannot fit {free_P.sum()} parameters of {law.name!r}")
    for column, exponent, _ in (term for p in law.parameters for term in p.powers):
        value, distinct = columns[column][0], len(np.unique(columns[column]))
        if exponent not in grouped and distinct == 1:
            raise ValueError(
                f"all {len(table)} rows have {column} = {value:g}: "
                f"the exponent {exponent} needs at least two values"
            )
    return free_P


def too_few_values(law: Law, table: Table) -> set[str]:
    """Parameters of active groups whose column takes too few distinct values to tell them."""
    columns = table.columns(law.columns)
    powers = {parameter.name: parameter.powers for parameter in law.parameters}
    found: set[str] = set()
    for group in law.groups:
        rows = group.informed_by(columns)
        distinct = {name: len(np.unique(column_R[rows])) for name, column_R in columns.items()}
        if 0 < distinct[group.column] < LEAST_WIDTHS:
            found |= set(group.parameters)
        terms = [term for name in group.parameters for term in powers[name]]
        found |= {exponent for column, exponent, _ in terms if distinct[column] == 1}
    return found


def resample_weights(rng: np.random.Generator, resamples: int, rows: int) -> Floats:
    """Row weights of a pair bootstrap: how often each row is drawn, shape (S, R)."""
    return rng.multinomial(rows, np.full(rows, 1 / rows), size=resamples).astype(np.float64)


def percentile_interval(draws_S: Floats | None) -> tuple[float, float]:
    """The 95% percentile interval of bootstrap draws; (nan, nan) of none."""
    if draws_S is None or not draws_S.size:
        return (np.nan, np.nan)
    low, high = np.percentile(draws_S, PERCENTILES)
    return (float(low), float(high))


def condition_number(curvature_PP: Floats) -> float:
    """Condition number after scaling to unit diagonal; the largest float if singular."""
    scale_P = np.sqrt(np.maximum(np.diagonal(curvature_PP), np.finfo(np.float64).tiny))
    scaled_PP = curvature_PP / np.outer(scale_P, scale_P)
    return float(min(np.linalg.cond(scaled_PP), np.finfo(np.float64).max))


def diagnose(
    law: Law, table: Table, params: dict[str, float], intervals: Intervals, solver: dict[str, Any]
) -> Diagnostics:
    """Adds to what the solver says of its optimum what the table and the intervals say of it."""
    observed_R, predicted_R = table.columns(["loss"])["loss"], law.predict(params, table)
    inside_R = ~np.isnan(predicted_R)
    log_loss_R = np.log(observed_R[inside_R])
    residual_R = np.log(predicted_R[inside_R]) - log_loss_R
    few_values = too_few_values(law, table)
    suspect = few_values | set(solver["at_bound"])
    for parameter in law.parameters:
        low, high = map(parameter.coordinate, intervals[parameter.name])
        if high - low > WIDEST_INTERVAL:
            suspect.add(parameter.name)
    return Diagnostics(
        **solver,
        rows=len(table),
        sizes=len(table.frame[["params", "tokens"]].drop_duplicates()),
        rows_left_out=table.left_out,
        rows_outside_domain=int((~inside_R).sum()),
        r2=1 - float(np.mean(residual_R**2) / (np.var(log_loss_R) or np.nan)),
        median_relative_error=float(np.median(np.abs(np.expm1(residual_R)))),
        no_data=tuple(name for name in law.names if np.isnan(params[name])),
        few_values=tuple(name for name in law.names if name in few_values),
        unidentified=tuple(name for name in law.names if name in suspect),
    )


def _map_leaves(change: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _map_leaves(change, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_map_leaves(change, value) for value in tree]
    return change(tree)
