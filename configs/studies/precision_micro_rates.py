"""Which learning rate is best at each size of the study, unquantized, and whether tokens move it.

Command: python -m launch.sweep --sweep=configs/studies/precision_micro_rates.py \
    --workdir=runs/precision_micro_rates
Cost: 60 runs of 6 shapes, 209 million tokens, some 12 minutes on 2 cores.
Expected: not measured yet.

The study's other runs take the rate that is best here, so that a precision is not judged by a rate
that suits another size. All sizes are tuned at 2 million tokens, every second one also at a quarter
and at four times as many. Rounding every run says whether its cost comes with the rate.
"""

import ml_collections

from configs import experiment
from qat.sweep import Sweep, axis, chain, product

CORPUS = "runs/corpus/english"  # where python -m launch.corpus puts it
WIDTHS = (64, 48, 32, 24, 16, 12)
PTQ_BITS = (2, 3, 4, 5, 6, 7, 8)
RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2)


def get_sweep() -> Sweep:
    """The sweep; the longest runs first."""
    cells = chain(
        product(axis("tokens", (8_000_000,)), axis("model.width", WIDTHS[::2])),
        product(axis("tokens", (2_000_000,)), axis("model.width", WIDTHS)),
        product(axis("tokens", (500_000,)), axis("model.width", WIDTHS[::2])),
    )
    return Sweep(
        get_config().to_dict(),
        product(cells, axis("learning_rate", RATES)),
        ptq_methods=("rtn",),
        ptq_formats=tuple(f"int{bits}/channel" for bits in PTQ_BITS),
    )


def get_config() -> ml_collections.ConfigDict:
    """What all runs of the study share."""
    config = experiment.get_config()
    config.batch_size = 16
    config.data.source = f"folder:{CORPUS}"
    config.data.sequence_length = 128
    return config
