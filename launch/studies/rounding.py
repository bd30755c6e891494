"""What does rounding after training cost, against tokens, size and bits; when do tokens hurt?

The cost is that of unquantized models, paired by sequence with the model's own loss. Laws of the
cost alone are fitted to it, and their criteria say whether bits act by an exponential, as Kumar et
al. have it, or by a power, as Ouyang et al. do.
"""

import numpy as np
import pandas as pd

from launch.studies.answer import Answer
from launch.studies.rows import Study, lines_of
from launch.studies.shapes import parameters
from qat import laws
from qat.laws.forms.rounding import kumar_term, ouyang_term
from qat.report import drawing

_CLEAR = 3.0  # standard errors of the paired difference
_FEWEST_NATS = 5e-4
_SHOWN = (2.0, 3.0, 4.0, 5.0)


def costs(study: Study, method: str) -> pd.DataFrame:
    """Rounded unquantized models of the grid; ``loss`` is what rounding adds."""
    rows = study.grid(study.rounded)
    rows = rows[(rows.policy == "none") & (rows.ptq_method == method) & (rows.status == "ok")]
    return rows.assign(total=rows.loss, loss=rows.ptq_delta, ratio=rows.tokens / rows.params)


def answer(study: Study) -> Answer:
    """Costs by method, laws of them, and the budget after which rounded models get worse."""
    tables, figures = dict[str, pd.DataFrame](), dict[str, str]()
    fits = dict[str, laws.Fit]()
    for method in ("rtn", "gptq"):
        rows = costs(study, method)
        clear = rows[(rows.loss > _CLEAR * rows.ptq_delta_se) & (rows.loss > _FEWEST_NATS)]
        caption = (
            f"Laws of the cost of `{method}`: {len(clear)} of {len(rows)} models, clear of noise"
        )
        tables[caption], found = _compared(study, clear)
        fits |= {f"{method}_{name}": fitted for name, fitted in found.items()}
        best = min(found.values(), key=lambda fitted: fitted.diagnostics.objective)
        tables[f"Parameters of the better one, `{method}`"] = parameters(best)
        figures[f"cost_of_{method}_by_ratio"] = _figure(clear)
        tables[f"Budget of lowest loss after `{method}`, millions of tokens"] = _turning(rows)
    return Answer(tables, figures, fits)


def _compared(study: Study, rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, laws.Fit]]:
    """Criteria of the two laws, in and out of sample."""
    table = laws.as_table(rows)
    comparison = laws.compare(
        (kumar_term, ouyang_term),
        table,
        holdout=("largest-params", "longest-ratio"),
        loss="l2",
        bootstrap=study.resamples,
        starts=study.starts,
    )
    log_R = np.log(table.frame["loss"].to_numpy())
    lines = []
    for index, row in enumerate(lines_of(comparison.table)):
        residual_R = np.log(comparison.fits[row["law"]].predict(table)) - log_R
        line = {
            "law": row["law"],
            "ΔBIC": float(np.round(row["bic"])),
            "R² of log δ": 1 - residual_R.var() / log_R.var(),
            "typical factor": np.exp(residual_R.std()),
        }
        for name, error_LR in comparison.held_out.items():
            error_R = error_LR[index][~np.isnan(error_LR[index])]
            line[f"{name}: factor"] = np.exp(np.sqrt(np.mean(error_R**2)))
        lines.append(line)
    return pd.DataFrame(lines), comparison.fits


def _turning(rows: pd.DataFrame) -> pd.DataFrame:
    """For each size and width the budget of lowest rounded loss, with ≥ where it is the longest."""
    means = rows.groupby(["params", "ptq_bits", "tokens"], as_index=False).total.mean()
    lines = []
    for params, own in means.groupby("params"):
        line: dict[str, object] = {"N": f"{params:,}"}
        for bits, curve in own.groupby("ptq_bits"):
            best = curve.tokens[curve.total.idxmin()]
            sign = "≥ " if best == curve.tokens.max() else ""
            line[f"{bits:g} bits"] = f"{sign}{best / 1e6:.2g}"
        lines.append(line)
    return pd.DataFrame(lines)


def _figure(rows: pd.DataFrame) -> str:
    """Cost against D/N, a colour a width."""
    with drawing.figure() as (figure, axes):
        for index, bits in enumerate(_SHOWN):
            own = rows[rows.ptq_bits == bits]
            style = drawing.style(index)
            for number, (_, size) in enumerate(own.groupby("params")):
                means = size.groupby("ratio").loss.mean()
                label = f"{bits:g} bits" if number == 0 else None
                axes.plot(means.index, means, **style, ms=4, lw=0.8, alpha=0.8, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("tokens per parameter, D/N")
        axes.set_ylabel("loss added by rounding (nats/byte)")
        return drawing.svg(figure, axes)
