"""Which law do the trained runs follow, and how far does it see?

Laws are compared by criteria of the fit and by rows they were not fitted to: the largest size, and
the most tokens per parameter. `offset` is what they have to beat: Chinchilla with so many nats for
each width. `free` has an efficiency for each width and shows what a curve over bits costs.
"""

import numpy as np
import pandas as pd

from launch.studies.answer import Answer, between
from launch.studies.rows import Study, integers, lines_of
from qat import laws
from qat.laws import Comparison, Fit, Table
from qat.laws.forms.free import FREE_COLUMNS
from qat.report import law_figures

HOLDOUTS = ("largest-params", "longest-ratio")
CURVES = (
    "precision_plain",
    "precision",
    "precision_weibull_plain",
    "precision_logistic_plain",
    "precision_power_plain",
    "both_weibull_plain",
    "additive_weibull",
    "scaled_weibull",
    "multiplicative_weibull",
)


def table_of(study: Study) -> Table:
    """Integer runs of the grid, all operands, alone and together.

    Runs of one size, budget and seed share initialisation and data order, and so their errors: they
    count as one where runs are resampled.
    """
    rows = integers(study.grid(study.trained))
    cell = rows.groupby(["params", "tokens", "seed"]).ngroup()
    return laws.as_table(rows.assign(run_id=cell.map(str)))


def answer(study: Study) -> Answer:
    """The comparison, the parameters of the law it prefers, and how these fit."""
    table = table_of(study)
    comparison = compared(study, table)
    chosen = chosen_fit(comparison)
    return Answer(
        tables={
            "Laws and what they miss; R² and median error of held-out rows": criteria(
                comparison, table
            ),
            f"Parameters of `{chosen.law.name}`, fitted to {len(table)} runs": parameters(chosen),
            "Bits over which efficiency saturates, as each law has it": _gammas(comparison),
        },
        figures={
            "law_against_measured": law_figures.against_measured(chosen, table),
            "residuals_by_tokens": law_figures.residuals(
                chosen, table, "tokens", "training tokens D"
            ),
        },
        fits={_short(name): fitted for name, fitted in comparison.fits.items()},
    )


def compared(study: Study, table: Table) -> Comparison:
    """All curves, and the two laws without one."""
    levels = {column: tuple(table.frame[column].unique()) for column in FREE_COLUMNS.values()}
    known: list[str | laws.Law] = [*CURVES, laws.free(levels), laws.offset(levels)]
    return laws.compare(
        known, table, holdout=HOLDOUTS, bootstrap=study.resamples, starts=study.starts
    )


def chosen_fit(comparison: Comparison) -> Fit:
    """The law of fewest parameters that criteria admit, else the best of the curves by BIC."""
    order = comparison.table[comparison.table.law.isin(CURVES)].sort_values("bic")
    return comparison.fits[comparison.preferred or order.law.iloc[0]]


def criteria(comparison: Comparison, table: Table) -> pd.DataFrame:
    """A row for each law, the best by BIC first."""
    loss_R = table.frame["loss"].to_numpy()
    rows = []
    for index, row in enumerate(lines_of(comparison.table)):
        fitted = comparison.fits[row["law"]]
        residual_R = np.log(fitted.predict(table) / loss_R)
        line = {
            "law": _short(row["law"]),
            "parameters": row["parameters"],
            "ΔBIC": float(np.round(row["bic"])),
            "R²": row["r2"],
            "median error": _percent(residual_R),
        }
        for holdout, error_LR in comparison.held_out.items():
            held_R = ~np.isnan(error_LR[index])
            error_R, measured_R = error_LR[index][held_R], loss_R[held_R]
            predicted_R = measured_R * np.exp(error_R)
            spread = ((measured_R - measured_R.mean()) ** 2).sum()
            line[f"{holdout}: R²"] = 1 - ((predicted_R - measured_R) ** 2).sum() / spread
            line[f"{holdout}: error"] = _percent(error_R)
        rows.append(line)
    return pd.DataFrame(rows).sort_values("ΔBIC")


def parameters(fitted: Fit) -> pd.DataFrame:
    """Values with 95% intervals."""
    doubtful = fitted.diagnostics.unidentified
    return pd.DataFrame(
        {
            "parameter": name,
            "value": between(value, *fitted.interval(name)),
            "identified": name not in doubtful,
            "meaning": parameter.meaning,
        }
        for parameter in fitted.law.parameters
        if np.isfinite(value := fitted.params[name := parameter.name])
    )


def _gammas(comparison: Comparison) -> pd.DataFrame:
    """γ of each operand under each law that has one."""
    rows = []
    for name, fitted in comparison.fits.items():
        known = [x for x in fitted.law.names if x.startswith(("gamma_", "k_"))]
        found = {x: between(fitted.params[x], *fitted.interval(x)) for x in known}
        if known:
            rows.append({"law": name} | found)
    columns = ["law", "gamma_w", "gamma_a", "gamma_kv", "k_w", "k_a", "k_kv"]
    return pd.DataFrame(rows).reindex(columns=columns).fillna("–")


def _short(law: str) -> str:
    return law.partition("_")[0] if law.startswith(("free_", "offset_")) else law


def _percent(residual_R: np.ndarray) -> str:
    return f"{np.median(np.abs(np.expm1(residual_R))):.2%}"
