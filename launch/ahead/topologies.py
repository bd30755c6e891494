"""TPU slices by name, as devices that programs can be compiled for but not run on.

A name is a generation and the shape of a slice in chips, "v5p:4x4x4". The shapes are the regular
ones, each twice as large as the one before; the compiler resolves others too, but not every one of
those can be had.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from importlib import metadata

import jax
from jax.experimental import topologies

from qat.spelling import nearest
from qat.training.devices import DEVICES, Device

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES: Mapping[str, tuple[str, ...]] = {
    "v4": _CUBIC,
    "v5e": _FLAT,
    "v5p": _CUBIC,
    "v6e": _FLAT,
    "tpu7x": _CUBIC,
}
NAMES = tuple(f"{kind}:{shape}" for kind, shapes in SLICES.items() for shape in shapes)
# The compiler asks the machine what TPU it has, unless it is told not to.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",  # any, to keep it from asking
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def check_name(name: str) -> None:
    """Raises ValueError for what is not a slice, with the spellings that are."""
    if name not in NAMES:
        kind = name.partition(":")[0]
        known = {kind: SLICES[kind]} if kind in SLICES else SLICES
        shapes = "; ".join(f"{kind}:{', '.join(shapes)}" for kind, shapes in known.items())
        names = [each for each in NAMES if each.partition(":")[0] in known]
        raise ValueError(
            f"unknown topology {name!r}: expected one of {shapes}; nearest is "
            f"{nearest(name, names)!r}"
        )


def larger(name: str) -> list[str]:
    """The larger slices of the same generation, each of twice as many chips as the one before."""
    kind, shape = name.split(":")
    shapes = SLICES[kind]
    return [f"{kind}:{shape}" for shape in shapes[shapes.index(shape) + 1 :]]


def devices_of(name: str) -> list[jax.Device]:
    """The devices of a slice, for meshes of programs that are compiled and not run.

    Raises:
        ValueError: there is no such slice, or the TPU compiler is not installed.
    """
    check_name(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "compiling for TPU needs its compiler, libtpu: pip install "
            f"'jax[tpu]=={metadata.version('jax')}', or this project's extra 'aot'"
        )
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    described = topologies.get_topology_desc(name, platform="tpu")
    return list(described.devices)


def limits(devices: Sequence[jax.Device]) -> Device | None:
    """What each device of a slice can do; None for a kind that `DEVICES` does not have.

    A slice may show the cores of a chip as devices where a machine joins them to one.
    """
    known = DEVICES.get(devices[0].device_kind)
    if known is None:
        return None
    chips = len({tuple(device.coords) for device in devices})
    share = known.per_chip * chips / len(devices)
    if share == 1:
        return known
    rates = (known.bfloat16, known.int8, known.float8)
    bf16, int8, float8 = (None if rate is None else rate * share for rate in rates)
    assert bf16 is not None
    return Device(bf16, int8, float8, int(known.memory * share), round(known.per_chip / share))
