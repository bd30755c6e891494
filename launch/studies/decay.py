"""Is it tokens or the decay of the learning rate that makes rounding cost more?

Budgets of one trunk: at the same number of tokens a model is there twice, with the rate at its peak
and after it has cooled down. So tokens are varied without decay, and decay without tokens. And runs
of one budget at several rates say what the rate does alone.
"""

import pandas as pd

from launch.studies.answer import Answer, between
from launch.studies.rows import Study, groups, some
from qat.analysis.powers import power_law

_BITS = (2.0, 3.0, 4.0)
_CELL = ["params", "tokens", "ptq_bits"]


def answer(study: Study) -> Answer:
    """Growth with tokens with and without decay, what decay adds, and what the rate does."""
    rows = study.rounded[(study.rounded.policy == "none") & (study.rounded.experts == 0)]
    rows = rows[(rows.ptq_method == "rtn") & rows.ptq_bits.isin(_BITS)]
    branches = some(rows[rows.schedule == "wsd"], "budgets of one trunk")
    kinds = {
        "at the peak": branches[branches.status == "unfinished"],
        "cooled down": branches[branches.status == "ok"],
        "a cosine each": study.grid(rows[(rows.status == "ok") & (rows.seed == 0)]),
        "on the way of a cosine": rows[(rows.schedule == "cosine") & (rows.seed == 3)],
    }
    return Answer(
        tables={
            "δ ∝ D^γ_D N^-γ_N of models rounded to the nearest": _growth(kinds),
            "δ at the peak and after cooling down, nats per byte": _by_decay(kinds),
            "δ by learning rate at the same tokens, 3 bits, nats per byte": _by_rate(study, rows),
        }
    )


def _growth(kinds: dict[str, pd.DataFrame]) -> pd.DataFrame:
    lines = []
    for kind, rows in kinds.items():
        for bits, own in groups(rows[rows.ptq_delta > 0], "ptq_bits"):
            by_size = own.params.nunique() > 1
            columns = {"D": own.tokens.to_numpy()} | (
                {"N": own.params.to_numpy()} if by_size else {}
            )
            found = power_law(own.ptq_delta.to_numpy(), columns)
            powers = {x: between(*found.exponents.loc[x]) for x in found.exponents.index}
            lines.append({"rate": kind, "bits": int(bits), "models": found.rows})
            lines[-1] |= {"power of D": powers["D"], "power of N": powers.get("N", "–")}
            lines[-1] |= {"R²": found.r2}
    return pd.DataFrame(lines)


def _by_decay(kinds: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Pairs of one trunk at one number of tokens."""
    both = kinds["at the peak"].merge(kinds["cooled down"], on=_CELL, suffixes=("_peak", "_cooled"))
    lines = []
    for bits, tokens, own in groups(both, "ptq_bits", "tokens"):
        peak, cooled = own.ptq_delta_peak.mean(), own.ptq_delta_cooled.mean()
        line = {"bits": int(bits), "D, millions": f"{tokens / 1e6:.2g}", "models": len(own)}
        lines.append(line | {"peak": peak, "cooled down": cooled, "ratio": cooled / peak})
    return pd.DataFrame(lines)


def _by_rate(study: Study, rows: pd.DataFrame) -> pd.DataFrame:
    tried = rows[rows.learning_rate != rows.params.map(study.rates)]
    tried = tried[(tried.ptq_bits == 3) & (tried.schedule == "cosine")]
    wide = tried.pivot_table(
        index=["params", "tokens"], columns="learning_rate", values="ptq_delta"
    )
    wide = wide.rename(columns="{:g}".format).reset_index()
    return wide.rename(columns={"params": "N", "tokens": "D"})
