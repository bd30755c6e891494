"""What an accelerator can do at most: FLOP/s by dtype, and memory.

The numbers are those of the vendors' data sheets, dense (without structured sparsity), for what
JAX calls one device: a whole chip, but for TPU7x, whose chips show as two devices of one core
each. One multiply-add counts as two. A dtype that a data sheet does not mention has no peak here.

Sources: the Google Cloud TPU pages v4, v5e, v5p, v6e and TPU7x (whose table also gives the fp8
rates of v5p and v6e, which are those of bfloat16: they have no fp8 units); the NVIDIA data sheets
A100, H100, H200, L4, L40S and DGX B200, divided by two where they count sparsity.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jax.typing import DTypeLike

_TERA = 1e12
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """The limits of one JAX device.

    Attributes:
        bfloat16: peak FLOP/s; float16 has the same.
        int8: peak operations per second; None is not on the data sheet.
        float8: peak FLOP/s; None is not on the data sheet.
        memory: bytes of high-bandwidth memory; a program can use a little less.
        per_chip: devices that JAX makes of a chip.
    """

    bfloat16: float
    int8: float | None
    float8: float | None
    memory: int
    per_chip: int = 1


def _device(
    bfloat16: float, int8: float | None, float8: float | None, gib: int, per_chip: int = 1
) -> Device:
    """A device from the data sheet of its chip, in tera-operations per second and GiB."""
    bf16, i8, f8 = (None if x is None else x * _TERA / per_chip for x in (bfloat16, int8, float8))
    assert bf16 is not None
    return Device(bf16, i8, f8, gib * _GIB // per_chip, per_chip)


_V5E = _device(197, 393, None, 16)
_V5P = _device(459, 918, 459, 95)
_V6E = _device(918, 1836, 918, 32)
_TPU7X = _device(2307, None, 4614, 192, per_chip=2)

# By the device kind that JAX reports, of which some have had two spellings.
DEVICES: Mapping[str, Device] = {
    "TPU v4": _device(275, 275, None, 32),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _TPU7X,
    "TPU v7x": _TPU7X,
    "NVIDIA A100-SXM4-40GB": _device(312, 624, None, 40),
    "NVIDIA A100-SXM4-80GB": _device(312, 624, None, 80),
    "NVIDIA A100 80GB PCIe": _device(312, 624, None, 80),
    "NVIDIA H100 80GB HBM3": _device(989.5, 1979, 1979, 80),
    "NVIDIA H100 PCIe": _device(756, 1513, 1513, 80),
    "NVIDIA H200": _device(989.5, 1979, 1979, 141),
    "NVIDIA B200": _device(2250, 4500, 4500, 180),
    "NVIDIA L4": _device(121, 242, 242, 24),
    "NVIDIA L40S": _device(362, 733, 733, 48),
}

_COLUMNS = {"bfloat16": "bfloat16", "float16": "bfloat16", "int8": "int8"}


def peak(device_kind: str, dtype: DTypeLike) -> float | None:
    """Most FLOP/s of a device in products of a dtype.

    Args:
        device_kind: as of `jax.Device.device_kind`.
        dtype: of both operands.

    Returns:
        None where the device is not in the table or its data sheet does not give the dtype.
    """
    device, name = DEVICES.get(device_kind), np.dtype(dtype).name
    column = "float8" if name.startswith("float8") else _COLUMNS.get(name)
    if device is None or column is None:
        return None
    found: float | None = getattr(device, column)
    return found
