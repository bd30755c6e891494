"""Runs so short that starting and compiling is most of the work: what sweeping fast is measured on.

Command: python -m launch.sweep --sweep=configs/sweeps/benchmark.py --workdir=runs/benchmark
Cost: 48 runs of 2 shapes, 4.7 million tokens, about a minute of training and evaluating on a core.
Expected: unquantized, 2.49 ± 0.01 nats per byte at most and 3.14 ± 0.01 at least tokens and
channels (Python 3.11 standard library).

All policies have one compiled structure, so that a size is one program to a sweep that knows it,
and twenty-four to a loop of processes that compile their own.
"""

from configs import experiment
from qat.sweep import Sweep, axis, product

WIDTHS = (16, 32)
TOKENS = (65_536, 131_072)
POLICIES = ("none", "w2", "w3", "w4", "w5", "a3", "a4", "kv2", "kv3", "w3a4", "w4a4kv4", "w2a8")


def get_sweep() -> Sweep:
    """The sweep; the longest runs first."""
    config = experiment.get_config()
    config.learning_rate = 1.2e-2
    grid = product(
        axis("tokens", TOKENS[::-1]), axis("model.width", WIDTHS[::-1]), axis("policy", POLICIES)
    )
    return Sweep(config.to_dict(), grid)
