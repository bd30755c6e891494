"""How far do seeds scatter, and how far what precision adds when runs are paired?"""

import pandas as pd

from launch.studies.answer import Answer, between
from launch.studies.rows import Study, groups, with_plain
from qat.analysis.replicates import scatter

_CELL = ["params", "tokens", "policy"]


def answer(study: Study) -> Answer:
    """Scatter of losses and of paired differences, by size and budget."""
    rows = with_plain(study.grid(study.trained))
    repeated = rows[rows.groupby(_CELL).seed.transform("nunique") > 1]
    lines = [
        _line(f"{params:,}", f"{tokens / 1e6:.2g}", cell)
        for params, tokens, cell in groups(repeated, "params", "tokens")
    ]
    lines.append(_line("all", "all", repeated))
    return Answer(tables={"Standard deviation over seeds, nats per byte": pd.DataFrame(lines)})


def _line(params: str, tokens: str, rows: pd.DataFrame) -> dict[str, object]:
    losses = scatter(rows, _CELL, "loss")
    paired = scatter(rows[rows.policy != "none"], _CELL, "delta")
    return {
        "N": params,
        "D, millions": tokens,
        "runs": len(rows),
        "of the loss": between(losses.deviation, losses.low, losses.high),
        "of what precision adds": between(paired.deviation, paired.low, paired.high),
    }
