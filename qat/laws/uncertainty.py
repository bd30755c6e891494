"""What a fit reports, and how far to trust it: intervals, diagnostics, and the record itself.

Intervals are percentiles of a pair bootstrap: rows are drawn with replacement together with their
loss, which assumes neither a distribution of the residuals nor a constant variance, and shows the
skew that A and B have. It sees sampling error only; that another form of law would fit as well is
not in it. A resample is a multinomial vector of row weights, so that all resamples share one table.

A converged fit can still mean nothing, so the diagnostics ask of the data what an optimiser
cannot: is there a row that informs each parameter at all, are there enough bit widths to tell a
slope from an offset, do other starts find the same optimum, does a parameter sit at a bound of its
range. "(Mis)fitting: A Survey of Scaling Laws" (arXiv 2502.18969) lists what a fit should
report; a `Fit` carries it into its JSON.
"""

import dataclasses
import difflib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qat.laws.forms import Group, Law, Parameter, get_law
from qat.laws.table import UNITS, UNQUANTIZED_BITS, Table

# Arrays end in their axes: S bootstrap resamples, R rows, P parameters.
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

LOSSES = ("huber", "lad", "l2")
LAD_DELTA = 1e-8
PERCENTILES = (2.5, 97.5)
# A slope and an offset in bits are two numbers: a third width is the first to test them.
LEAST_WIDTHS = 3
# Wider than this, in the logarithm of a positive parameter or in a signed one itself, an interval
# does not even give the order of magnitude of what the parameter multiplies.
WIDEST_INTERVAL = np.log(10.0)
LARGEST = float(np.finfo(np.float64).max)


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
            near = difflib.get_close_matches(self.loss, LOSSES, n=1, cutoff=0.0)[0]
            known = ", ".join(LOSSES)
            raise ValueError(f"unknown loss {self.loss!r}: did you mean {near!r}? known: {known}")
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
            (logarithms of positive parameters, centred amplitudes), without the components that
            push against a bound.
        condition_number: of JᵀWJ at the optimum in those coordinates, scaled to unit diagonal,
            with W the weights of iteratively reweighted least squares.
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
        if self.rows_outside_domain:
            lines.append(f"outside the domain of the fitted law: {self.rows_outside_domain} rows")
        return tuple(lines)


class Optimum(NamedTuple):
    """What the solver found; P axes are in the fitted coordinates."""

    objective: float
    gradient_P: Floats
    curvature_PP: Floats
    free_P: Bools
    at_bound_P: Bools
    share_at_best: float
    samples: dict[str, Floats]
    bootstrap_converged: float


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
    intervals: dict[str, tuple[float, float]]
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
        return json.dumps(_null_for_nan(content), indent=1, allow_nan=False)


def load(path: str | pathlib.Path, law: Law | None = None) -> Fit:
    """Reads a fit that `Fit.save` wrote, equal to the one that was saved.

    Args:
        path: the JSON file.
        law: the law, if it is not one that `get_law` knows.

    Raises:
        ValueError: if the file is of another law, or of one that is not known.
    """
    content = _nan_for_null(json.loads(pathlib.Path(path).read_text()))
    law = law or get_law(content["law"])
    if law.name != content["law"]:
        raise ValueError(f"{path} holds a fit of law {content['law']!r}, not of {law.name!r}")
    diagnostics = {
        k: tuple(v) if isinstance(v, list) else v for k, v in content["diagnostics"].items()
    }
    return Fit(
        law=law,
        params=content["params"],
        intervals={name: (low, high) for name, (low, high) in content["intervals"].items()},
        samples={name: np.asarray(draws) for name, draws in content["samples"].items()},
        diagnostics=Diagnostics(**diagnostics),
        settings=Settings(**content["settings"]),
    )


def free_parameters(law: Law, table: Table) -> Bools:
    """Which parameters the table informs at all, shape (P,).

    Raises:
        ValueError: if the rows are fewer than those parameters, or a column with an exponent that
            every row informs has a single value.
    """
    idle = {name for g in law.groups if not _activated(g, table).any() for name in g.parameters}
    grouped = {name for g in law.groups for name in g.parameters}
    free_P = np.array([name not in idle for name in law.names])
    if len(table) < free_P.sum():
        raise ValueError(f"{len(table)} rows cannot fit {free_P.sum()} parameters of {law.name!r}")
    for parameter in law.parameters:
        for column, exponent, _ in parameter.powers:
            values_R = table.frame[column]
            if exponent not in grouped and values_R.nunique() == 1:
                raise ValueError(
                    f"all {len(table)} rows have {column} = {values_R.iloc[0]:g}: "
                    f"the exponent {exponent} needs at least two values"
                )
    return free_P


