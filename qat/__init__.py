"""Low-precision training research in JAX: formats, quantizers, policies and the contraction.

The doors to Flax, to files, to post-training quantization and to scaling laws are `qat.nnx`,
`qat.linen`, `qat.storage`, `qat.ptq` and `qat.laws`; they are imported when first used, so that
`import qat` stays light.
"""

import importlib as _importlib
from types import ModuleType as _ModuleType

from qat.convolution import conv_general_dilated
from qat.dot_general import dot_general
from qat.einsum import einsum
from qat.formats import Format, codebook, parse_format
from qat.grid import Codebook, Grid, round_to_grid
from qat.policy import Policy, Rules
from qat.quantization import QTensor, fake_quant, quantize
from qat.quantizer import Quantizer

__all__ = [
    "Codebook",
    "Format",
    "Grid",
    "Policy",
    "QTensor",
    "Quantizer",
    "Rules",
    "codebook",
    "conv_general_dilated",
    "dot_general",
    "einsum",
    "fake_quant",
    "laws",
    "linen",
    "nnx",
    "parse_format",
    "ptq",
    "quantize",
    "round_to_grid",
    "storage",
]

_ROOMS = ("laws", "linen", "nnx", "ptq", "storage")


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> _ModuleType:
    if name in _ROOMS:
        return _importlib.import_module(f"qat.{name}")
    raise AttributeError(f"module 'qat' has no attribute {name!r}")
