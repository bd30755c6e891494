"""Which mesh to take where a step does not fit.

Meshes are ranked by an estimate, since compiling takes minutes, and only the best is compiled. The
state's share of it is exact. The temporaries' is a count of what a step holds at its largest: the
gradients, what the forward pass keeps of every block, what the busiest place needs besides (one
block, or the head), and the weights that are gathered there. The compiler's figure was a sixth to
a third above the count for a model of 1.7 billion parameters on four kinds of TPU; where it has
said what the asked mesh needs, the factor is taken from that.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from launch.ahead.compilation import Compiled, TooLarge, abstract_state, compile_step
from launch.ahead.topologies import devices_of, larger
from launch.experiment import Experiment
from launch.lab import check_batch
from models.task import AXES
from qat.training.sharding import MESH_AXES, make_mesh, state_shardings

Mesh = Mapping[str, int]

_MOST_COMPILES = 2  # of candidates on one slice
_FLOAT32 = 4
_SCORES_KEPT = 3  # float32 arrays of attention scores at once, in the backward pass
_ROUTINGS_KEPT = 3  # float32 arrays of tokens by slots: dispatch, combine and its gradient


@dataclasses.dataclass(frozen=True)
class Fit:
    """Where a step fits.

    Attributes:
        topology: the slice.
        mesh: devices by mesh axis.
        compiled: the step there.
    """

    topology: str
    mesh: Mesh
    compiled: Compiled


def nearest_fit(
    experiment: Experiment,
    topology: str,
    too_large: TooLarge,
    *,
    fast: bool = False,
    say: Callable[[str], None] = print,
) -> Fit | None:
    """The mesh nearest to the asked one that fits, on its slice or else a larger one.

    Args:
        experiment: whose mesh does not fit.
        topology: the slice.
        too_large: what the compiler said.
        fast: see `compile_step`.
        say: prints a line of progress.
    """
    asked = mesh_of(experiment, devices_of(topology))
    state, _ = abstract_state(experiment, devices_of(topology))
    expected = sum(estimate(experiment, state, asked, devices_of(topology)))
    factor = too_large.needed / expected
    for name in (topology, *larger(topology)):
        devices = devices_of(name)
        meshes = fitting_meshes(experiment, state, devices, asked, too_large.limit / factor)
        for mesh in itertools.islice(meshes, _MOST_COMPILES):
            say(f"trying {name} with {mesh_name(mesh)} …")
            compiled = compile_step(with_mesh(experiment, mesh), devices, fast=fast, say=say)
            if isinstance(compiled, Compiled):
                return Fit(name, mesh, compiled)
    return None


def fitting_meshes(
    experiment: Experiment,
    state: Any,
    devices: Sequence[jax.Device],
    asked: Mesh,
    limit: float,
) -> Iterator[Mesh]:
    """Meshes of all devices whose estimate is within the limit, the nearest to `asked` first.

    Meshes are near if few factors of two turn one into the other; `asked` itself is left out.
    """
    for mesh in sorted(_meshes(len(devices)), key=lambda mesh: _distance(mesh, asked)):
        try:
            needed = sum(estimate(experiment, state, mesh, devices))
        except ValueError:  # it does not divide the state or the batch
            continue
        if needed <= limit and mesh != asked:
            yield mesh


def estimate(
    experiment: Experiment, state: Any, mesh: Mesh, devices: Sequence[jax.Device]
) -> tuple[float, float]:
    """Bytes of a device that the state and the temporaries need.

    Raises:
        ValueError: the mesh does not divide an array of the state or a part of the batch.
    """
    placed = state_shardings(state, make_mesh(**mesh, devices=devices), AXES)

    def share(leaves: Any, shardings: Any) -> int:
        pairs = zip(jax.tree.leaves(leaves), jax.tree.leaves(shardings), strict=True)
        return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)

    gradients = share(state.params, placed.params)
    return share(state, placed), gradients + _activations(experiment, mesh)


def _activations(experiment: Experiment, mesh: Mesh) -> float:
    """Bytes of what the forward pass keeps and of the busiest place."""
    config, model = experiment.config, experiment.model
    shares = config["accumulation"] * mesh["data"] * mesh["fsdp"]
    check_batch(config, mesh)
    sequences: int = config["batch_size"] // shares
    tensor, tokens = mesh["tensor"], int(config["data"]["sequence_length"])
    compute = 2 if model.dtype != "float32" else _FLOAT32
    residual = sequences * tokens * model.width * compute
    rows = sequences * model.gated_rows(tokens)
    channels = 4 * sequences * tokens * model.width + 3 * rows * model.gated_width
    projected = channels * compute / tensor
    scores = sequences * model.heads * tokens**2 * _FLOAT32 / tensor
    routed = _ROUTINGS_KEPT * tokens * rows * _FLOAT32 if model.experts else 0
    block = 2 * projected + _SCORES_KEPT * scores + 4 * residual + routed
    head = sequences * tokens * model.vocabulary * (2 * _FLOAT32 + compute) / tensor
    gathered = max(model.kernel_params // model.layers, model.width * model.vocabulary) * (
        compute / tensor
    )
    kept = {"full": residual, "dots": residual + projected, "none": block}[model.remat]
    return float(model.layers * kept + max(block, head) + gathered)


def mesh_of(experiment: Experiment, devices: Sequence[jax.Device]) -> Mesh:
    """Devices by mesh axis, with a number for what is left.

    Raises:
        ValueError: the product is not the number of devices.
    """
    return dict(make_mesh(**experiment.config["mesh"], devices=devices).shape)


def with_mesh(experiment: Experiment, mesh: Mesh) -> Experiment:
    """The experiment on another mesh."""
    return dataclasses.replace(experiment, config={**experiment.config, "mesh": dict(mesh)})


def mesh_name(mesh: Mesh) -> str:
    """A mesh as the report names it."""
    return " × ".join(f"{axis}={size}" for axis, size in mesh.items())


def _meshes(devices: int) -> Iterator[Mesh]:
    """All factorizations of a number of devices."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for fsdp, tensor in itertools.product(divisors, repeat=2):
        if devices % (fsdp * tensor) == 0:
            sizes = (devices // (fsdp * tensor), fsdp, tensor)
            yield dict(zip(MESH_AXES, sizes, strict=True))


def _distance(mesh: Mesh, other: Mesh) -> float:
    """Factors of two between two meshes; those in tensor, the dearest to run, count double."""
    factors = {axis: abs(math.log2(mesh[axis] / other[axis])) for axis in MESH_AXES}
    return sum(factors.values()) + factors["tensor"]
