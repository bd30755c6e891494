"""Kumar et al.'s model of 30 million parameters on 26 billion tokens; see configs/paper.py.

Command: python -m launch.train --config=configs/paper_30m.py --workdir=runs/paper_30m
Cost: 1.0e19 FLOPs, 37 device-hours of TPU v5e at an assumed 40% of its bfloat16 peak.
Expected: not measured by anybody with this code. Where nothing is quantized, the paper's fitted
law gives 3.72 nats per token on the paper's own data.
"""

import ml_collections

from configs import paper


def get_config() -> ml_collections.ConfigDict:
    """The experiment."""
    return paper.make_config(width=512, layers=10, mlp_width=1280)