def too_few_values(law: Law, table: Table) -> tuple[str, ...]:
    """Parameters of active groups whose column takes too few distinct values to tell them."""
    powers = {p.name: p.powers for p in law.parameters}
    found: list[str] = []
    for group in law.groups:
        frame = table.frame[_activated(group, table)]
        if 0 < frame[group.column].nunique() < LEAST_WIDTHS:
            found += group.parameters
        exponents = [term for name in group.parameters for term in powers[name]]
        found += [name for column, name, _ in exponents if frame[column].nunique() == 1]
    return tuple(name for name in law.names if name in found)


def resample_weights(rng: np.random.Generator, resamples: int, rows: int) -> Floats:
    """Row weights of a pair bootstrap: how often each row is drawn, shape (S, R)."""
    return rng.multinomial(rows, np.full(rows, 1 / rows), size=resamples).astype(np.float64)


def percentile_interval(draws_S: Floats) -> tuple[float, float]:
    """The 95% percentile interval of bootstrap draws; (nan, nan) of none."""
    if not draws_S.size:
        return (np.nan, np.nan)
    low, high = np.percentile(draws_S, PERCENTILES)
    return (float(low), float(high))


def report(
    law: Law, table: Table, settings: Settings, params: dict[str, float], optimum: Optimum
) -> Fit:
    """Draws up the fit that an optimum and its bootstrap amount to."""
    intervals = {n: percentile_interval(optimum.samples.get(n, np.empty(0))) for n in law.names}
    few_values, at_bound = too_few_values(law, table), _named(law, optimum.at_bound_P)
    unidentified_P = [
        p.name in {*few_values, *at_bound} or _is_wide(p, *intervals[p.name])
        for p in law.parameters
    ]
    predicted_R, log_loss_R = law.predict(params, table), np.log(table.columns(["loss"])["loss"])
    inside_R = ~np.isnan(predicted_R)
    residual_R = (np.log(predicted_R) - log_loss_R)[inside_R]
    free_P, unit = optimum.free_P, LAD_DELTA if settings.loss == "lad" else 1.0
    diagnostics = Diagnostics(
        objective=optimum.objective / unit,
        gradient_norm=float(np.linalg.norm(optimum.gradient_P[free_P & ~optimum.at_bound_P]))
        / unit,
        condition_number=condition_number(optimum.curvature_PP[np.ix_(free_P, free_P)]),
        share_at_best=optimum.share_at_best,
        bootstrap_converged=optimum.bootstrap_converged,
        rows=len(table),
        sizes=len(table.frame[["params", "tokens"]].drop_duplicates()),
        rows_left_out=table.left_out,
        rows_outside_domain=int((~inside_R).sum()),
        r2=1 - float(np.mean(residual_R**2) / np.var(log_loss_R[inside_R])),
        median_relative_error=float(np.median(np.abs(np.expm1(residual_R)))),
        no_data=_named(law, ~free_P),
        few_values=few_values,
        at_bound=at_bound,
        unidentified=_named(law, unidentified_P),
    )
    return Fit(law, params, intervals, optimum.samples, diagnostics, settings)


def _named(law: Law, mask_P: Sequence[bool] | Bools) -> tuple[str, ...]:
    return tuple(name for name, chosen in zip(law.names, mask_P, strict=True) if chosen)


def _is_wide(parameter: Parameter, low: float, high: float) -> bool:
    return parameter.coordinate(high) - parameter.coordinate(low) > WIDEST_INTERVAL


def condition_number(curvature_PP: Floats) -> float:
    """Condition number after scaling to unit diagonal; the largest float if singular."""
    scale_P = np.sqrt(np.diagonal(curvature_PP))
    if not scale_P.all():
        return LARGEST
    return float(min(np.linalg.cond(curvature_PP / np.outer(scale_P, scale_P)), LARGEST))


def _activated(group: Group, table: Table) -> Bools:
    return table.frame[group.column].to_numpy() < UNQUANTIZED_BITS


def _replace_leaves(tree: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {key: _replace_leaves(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_replace_leaves(value, change) for value in tree]
    return change(tree)


def _null_for_nan(tree: Any) -> Any:
    return _replace_leaves(tree, lambda x: None if isinstance(x, float) and np.isnan(x) else x)


def _nan_for_null(tree: Any) -> Any:
    return _replace_leaves(tree, lambda x: np.nan if x is None else x)
