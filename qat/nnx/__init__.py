"""The NNX door: Flax layers whose contraction is quantized, with the numbers in their state.

`Linear`, `LinearGeneral`, `Einsum` and `Embed` are Flax's own with a policy; `quantize_model`
converts a whole model of somebody else's; `set_policy` puts other numbers into the same compiled
program, `set_key` the noise of a step, `calibrate` the ranges seen in data.
"""

from qat.nnx.conversion import quantize_model
from qat.nnx.layers import Einsum, Embed, Linear, LinearGeneral
from qat.nnx.slots import (
    Attention,
    Convolution,
    DotGeneral,
    EinsumOp,
    FakeQuant,
    LearnedScale,
    NoiseKey,
    PolicyState,
    StaticRange,
)
from qat.nnx.state import calibrate, needs_key, set_key, set_policy

__all__ = [
    "Attention",
    "Convolution",
    "DotGeneral",
    "Einsum",
    "EinsumOp",
    "Embed",
    "FakeQuant",
    "LearnedScale",
    "Linear",
    "LinearGeneral",
    "NoiseKey",
    "PolicyState",
    "StaticRange",
    "calibrate",
    "needs_key",
    "quantize_model",
    "set_key",
    "set_policy",
]
