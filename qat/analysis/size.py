"""How many bits a model takes, for comparing formats at equal memory.

As in Dettmers & Zettlemoyer (arXiv 2212.09720), what counts is all of the model: codes at their
packed width, scales and zero points, and what was not quantized, at 16 bits a number as everywhere
in result rows.
"""

import math
from collections.abc import Iterable

import jax

from qat.quantization import QTensor
from qat.storage import pack

_UNQUANTIZED_BITS = 16


def stored_bits(stored: QTensor) -> int:
    """Bits of codes, scales and zero points as `pack` stores them.

    Args:
        stored: of arrays, or of their shapes.
    """
    packed = jax.eval_shape(pack, stored)
    parts = jax.tree.leaves((packed.codes, packed.scale, packed.tensor_scale))
    zero_points: int = sum(leaf.size for leaf in jax.tree.leaves(stored.scale.zero_point))
    nbytes: int = sum(part.size * part.dtype.itemsize for part in parts)
    return 8 * nbytes + zero_points * math.ceil(stored.format.bits)


def total_bits(stored: Iterable[QTensor], unquantized: int) -> int:
    """Bits of a whole model.

    Args:
        stored: what is quantized.
        unquantized: how many numbers are not.
    """
    return sum(map(stored_bits, stored)) + _UNQUANTIZED_BITS * unquantized
