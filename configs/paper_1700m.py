"""Kumar et al.'s model of 1.7 billion parameters on 26 billion tokens; see configs/paper.py.

Command: python -m launch.train --config=configs/paper_1700m.py --workdir=runs/paper_1700m
Cost: 3.0e20 FLOPs, 1065 device-hours of TPU v5e at an assumed 40% of its bfloat16 peak.
Expected: not measured by anybody with this code. Where nothing is quantized, the paper's fitted
law gives 3.00 nats per token on the paper's own data.
"""

import ml_collections

from configs import paper


def get_config() -> ml_collections.ConfigDict:
    """The experiment."""
    config = paper.make_config(width=2048, layers=33, mlp_width=5632)
    config.mesh.fsdp = 8  # parameters and their moments take 21 GiB
    return config
