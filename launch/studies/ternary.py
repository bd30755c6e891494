"""Do ternary weights, and BitNet, lie on the curve that integers draw?"""

from typing import Any

import numpy as np
import pandas as pd

from launch.studies import shapes
from launch.studies.answer import Answer
from launch.studies.rows import Study, alone, lines_of, some, with_plain
from qat import laws
from qat.laws import Fit

_KINDS = {"wternary": "ternary weights", "bitnet": "BitNet b1.58"}
_SEARCHED = np.linspace(1.0, 8.0, 701)


def answer(study: Study) -> Answer:
    """Measured against the law of integers at 1.58 bits, and the bits at which that law has it."""
    integers = alone(shapes.table_of(study).frame, "weight_bits")
    fitted = laws.fit("precision_weibull_plain", integers, bootstrap=0, starts=study.starts)
    rows = with_plain(study.grid(study.trained))
    order = ["policy", "params", "tokens"]
    chosen = some(rows[rows.policy.isin(_KINDS)], "ternary models").sort_values(order)
    lines = [_line(row, fitted) for row in lines_of(chosen)]
    return Answer(tables={"What ternary training adds, nats per byte": pd.DataFrame(lines)})


def _line(row: dict[str, Any], fitted: Fit) -> dict[str, object]:
    asked = pd.DataFrame({"weight_bits": _SEARCHED})
    curve = fitted.predict(asked.assign(params=row["params"], tokens=row["tokens"]))
    return {
        "model": _KINDS[row["policy"]],
        "N": row["params"],
        "D": row["tokens"],
        "adds": row["delta"],
        "by the law at log2 3 bits": float(np.interp(np.log2(3), _SEARCHED, curve)) - row["plain"],
        "worth, bits of an integer": float(_SEARCHED[np.abs(curve - row["loss"]).argmin()]),
    }
