"""Which array lives where: path → logical axes → mesh axes, by one rule function.

A model names the axes of its parameters once, by path ("mlp/down/kernel" has axes "mlp" and
"width"). Logical axes map to the axes of the device mesh. The optimizer's moments have the
parameters' paths at their ends and get the same placement, so one function serves the whole
training state. An array that no rule knows is an error, not silently replicated.

Activations are named by the model where they are computed; `constrain` places them when the
program runs on a mesh, and does nothing in a program that knows of none.

A mesh may have one more axis in front, over which whole runs are spread: each of its devices, or
groups of devices, holds the state of other runs, so that nothing is sent along it while they train.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Result = TypeVar("Result")

MESH_AXES = ("data", "fsdp", "tensor")
RUN = "run"
BATCH = PartitionSpec(("data", "fsdp"))

LogicalAxes = Sequence[tuple[str, tuple[str | EllipsisType | None, ...]]]

DEFAULT_MAPPING: Mapping[str, str] = {
    "width": "fsdp",
    "vocabulary": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
}
_ACTIVATIONS: Mapping[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "vocabulary": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
}


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    run: int = 0,
) -> Mesh:
    """A mesh of data × fsdp × tensor devices, or of run × data × fsdp × tensor.

    Args:
        data: copies of the model; -1 takes all remaining devices.
        fsdp: devices over which parameters and batch are split.
        tensor: devices over which heads and hidden layers are split.
        devices: all there are if None.
        run: parts of the mesh that train different runs; 0 is a mesh without that axis, for
            programs of one run.

    Raises:
        ValueError: the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if min(fsdp, tensor) < 1 or (data < 1 and data != -1) or run < 0:
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor}, run={run}: expected at least 1 of "
            "each (data = -1 takes what is left, run = 0 is no such axis)"
        )
    runs = max(1, run)
    if data == -1:
        data = max(1, len(devices) // (runs * fsdp * tensor))
    if runs * data * fsdp * tensor != len(devices):
        before = f"run={run} × " if run else ""
        raise ValueError(
            f"mesh {before}data={data} × fsdp={fsdp} × tensor={tensor} needs "
            f"{runs * data * fsdp * tensor} devices, there are {len(devices)}"
        )
    axes = (RUN, *MESH_AXES) if run else MESH_AXES
    grid = np.asarray(devices).reshape((runs, data, fsdp, tensor)[-len(axes) :])
    return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def state_shardings(
    state: Any, mesh: Mesh, axes: LogicalAxes, mapping: Mapping[str, str] = DEFAULT_MAPPING
) -> Any:
    """Placement of every array of a training state.

    Args:
        state: pytree of arrays or their shapes.
        mesh: devices.
        axes: pairs of a regular expression, found at the end of a "/"-separated path, and the
            logical axis of each dimension (None is never split, nor are those, as many as there
            are, that one ... stands for).
        mapping: logical axis → mesh axis; what is absent is never split.

    Raises:
        ValueError: no rule for an array of two or more dimensions, another number of dimensions
            than the rule says, a mesh axis used twice, or a dimension it does not divide.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _spec(path_name(path), leaf.shape, mesh, axes, mapping))

    return jax.tree_util.tree_map_with_path(place, state)


def of_lanes(shardings: Any) -> Any:
    """Placement of stacked arrays, on a mesh with the axis `RUN`, from that of one lane's.

    Args:
        shardings: pytree of `NamedSharding`.
    """
    return jax.tree.map(
        lambda each: NamedSharding(each.mesh, PartitionSpec(RUN, *each.spec)), shardings
    )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Places an activation by the logical axis of each dimension, inside `on_mesh`.

    Args:
        x: traced, any shape.
        axes: "batch", "heads", "mlp", "vocabulary", or None for a dimension that is not split.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = PartitionSpec(*(axis and _ACTIVATIONS[axis] for axis in axes))
    placed: jax.Array = jax.lax.with_sharding_constraint(x, spec)
    return placed


def on_mesh(mesh: Mesh, function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, traced where `constrain` knows the mesh."""

    @functools.wraps(function)
    def traced(*args: Any) -> Result:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def path_name(path: Any) -> str:
    """A pytree path, "/"-separated."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def axes_of(name: str, shape: tuple[int, ...], axes: LogicalAxes) -> tuple[str | None, ...]:
    """Logical axis of each dimension of the array at a path; vectors need no rule.

    Raises:
        ValueError: no rule for an array of two or more dimensions, or another number of
            dimensions than the rule says.
    """
    logical = next((axes for rule, axes in axes if re.search(f"(^|/){rule}$", name)), None)
    if logical is None and len(shape) < 2:
        return (None,) * len(shape)
    if logical is None:
        raise ValueError(f"no sharding rule matches the array {name!r} of shape {shape}")
    named = tuple(axis for axis in logical if not isinstance(axis, EllipsisType))
    rest = len(shape) - len(named)
    if rest < 0 or (rest and len(named) == len(logical)):
        raise ValueError(f"sharding rule {logical} does not fit {name!r} of shape {shape}")
    before = logical.index(...) if ... in logical else len(named)
    return (*named[:before], *(None,) * rest, *named[before:])


def _spec(
    name: str,
    shape: tuple[int, ...],
    mesh: Mesh,
    axes: LogicalAxes,
    mapping: Mapping[str, str],
) -> PartitionSpec:
    """Mesh axes of one array, checked against its shape."""
    logical = axes_of(name, shape, axes)
    spec = [None if axis is None else mapping.get(axis) for axis in logical]
    used = [axis for axis in spec if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"array {name!r}: a mesh axis is used twice in {spec}")
    for size, axis, meaning in zip(shape, spec, logical, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"array {name!r} of shape {shape}: its dimension of size {size}, {meaning!r}, is "
                f"not a multiple of mesh axis {axis} = {mesh.shape[axis]}"
            )
    return PartitionSpec(*spec) if used else PartitionSpec()
