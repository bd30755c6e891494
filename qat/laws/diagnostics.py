"""What to look at before believing a fit.

A converged fit can still mean nothing, so the diagnostics ask what an optimiser cannot: is there a
row that informs each parameter at all, are there enough bit widths to tell a slope from an offset,
are size and data varied apart, do other starts find the same optimum, does a parameter sit at a
bound of its range.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qat.laws.law import Law
from qat.laws.table import BITS_COLUMNS, Table
from qat.laws.uncertainty import Intervals, runs_of
from qat.spelling import expected_one_of

# Arrays end in their axes: R rows, P parameters.
Floats = NDArray[np.float64]

LEAST_CONVERGED = 0.9
LEAST_AGREEMENT = 0.05
# Wider than this, in the logarithm of a positive parameter or in a signed one itself, an interval
# does not even give the order of magnitude of what the parameter multiplies.
WIDEST_INTERVAL = np.log(10.0)
_SIZE_COLUMNS = ("params", "tokens")


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """What an optimum, a table and the intervals say of a fit.

    Attributes:
        objective: the weighted loss summed over rows, of residuals in log loss. For "lad" of their
            absolute values, for "l2" of half their squares.
        gradient_norm: Euclidean norm of the objective's gradient in the fitted coordinates
            (logarithms of positive parameters, centred amplitudes) that are not at a bound.
        condition_number: of JᵀWJ in those coordinates, scaled to unit diagonal, with W the weights
            of iteratively reweighted least squares.
        share_at_best: share of starts whose objective is within 1e-6 (relative) of the best.
        bootstrap_converged: share of resamples whose fit met the solver's tolerance; NaN if none.
        parameters: how many were fitted.
        rows: rows fitted.
        runs: distinct ``run_id`` among them; as many as rows without that column.
        sizes: distinct pairs of params and tokens among them.
        rows_left_out: rows whose status was not "ok".
        rows_outside_domain: rows at which the fitted law has no meaning.
        duplicates: rows that repeat another one in all columns the law reads, the loss included.
        r2: share of the variance of the log loss that the fit explains.
        median_relative_error: median of |predicted / observed - 1|, over rows.
        ignored: columns of bits below 16 in some rows that the law does not read.
        no_data: parameters left out because no row informs them.
        few_values: parameters whose column takes too few distinct values to tell them: a group
            with fewer quantized bit widths than it needs, an exponent in a group's rows with only
            one, exponents of params and tokens that have one ratio in all rows.
        at_bound: parameters at a bound of their range.
        flat: parameters that trade off against others, so that the objective hardly tells: by its
            curvature at the optimum their intervals are wider than a factor of ten.
        unidentified: parameters that are flat, at a bound, with too few values, or with an interval
            wider than a factor of ten (than 2.3 for signed parameters).
    """

    objective: float
    gradient_norm: float
    condition_number: float
    share_at_best: float
    bootstrap_converged: float
    parameters: int
    rows: int
    runs: int
    sizes: int
    rows_left_out: int
    rows_outside_domain: int
    duplicates: int
    r2: float
    median_relative_error: float
    ignored: tuple[str, ...]
    no_data: tuple[str, ...]
    few_values: tuple[str, ...]
    at_bound: tuple[str, ...]
    flat: tuple[str, ...]
    unidentified: tuple[str, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        """The findings that need attention, one readable line each."""
        lists = {
            "the law does not read what differs between rows": self.ignored,
            "no data": self.no_data,
            "too few distinct values": self.few_values,
            "at bound": self.at_bound,
            "flat": self.flat,
            "unidentified": self.unidentified,
        }
        lines = [f"{label}: {', '.join(names)}" for label, names in lists.items() if names]
        if self.share_at_best < LEAST_AGREEMENT:
            lines.append(f"best optimum found by only {self.share_at_best:.1%} of the starts")
        if 0 < self.runs <= 2 * self.parameters:
            lines.append(f"only {self.runs} runs for {self.parameters} parameters")
        if self.bootstrap_converged < LEAST_CONVERGED:
            lines.append(f"only {self.bootstrap_converged:.0%} of the resamples converged")
        if self.rows_outside_domain:
            lines.append(f"outside the domain of the fitted law: {self.rows_outside_domain} rows")
        if self.duplicates:
            lines.append(f"rows that repeat another in every column read: {self.duplicates}")
        return tuple(lines)


def held_parameters(law: Law, table: Table, fixed: Mapping[str, float]) -> Floats:
    """Values of the parameters that are not fitted, NaN of those that are, shape (P,).

    Args:
        law: gives the neutral value of what no row informs.
        table: what there is to inform them.
        fixed: values by name that are known already.

    Raises:
        ValueError: for an unknown or impossible fixed parameter, fewer rows than parameters to fit,
            or a single value in a column with an exponent that every row informs.
    """
    columns = table.columns(law.columns)
    _check_fixed(law, fixed)
    idle = {n for g in law.groups if not g.informed_by(columns).any() for n in g.parameters}
    held = {name: law.neutral[name] for name in idle} | dict(fixed)
    held_P = np.array([held.get(name, np.nan) for name in law.names])
    fitted = int(np.isnan(held_P).sum())
    if not fitted:
        raise ValueError(f"all parameters of {law.name!r} are fixed or without data: none is left")
    if len(table) < fitted:
        raise ValueError(f"{len(table)} rows cannot fit {fitted} parameters of {law.name!r}")
    grouped = {name for group in law.groups for name in group.parameters}
    for column, exponent in (term for p in law.parameters for term in p.exponents):
        value, distinct = columns[column][0], len(np.unique(columns[column]))
        if exponent not in grouped | held.keys() and distinct == 1:
            raise ValueError(
                f"all {len(table)} rows have {column} = {value:g}: "
                f"the exponent {exponent} needs at least two values"
            )
    return held_P


def diagnose(
    law: Law, table: Table, params: dict[str, float], intervals: Intervals, solver: dict[str, Any]
) -> Diagnostics:
    """Adds to what the solver says of its optimum what the table and the intervals say of it."""
    observed_R, predicted_R = table.columns(["loss"])["loss"], law.predict(params, table)
    inside_R = ~np.isnan(predicted_R)
    log_loss_R = np.log(observed_R[inside_R])
    residual_R = np.log(predicted_R[inside_R]) - log_loss_R
    few_values = too_few_values(law, table) - set(solver["fixed"])
    suspect = few_values | {*solver["at_bound"], *solver["flat"]}
    for parameter in law.parameters:
        low, high = map(parameter.coordinate, intervals[parameter.name])
        if high - low > WIDEST_INTERVAL:
            suspect.add(parameter.name)
    run_id = [name for name in ("run_id",) if name in table.frame]
    found = {name: value for name, value in solver.items() if name != "fixed"}
    return Diagnostics(
        **found,
        rows=len(table),
        runs=int(runs_of(table).max()) + 1,
        sizes=len(table.frame[list(_SIZE_COLUMNS)].drop_duplicates()),
        rows_left_out=table.left_out,
        rows_outside_domain=int((~inside_R).sum()),
        ignored=_ignored(law, table),
        duplicates=int(table.frame[[*law.columns, "loss", *run_id]].duplicated().sum()),
        r2=_explained(residual_R, log_loss_R),
        median_relative_error=float(np.median(np.abs(np.expm1(residual_R)))),
        no_data=tuple(name for name in law.names if np.isnan(params[name])),
        few_values=tuple(name for name in law.names if name in few_values),
        unidentified=tuple(name for name in law.names if name in suspect),
    )


def too_few_values(law: Law, table: Table) -> set[str]:
    """Parameters of active groups whose column takes too few distinct values to tell them."""
    columns = table.columns(law.columns)
    exponents = {parameter.name: parameter.exponents for parameter in law.parameters}
    found: set[str] = set()
    for group in law.groups:
        rows = group.informed_by(columns)
        distinct = {name: len(np.unique(column_R[rows])) for name, column_R in columns.items()}
        if 0 < min(distinct[name] for name in group.columns) < group.widths:
            found |= set(group.parameters)
        terms = [term for name in group.parameters for term in exponents[name]]
        found |= {exponent for column, exponent in terms if distinct[column] == 1}
    if set(_SIZE_COLUMNS) <= set(law.columns) and _one_ratio(columns):
        size = [p for p in law.parameters if {column for column, _ in p.exponents}]
        ungrouped = {n for p in size for n in (p.name, *(e for _, e in p.exponents))}
        found |= ungrouped - {name for group in law.groups for name in group.parameters}
    return found


def condition_number(curvature_PP: Floats) -> float:
    """Condition number after scaling to unit diagonal; the largest float if singular."""
    scale_P = np.sqrt(np.maximum(np.diagonal(curvature_PP), np.finfo(np.float64).tiny))
    scaled_PP = curvature_PP / np.outer(scale_P, scale_P)
    return float(min(np.linalg.cond(scaled_PP), np.finfo(np.float64).max))


def standard_deviations(curvature_PP: Floats) -> Floats:
    """Root of the diagonal of the inverse, shape (P,); infinite where the curvature is nothing."""
    scale_P = np.sqrt(np.maximum(np.diagonal(curvature_PP), 0.0))
    known_P = scale_P > 0
    inverse_P = np.divide(1.0, scale_P, out=np.zeros_like(scale_P), where=known_P)
    value_E, vector_PE = np.linalg.eigh(curvature_PP * np.outer(inverse_P, inverse_P))
    floor = np.finfo(np.float64).eps * len(scale_P)
    variance_P = vector_PE**2 @ (1 / np.maximum(value_E, floor))
    return np.where(known_P, np.sqrt(variance_P) * inverse_P, np.inf)


def _explained(residual_R: Floats, log_loss_R: Floats) -> float:
    """Share of the variance that a fit explains; NaN if all losses are the same."""
    spread = float(np.var(log_loss_R)) if len(log_loss_R) else 0.0
    return 1 - float(np.mean(residual_R**2)) / spread if spread > 1e-20 else np.nan


def _ignored(law: Law, table: Table) -> tuple[str, ...]:
    """Columns of bits that differ between rows and that the law does not read."""
    others = [name for name in BITS_COLUMNS if name not in law.columns]
    return tuple(name for name in others if table.frame[name].nunique() > 1)


def _one_ratio(columns: Mapping[str, Floats]) -> bool:
    """Whether tokens are the same multiple of params in all rows, to a thousandth."""
    ratio_R = columns["tokens"] / columns["params"]
    return bool(ratio_R.max() < ratio_R.min() * 1.001)


def _check_fixed(law: Law, fixed: Mapping[str, float]) -> None:
    """Raises ValueError for a parameter the law does not have, or a value it cannot take."""
    declared: Collection[str] = law.names
    by_name = {parameter.name: parameter for parameter in law.parameters}
    for name, value in fixed.items():
        if name not in by_name:
            raise ValueError(expected_one_of("fixed parameter", name, declared))
        if not np.isfinite(value) or (value <= 0 and not by_name[name].signed):
            expected = "a finite number" if by_name[name].signed else "a positive number"
            raise ValueError(f"fixed {name} must be {expected}, not {value}")
