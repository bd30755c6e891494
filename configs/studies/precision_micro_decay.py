"""Is it tokens or the decay of the learning rate that makes rounding after training cost more?

Command: python -m launch.sweep --sweep=configs/studies/precision_micro_decay.py \
    --workdir=runs/precision_micro_decay
Cost: not measured yet.
Expected: docs/studies/precision_micro.

In a sweep of cosines every budget ends at the same low rate, so tokens and decay cannot be told
apart (Catalan-Tatjer et al., arXiv 2510.06213). Here all budgets of a run cool down from one trunk,
and the trunk is rounded at those same tokens, where its rate has not decayed; so both causes vary
alone. Two sizes are also rounded on the way of a cosine.
"""

from configs.studies import precision_micro as study
from configs.studies import precision_micro_rates as tuning
from qat.sweep import Sweep, axis, chain, product

BUDGETS = (0.5, 1, 2, 4)  # millions of tokens; the trunk has twice the last


def get_sweep() -> Sweep:
    """The sweep; those that cool down first."""
    tokens = [round(budget * study.MILLION) for budget in BUDGETS]
    longest = 2 * tokens[-1]
    branching = product(axis("schedule.name", ("wsd",)), axis("schedule.branches", (tokens,)))
    cooled = study.runs((48, 32, 24, 16), (longest / study.MILLION,), ("none", "w2", "w3", "w4"))
    cosines = study.runs((32, 16), (longest / study.MILLION,), ("none",), seeds=(3,))
    return Sweep(
        config=tuning.get_config().to_dict(),
        grid=chain(product(branching, cooled), cosines),
        ptq_methods=("rtn", "gptq"),
        ptq_formats=tuple(f"int{bits}/channel" for bits in study.PTQ_BITS),
        ptq_at=(*(budget / longest for budget in tokens), 1),
    )
