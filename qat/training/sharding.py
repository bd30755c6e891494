"""Which array lives where: path → logical axes → mesh axes, by one rule function.

A model names the axes of its parameters once, by path ("mlp/down/kernel" has axes "mlp" and
"width"). Logical axes map to the axes of the device mesh. The optimizer's moments have the
parameters' paths at their ends and get the same placement, so one function serves the whole
training state. An array that no rule knows is an error, not silently replicated.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

LogicalAxes = Sequence[tuple[str, tuple[str | None, ...]]]

DEFAULT_MAPPING: Mapping[str, str] = {
    "width": "fsdp",
    "vocabulary": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
}


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of data × fsdp × tensor devices.

    Args:
        data: copies of the model; -1 takes all remaining devices.
        fsdp: devices over which parameters and batch are split.
        tensor: devices over which heads and hidden layers are split.
        devices: all there are if None.

    Raises:
        ValueError: the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if min(fsdp, tensor) < 1 or (data < 1 and data != -1):
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor}: expected at least 1 of each "
            "(data = -1 takes what is left)"
        )
    if data == -1:
        data = max(1, len(devices) // (fsdp * tensor))
    if data * fsdp * tensor != len(devices):
        raise ValueError(
            f"mesh data={data} × fsdp={fsdp} × tensor={tensor} needs {data * fsdp * tensor} "
            f"devices, there are {len(devices)}"
        )
    grid = np.asarray(devices).reshape(data, fsdp, tensor)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def state_shardings(
    state: Any, mesh: Mesh, axes: LogicalAxes, mapping: Mapping[str, str] = DEFAULT_MAPPING
) -> Any:
    """Placement of every array of a training state.

    Args:
        state: pytree of arrays or their shapes.
        mesh: devices.
        axes: pairs of a regular expression, found at the end of a "/"-separated path, and the
            logical axis of each dimension (None is never split).
        mapping: logical axis → mesh axis; what is absent is never split.

    Raises:
        ValueError: no rule for an array of two or more dimensions, another number of dimensions
            than the rule says, a mesh axis used twice, or a dimension it does not divide.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        return NamedSharding(mesh, _spec(name, leaf.shape, mesh, axes, mapping))

    return jax.tree_util.tree_map_with_path(place, state)


def _spec(
    name: str,
    shape: tuple[int, ...],
    mesh: Mesh,
    axes: LogicalAxes,
    mapping: Mapping[str, str],
) -> PartitionSpec:
    """Mesh axes of one array, checked against its shape."""
    if len(shape) < 2:
        return PartitionSpec()
    logical = next((axes for rule, axes in axes if re.search(f"(^|/){rule}$", name)), None)
    if logical is None:
        raise ValueError(f"no sharding rule matches the array {name!r} of shape {shape}")
    if len(logical) != len(shape):
        raise ValueError(f"sharding rule {logical} does not fit {name!r} of shape {shape}")
    spec = [None if axis is None else mapping.get(axis) for axis in logical]
    used = [axis for axis in spec if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"array {name!r}: a mesh axis is used twice in {spec}")
    for size, axis in zip(shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"array {name!r} of shape {shape}: dimension {size} is not a multiple of "
                f"mesh axis {axis} = {mesh.shape[axis]}"
            )
    return PartitionSpec(*spec)
