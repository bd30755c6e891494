"""What fewer bits cost: 3 sizes × 2 token budgets × 6 policies, and replicates for the noise.

Command: make demo, or python -m launch.sweep --sweep=configs/sweeps/demo.py --workdir=runs/demo
Cost: about 4 minutes on 2 cores: 48 runs of 3 shapes, 61 million tokens, models of 6 to 23
thousand parameters; 192 roundings.
Expected: rounding to 3 or 4 bits after training costs more at 3 million tokens than at a
quarter of a million, at every size; training at 2 bits costs up to 0.4 nats per byte.

Sizes differ in width alone, so that every run of a size shares its compiled programs. Effects are
largest at few bits and many tokens per parameter, so that is where the runs are. All policies of a
cell share initialisation and data order; two more seeds of the smallest cell measure how much
their differences scatter.
"""

from configs import experiment
from qat.sweep import Grid, Sweep, axis, chain, product

WIDTHS = (32, 24, 16)
TOKENS = (3_000_000, 250_000)
POLICIES = ("none", "w4", "w3", "w2", "a3", "kv2")
REPLICATES = (1, 2)
PTQ_BITS = (2, 3, 4, 5, 6, 7, 8)


def get_sweep() -> Sweep:
    """The sweep; the longest runs first."""
    config = experiment.get_config()
    config.learning_rate = 1.2e-2
    cells = _cells(WIDTHS, TOKENS, seeds=(0,))
    replicates = _cells(WIDTHS[-1:], TOKENS[-1:], REPLICATES)
    return Sweep(
        config=config.to_dict(),
        grid=product(chain(cells, replicates), axis("policy", POLICIES)),
        ptq_methods=("rtn",),
        ptq_formats=tuple(f"int{bits}/channel" for bits in PTQ_BITS),
    )


def _cells(widths: tuple[int, ...], tokens: tuple[int, ...], seeds: tuple[int, ...]) -> Grid:
    return product(axis("tokens", tokens), axis("model.width", widths), axis("seed", seeds))
