"""The demo's budgets from warm-up–stable–decay branches: is it tokens, or the decayed rate?

Command: python -m launch.sweep --sweep=configs/sweeps/cooldowns.py --workdir=runs/cooldowns
Cost: 18 runs of 3 shapes, 55 million tokens, some 6 minutes on 2 cores; 144 roundings.
Expected: not measured yet. If rounding after training costs more with more tokens here too, as it
does in configs/sweeps/demo.py, then it is not because a cosine ends with the budget.

Where every run has its own cosine, tokens and learning rate fall together, and a law in tokens may
describe the decay (Catalan-Tatjer et al., arXiv 2510.06213). Here both budgets of a run share one
trunk at a constant rate: each run gives two rows, the smaller budget's from a branch that costs its
cooldown alone.
"""

from configs.sweeps import demo
from qat.sweep import Sweep, apply, axis, product


def get_sweep() -> Sweep:
    """The sweep; the largest models first."""
    longest, *shorter = demo.TOKENS
    branching = {"tokens": longest, "schedule.name": "wsd", "schedule.branches": shorter}
    return Sweep(
        apply(demo.get_sweep().config, branching),
        product(axis("model.width", demo.WIDTHS), axis("policy", demo.POLICIES)),
        ptq_methods=("rtn",),
        ptq_formats=tuple(f"int{bits}/channel" for bits in demo.PTQ_BITS),
    )
