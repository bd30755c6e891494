"""What fewer bits cost: 3 sizes × 2 token budgets × 6 policies, and replicates for the noise.

Command: make demo, or python -m launch.demo --workdir=runs/demo
Cost: about 6 minutes on 2 cores (61 million tokens, models of 6 to 23 thousand parameters).
Expected: rounding to 3 or 4 bits after training costs more at 3 million tokens than at a
quarter of a million, at every size; training at 2 bits costs up to 0.4 nats per byte.

Sizes differ in width alone, so that every run of a size shares its compiled programs. Effects are
largest at few bits and many tokens per parameter, so that is where the runs are. All policies of a
cell share initialisation and data order; two more seeds of the smallest cell measure how much
their differences scatter.
"""

import ml_collections

from configs import experiment

WIDTHS = (16, 24, 32)
TOKENS = (250_000, 3_000_000)
POLICIES = ("none", "w4", "w3", "w2", "a3", "kv2")
REPLICATES = (1, 2)
PTQ_BITS = (2, 3, 4, 5, 6, 7, 8)


def get_configs() -> list[ml_collections.ConfigDict]:
    """All experiments of the demo, the longest first."""
    grid = [(width, tokens, 0) for tokens in reversed(TOKENS) for width in reversed(WIDTHS)]
    grid += [(WIDTHS[0], TOKENS[0], seed) for seed in REPLICATES]
    return [
        _experiment(width, tokens, seed, policy)
        for width, tokens, seed in grid
        for policy in POLICIES
    ]


def _experiment(width: int, tokens: int, seed: int, policy: str) -> ml_collections.ConfigDict:
    config = experiment.get_config()
    config.model.width = width
    config.tokens = tokens
    config.seed = seed
    config.policy = policy
    config.learning_rate = 1.2e-2
    return config
