"""Kumar et al.'s model of 220 million parameters on 26 billion tokens; see configs/paper.py.

Command: python -m launch.train --config=configs/paper_220m.py --workdir=runs/paper_220m
Cost: 4.8e19 FLOPs, 168 device-hours of TPU v5e at an assumed 40% of its bfloat16 peak.
Expected: not measured by anybody with this code. Where nothing is quantized, the paper's fitted
law gives 3.20 nats per token on the paper's own data.
"""

import ml_collections

from configs import paper


def get_config() -> ml_collections.ConfigDict:
    """The experiment."""
    return paper.make_config(width=1024, layers=17, mlp_width=2816)
