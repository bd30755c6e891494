"""Round to nearest: every weight goes to the closest value of its scaled grid, without data.

The baseline of every post-training method. It is the quantizer of training applied once, so
evaluating under a weights-only policy gives the same losses bit for bit.
"""

import jax

from qat.quantization import QTensor, quantize
from qat.quantizer import Quantizer


def round_to_nearest(weight: jax.Array, quantizer: Quantizer, axes: tuple[int, ...]) -> QTensor:
    """Codes and scales of a weight; `axes` are its contraction axes."""
    return quantize(weight, quantizer, axes)
