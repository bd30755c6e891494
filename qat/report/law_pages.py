"""Pages of laws: a fit, a comparison, a plan. Verdict and warnings first, provenance last."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from qat.analysis.independence import Independence
from qat.laws import Fit, Table
from qat.laws.compare import Comparison
from qat.report import law_figures
from qat.report.page import document, fit_table, grid_of, listing, wide_table
from qat.training.files import write_whole

_MISSING = "missing"


def write_fit(path: Path, fit: Fit, table: Table, tables: Mapping[str, pd.DataFrame]) -> None:
    """Writes the page of a fit.

    Args:
        path: of the file, which appears whole or not at all.
        fit: what is shown.
        table: the rows it was fitted to.
        tables: more of them by heading, such as the sensitivity.
    """
    sections = [
        f"<p><code>{html.escape(fit.law.formula)}</code></p>",
        "<h2>Look at this first</h2>",
        listing(_flags(fit)),
        listing((quality(fit),)),
        "<h2>Parameters</h2>",
        "<p>Intervals: 95%, bootstrap, t-corrected.</p>",
        wide_table(fit_table(fit)),
        "<h2>Figures</h2>",
        grid_of(_of_fit(fit, table)),
    ]
    for heading, each in tables.items():
        sections += [f"<h2>{html.escape(heading)}</h2>", wide_table(each)]
    sections += ["<h2>What was done</h2>", wide_table(checklist(fit))]
    write_whole(path, document(f"The law {fit.law.name}", sections))


def write_comparison(
    path: Path, comparison: Comparison, table: Table, tested: Independence | None
) -> None:
    """Writes the page of a comparison, and of a test of independence if there was one."""
    fits = comparison.fits
    drawn = [
        (law_figures.against_measured(fit, table), f"{name} against every row.")
        for name, fit in fits.items()
    ]
    sections = [
        "<h2>Verdict</h2>",
        listing((comparison.verdict, *comparison.not_held_out.values())),
        listing([f"{name}: {flag}" for name in fits for flag in _flags(fits[name])]),
        "<h2>Criteria</h2>",
        "<p>AICc and BIC above the best; hold-outs: root mean square log residual of the rows the "
        "fit did not see.</p>",
        wide_table(comparison.table.round(5)),
        "<h2>Parameters that laws share, with 95% intervals</h2>",
        wide_table(comparison.intervals().round(5)),
        "<h2>Figures</h2>",
        grid_of(drawn),
    ]
    if tested is not None:
        sections += [
            "<h2>Are weights, activations and cache independent?</h2>",
            listing((independence_verdict(tested),)),
            grid_of(
                [(law_figures.factors(tested.settings), "Factor on the product of marginals, 95%.")]
            ),
            wide_table(tested.settings.round(4)),
        ]
    write_whole(path, document("Which law the rows prefer", sections))


def write_plan(
    path: Path,
    fit: Fit,
    path_of_budgets: pd.DataFrame,
    columns: Mapping[str, float],
    lines: Sequence[str],
) -> None:
    """Writes the page of plans for several budgets.

    Args:
        path: of the file.
        fit: what was planned with.
        path_of_budgets: flops and each optimum with its interval.
        columns: what else the law reads, at the last budget's optimum.
        lines: the plans for people.
    """
    drawn = [
        (
            law_figures.contours(fit, path_of_budgets, columns),
            "Loss in nats per token; bits as at the last budget.",
        )
    ]
    band = ", with its 95% band" if fit.samples else "; constants as published have no band"
    labels = {"params": "N*", "tokens": "D*", "bits": "P* (bits)"}
    drawn += [
        (law_figures.by_budget(path_of_budgets, name, label, name != "bits"), f"{label}{band}.")
        for name, label in labels.items()
        if name in path_of_budgets
    ]
    sections = [
        "<h2>Plans</h2>",
        f"<pre>{html.escape(chr(10).join(lines))}</pre>",
        "<h2>Figures</h2>",
        grid_of(drawn),
        "<h2>Numbers</h2>",
        wide_table(path_of_budgets.map(lambda x: f"{x:.4g}")),
        "<h2>The fit behind it</h2>",
        listing((quality(fit), *fit.diagnostics.flags)),
        wide_table(checklist(fit)),
    ]
    write_whole(path, document(f"Plans by the law {fit.law.name}", sections))


def quality(fit: Fit) -> str:
    """How well a fit describes its rows, in one line."""
    found = fit.diagnostics
    if not found.rows:
        return f"constants as published, without rows or intervals: {fit.checklist.get('source')}"
    return (
        f"{found.rows} rows of {found.runs} runs: R² {found.r2:.4f}, median relative error "
        f"{found.median_relative_error:.3%}; {found.share_at_best:.0%} of {fit.settings.starts} "
        f"starts reach the best, gradient norm {found.gradient_norm:.1e}, "
        f"condition {found.condition_number:.1e}"
    )


def independence_verdict(tested: Independence) -> str:
    """What the test of independence says, in one line."""
    broken = int(tested.settings.breaks.sum())
    return (
        f"were operands independent, a table would depart from the product as far as this one with "
        f"probability {tested.p_value:.3g}; by itself {broken} of {len(tested.settings)} joint "
        "settings departs"
    )


def _flags(fit: Fit) -> tuple[str, ...]:
    return fit.diagnostics.flags or ("no warning",)


def checklist(fit: Fit) -> pd.DataFrame:
    """The reporting checklist, what nobody said as missing."""
    said = {topic: text or _MISSING for topic, text in fit.checklist.items()}
    return pd.DataFrame({"topic": list(said), "what is known": list(said.values())})


def _of_fit(fit: Fit, table: Table) -> list[tuple[str, str]]:
    drawn = [(law_figures.against_measured(fit, table), "The law against every row.")]
    labels = {"params": "parameters N", "tokens": "training tokens D"}
    drawn += [
        (law_figures.residuals(fit, table, name, label), f"Residuals along {label}.")
        for name, label in labels.items()
        if name in fit.law.columns
    ]
    if rounding := law_figures.rounding_by_ratio(fit, table):
        drawn.append((rounding, "Points: measured; lines: by the law, one for each size."))
    return drawn
