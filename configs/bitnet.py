"""BitNet b1.58 (arXiv 2402.17764) from scratch: ternary weights, int8 activations, 220 million.

Command: python -m launch.train --config=configs/bitnet.py --workdir=runs/bitnet
Cost: 4.8e19 FLOPs, 168 device-hours of TPU v5e at an assumed 40% of its bfloat16 peak.
Expected: not measured by anybody with this code. `paper_220m` on the same data is what to compare
with; the loss should lie above it, and the gap should shrink with size.

Weights have one mean scale a matrix, activations a scale a token, and a norm precedes every
projection, as in the paper; shape and data are those of `configs/paper.py`, whose law this run can
join. The peak of the learning rate is two and a half times that of the unquantized model: ternary
weights turn over only when the weights behind them have moved far, and the BitNet papers train at
such rates. It has not been tuned here.
"""

import ml_collections

from configs import paper_220m


def get_config() -> ml_collections.ConfigDict:
    """The experiment."""
    config = paper_220m.get_config()
    config.policy = "bitnet"
    config.learning_rate = 1.5e-3
    return config
