"""Training in 8-bit floats: e4m3 forward, e5m2 gradients, multiplied natively; 1.7 billion.

Command: python -m launch.train --config=configs/fp8.py --workdir=runs/fp8
Cost: 3.0e20 FLOPs, 91 device-hours of TPU v7x at an assumed 40% of its fp8 peak (a device is half
a chip); a GPU of the Hopper generation multiplies fp8 too.
Expected: not measured by anybody with this code. `paper_1700m` on the same data is what to compare
with; the losses should hardly differ.

Weights, activations and gradients have one scale a tensor, taken from the tensor itself at every
step. Such a scale factors out of every sum, so that all three products of a projection, the two of
its gradient included, multiply fp8 codes. Attention, embedding and head stay in bfloat16.
"""

import ml_collections

from configs import paper_1700m


def get_config() -> ml_collections.ConfigDict:
    """The experiment."""
    config = paper_1700m.get_config()
    config.policy = (
        "none, weights e4m3/tensor, activations e4m3/tensor, gradients e5m2/tensor, native"
    )
    return config
