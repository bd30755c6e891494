"""One self-contained HTML page: verdict first, then figures, tables, the fit, and provenance."""

import html
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from qat.laws import Fit
from qat.report import figures
from qat.report.findings import Summary

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 1rem;
       color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.figures { display: grid; gap: 1rem;
           grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); }
figure { margin: 0; } figure svg { width: 100%; height: auto; }
figcaption { font-size: .9rem; color: #444; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { white-space: nowrap; padding: .2rem .7rem; text-align: right;
         border-bottom: 1px solid #ddd; }
code { overflow-wrap: anywhere; }
"""

_CAPTION = "Bars: standard error, paired by sequence. Additions below 0.0001 are not drawn."


def write(path: Path, summary: Summary, rows: pd.DataFrame, fit: Fit, provenance: str) -> None:
    """Writes the page; it loads nothing from anywhere."""
    sections = [
        "<h2>Verdict</h2>",
        listing(summary.verdict),
        "<h2>Figures</h2>",
        _figures(summary, rows, fit),
        "<h2>Training at a policy</h2>",
        "<p>Difference: to the unquantized run of the same initialisation and data order.</p>",
        wide_table(_training_table(summary)),
        "<h2>Rounding after training</h2>",
        wide_table(_rounding_table(summary)),
        f"<h2>The fitted law: {html.escape(fit.law.name)}</h2>",
        "<p>Intervals: 95%, bootstrap over runs, t-corrected. Runs that share a seed are not "
        "independent, so true intervals are wider.</p>",
        wide_table(fit_table(fit)),
        "<h2>Provenance</h2>",
        listing((provenance, *_origins(rows))),
    ]
    path.write_text(document("What fewer bits cost", sections))


def document(title: str, sections: Sequence[str]) -> str:
    """A whole page of parts in HTML, in the report's style."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>"
        + "\n".join(sections)
        + "</body></html>\n"
    )


def grid_of(drawn: Sequence[tuple[str, str]]) -> str:
    """Figures side by side, each an SVG with its caption."""
    cells = [
        f"<figure>{svg}<figcaption>{html.escape(text)}</figcaption></figure>" for svg, text in drawn
    ]
    return f'<div class="figures">{"".join(cells)}</div>'


def _figures(summary: Summary, rows: pd.DataFrame, fit: Fit) -> str:
    drawn = [
        (
            figures.rounding_by_tokens(summary, params),
            f"Rounding after training, N = {params:,}. {_CAPTION}",
        )
        for params in sorted(summary.rounding.params.unique())
    ]
    drawn += [
        (figures.training_effects(summary), "Training at a policy, against the unquantized run."),
        (figures.loss_by_tokens(summary), "Unquantized runs. Bars: standard error over sequences."),
        (
            figures.predicted_against_measured(rows, fit),
            "The law against every row it was fitted to.",
        ),
    ]
    return grid_of(drawn)


def _training_table(summary: Summary) -> pd.DataFrame:
    table = summary.training
    return pd.DataFrame(
        {
            "N": table.params.map("{:,}".format),
            "D (tokens)": table.tokens.map("{:,}".format),
            "seed": table.seed,
            "policy": table.policy,
            "loss (nats/token)": table.loss.map("{:.4f}".format),
            "standard error": table.loss_se.map("{:.4f}".format),
            "difference": table.delta.map("{:+.4f}".format),
            "": table.within_noise.where(table.policy != "none", other=False).map(
                {True: "within noise", False: ""}
            ),
        }
    )


def _rounding_table(summary: Summary) -> pd.DataFrame:
    table = summary.rounding.assign(
        cell=summary.rounding.delta.map("{:.4f}".format)
        + " ± "
        + summary.rounding.delta_se.map("{:.4f}".format)
    )
    wide = table.pivot_table(
        index=["params", "tokens", "seed"], columns="bits", values="cell", aggfunc="first"
    )
    wide.columns = [f"{bits:g} bits" for bits in wide.columns]
    wide = wide.reset_index()
    wide["params"] = wide.params.map("{:,}".format)
    wide["tokens"] = wide.tokens.map("{:,}".format)
    return wide.rename(columns={"params": "N", "tokens": "D (tokens)"})


def fit_table(fit: Fit) -> pd.DataFrame:
    """Parameters with their intervals, and which of them the rows do not identify."""
    doubtful = {*fit.diagnostics.unidentified, *fit.diagnostics.few_values}
    return pd.DataFrame(
        {
            "parameter": list(fit.params),
            "value": [f"{value:.4g}" for value in fit.params.values()],
            "low": [f"{fit.intervals[name][0]:.4g}" for name in fit.params],
            "high": [f"{fit.intervals[name][1]:.4g}" for name in fit.params],
            "": ["not identified" if name in doubtful else "" for name in fit.params],
        }
    )


def _origins(rows: pd.DataFrame) -> list[str]:
    """Data and versions behind the rows."""
    return [
        f"Evaluated on {', '.join(sorted(rows.eval_set.unique()))}; "
        f"corpus fingerprint {', '.join(sorted(rows.data_fingerprint.unique()))}.",
        f"Versions: {'; '.join(sorted(rows.versions.unique()))}.",
        f"{rows.flops[rows.ptq_method == 'none'].sum():.3g} FLOPs and "
        f"{rows.wall_s[rows.ptq_method == 'none'].sum():.0f} seconds of training in all runs.",
    ]


def wide_table(table: pd.DataFrame) -> str:
    """A table that scrolls where the screen is narrow."""
    return f'<div class="wide">{table.to_html(index=False, border=0)}</div>'


def listing(lines: Sequence[str]) -> str:
    """Lines of text."""
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"
