"""Quantized arrays at their true size: in memory as `PackedTensor`, in files by `save` and `load`.

Files are the upper half: they know what a `PackedTensor` is made of, and it knows nothing of them.
"""

from qat.storage.files import load, save
from qat.storage.packed import PackedTensor, pack

__all__ = ["PackedTensor", "load", "pack", "save"]
