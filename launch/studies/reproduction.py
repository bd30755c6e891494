"""Are runs that were trained again what they were?"""

import numpy as np
import pandas as pd

from launch.studies.answer import Answer
from launch.studies.rows import Study


def answer(study: Study) -> Answer:
    """Losses of both times, as trained and rounded, in standard errors of a loss."""
    again = study.table("again")
    key = ["run_id", "tokens", "ptq_method", "ptq_quantizer"]
    both = again.merge(study.rows, on=key, suffixes=("_again", ""))
    apart = (both.loss_again - both.loss).abs()
    both = both.assign(apart=apart, errors=apart / np.hypot(both.loss_se_again, both.loss_se))
    lines = []
    for run_id, own in both.groupby("run_id"):
        run = own[own.ptq_method == "none"].iloc[0]
        line = {"run": run_id, "N": run.params, "D": run.tokens, "policy": run.policy}
        line |= {"loss": run.loss, "again": run.loss_again, "standard errors apart": run.errors}
        lines.append(line | {"rows": len(own), "most nats apart": float(own.apart.max())})
    return Answer(tables={"Runs trained again from their configs": pd.DataFrame(lines)})
