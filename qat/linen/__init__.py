"""The Linen door: Flax layers under a policy, and the conversion of other people's models.

Holds no numerics: it brings a policy to the slot where a Flax layer contracts (`calls`), in layers
of its own (`layers`) or in those of a model it did not write (`conversion`). Parameter trees stay
Flax's. A policy is an attribute and may hold traced formats, where the module is built or
converted inside the jitted function; one program then serves every format.

State of a quantizer goes where Flax users look for it: learned scales are parameters, ranges that
a calibration fixes are variables of the collection "ranges", and noise for stochastic rounding
comes from the rng "noise".
"""

from qat.linen.conversion import quantize_model
from qat.linen.layers import Conv, Dense, DenseGeneral, Einsum, Embed
from qat.linen.state import calibrate

__all__ = ["Conv", "Dense", "DenseGeneral", "Einsum", "Embed", "calibrate", "quantize_model"]
