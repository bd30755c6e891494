"""Do weights, activations and cache cost bits independently? Every combination at one size.

Command: python -m launch.sweep --sweep=configs/sweeps/factorial.py --workdir=runs/factorial
Cost: 108 runs of 1 shape, 108 million tokens, some 11 minutes on 2 cores.
Expected: not measured yet. If the law's effective parameters are a product of one factor an
operand, then the logarithm of N_eff of a combination is the sum of those of its operands alone.

4 precisions of weights × 3 of activations × 3 of the cache × 3 seeds, at 6 thousand parameters and
1 million tokens (D/N = 157), where two and three bits cost more than seeds scatter. Runs of a seed
share initialisation and data order, so combinations are compared in pairs.
"""

import itertools

from configs import experiment
from qat.policy import Policy
from qat.sweep import Sweep, axis, product

WEIGHT_BITS = (16, 4, 3, 2)  # 16 is unquantized
ACTIVATION_BITS = (16, 4, 3)
KV_BITS = (16, 3, 2)
SEEDS = (0, 1, 2)


def get_sweep() -> Sweep:
    """The sweep; whole factorials, one seed after another."""
    config = experiment.get_config()
    config.tokens = 1_000_000
    config.model.width = 16
    config.learning_rate = 1.2e-2
    combinations = itertools.product(WEIGHT_BITS, ACTIVATION_BITS, KV_BITS)
    # The shortest spelling, since "w4" and "w4a16kv16" would be two runs of one model.
    policies = [str(Policy.parse(f"w{w}a{a}kv{kv}")) for w, a, kv in combinations]
    return Sweep(config.to_dict(), product(axis("seed", SEEDS), axis("policy", policies)))
