"""Low-precision training research in JAX: formats, quantizers, policies and the contraction.

The doors to Flax, to post-training quantization and to scaling laws are `qat.nnx`, `qat.ptq` and
`qat.laws`; they are imported when first used, so that `import qat` stays light.
"""

import importlib
from types import ModuleType

from qat.dot_general import dot_general
from qat.formats import Format, Grid, parse_format, round_to_grid
from qat.policy import Policy, Rules
from qat.quantizer import QTensor, Quantizer, fake_quant, quantize

__all__ = [
    "Format",
    "Grid",
    "Policy",
    "QTensor",
    "Quantizer",
    "Rules",
    "dot_general",
    "fake_quant",
    "laws",
    "nnx",
    "parse_format",
    "ptq",
    "quantize",
    "round_to_grid",
]

_ROOMS = ("laws", "nnx", "ptq")


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f"qat.{name}")
    raise AttributeError(f"module 'qat' has no attribute {name!r}")
