"""Does rotating the model before rounding lower the cost, and how it grows with tokens?"""

import pandas as pd

from launch.studies.answer import Answer, between
from launch.studies.rows import Study, groups
from qat.analysis.powers import power_law


def answer(study: Study) -> Answer:
    """Cost by method on the same checkpoints, and its power of tokens per parameter."""
    rows = study.table("rotated")
    rows = rows[(rows.ptq_method != "none") & (rows.status == "ok")]
    lines = []
    for bits, method, own in groups(rows, "ptq_bits", "ptq_method"):
        found = power_law(own.ptq_delta.to_numpy(), {"D/N": (own.tokens / own.params).to_numpy()})
        power = between(*found.exponents.loc["D/N"])
        lines.append(
            {"bits": int(bits), "method": method, "models": len(own), "δ ∝ (D/N)^…": power}
        )
        lines[-1]["δ at the mean D/N"] = found.factor
    return Answer(tables={"Cost of rounding, rotated or not, nats per byte": pd.DataFrame(lines)})
