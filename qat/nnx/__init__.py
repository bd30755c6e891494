"""The NNX door: Flax layers whose contraction is quantized, with the numbers in their state.

`Linear`, `LinearGeneral`, `Einsum` and `Embed` are Flax's own with a policy; `quantize_model`
converts a whole model of somebody else's; `set_policy` puts other numbers into the same compiled
program, `set_key` the noise of a step, `calibrate` the ranges seen in data; `quantization_errors`
says what each quantizer loses.
"""

from qat.nnx.conversion import quantize_model
from qat.nnx.errors import QuantizationError, error_table, quantization_errors
from qat.nnx.layers import Einsum, Embed, Linear, LinearGeneral
from qat.nnx.observation import Observation
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
    "Observation",
    "PolicyState",
    "QuantizationError",
    "StaticRange",
    "calibrate",
    "error_table",
    "needs_key",
    "quantization_errors",
    "quantize_model",
    "set_key",
    "set_policy",
]
