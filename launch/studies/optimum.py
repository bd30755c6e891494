"""Which bits are worth their cost: P* of a training budget, and whether it drifts with compute."""

import pandas as pd

from launch.studies import shapes
from launch.studies.answer import Answer, between
from launch.studies.rows import Study
from qat import laws

_BUDGETS = (1e11, 1e12, 1e13, 1e15, 1e18)  # FLOPs; the largest run has 2.7e13
_LAWS = ("precision_plain", "precision", "precision_weibull_plain", "precision_power_plain")


def answer(study: Study) -> Answer:
    """P*, N* and D* by law and budget, all operands at one width."""
    table = shapes.table_of(study)
    lines = []
    for name in _LAWS:
        fitted = laws.fit(name, table, bootstrap=study.resamples, starts=study.starts)
        for flops in _BUDGETS:
            best = laws.plan(fitted, flops)
            assert best.bits is not None
            near = best.near_optimal
            good = near.bits[near.within_tolerance]
            lines.append(
                {
                    "law": name,
                    "FLOPs": f"{flops:.0e}",
                    "P*": _estimate(best.bits),
                    "N*": _estimate(best.params),
                    "D*/N*": _estimate(best.tokens_per_param),
                    "within 0.1%": ", ".join(f"{bits:g}" for bits in good),
                }
            )
    return Answer(
        tables={"Best bits of weights, activations and cache together": pd.DataFrame(lines)}
    )


def _estimate(found: laws.Estimate) -> str:
    return between(found.value, found.low, found.high)
