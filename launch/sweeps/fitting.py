"""Whether quantizers and mesh of a run fit the shapes of its model, found out before it is trained.

Blocks must divide the axes that they lie along, and mesh axes the arrays that they split. A model
is traced once a size, without values and without quantizing; what passes through its layers is then
held against the policies of all its runs, and against the formats that they are to be rounded to.
Where gradients are quantized by blocks the train step is traced too.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from launch.experiment import Experiment
from launch.lab import check_batch
from launch.sweeps.rounding import narrower
from models.task import AXES, constants_for, language_model
from models.transformer import Transformer
from models.transformer import split as parts_of
from qat.dot_general import dot_general
from qat.groups import Axis, groups_of
from qat.nnx.observation import Observation
from qat.nnx.state import slots_of, stack_of
from qat.policy import Policy
from qat.quantizer import Quantizer
from qat.training.sharding import make_mesh, state_shardings
from qat.training.sources import parse_source
from qat.training.step import token_losses

# Every operand has a place in the model, and nothing is quantized.
_EVERYWHERE = Policy("none/tensor", "none/tensor", "none/tensor", "none/tensor", "none/tensor")
_CHEAP = ("stdlib", "folder", "jsonl")  # sources whose files are there at once, if at all


@dataclasses.dataclass(frozen=True)
class _Operand:
    """What a quantizer meets in a layer: an array without values, contracted along axes."""

    layer: str
    name: str
    array: jax.ShapeDtypeStruct
    axis: Axis

    def refuses(self, quantizer: Quantizer) -> str | None:
        """Why it cannot be quantized so, or None."""

        def split(array: jax.Array) -> None:
            groups_of(array, quantizer, self.axis)

        try:
            jax.eval_shape(split, self.array)
        except ValueError as error:
            return str(error)
        return None


@dataclasses.dataclass(frozen=True)
class _Size:
    """Operands of all layers of a model of one size, and its parameters without values."""

    operands: Sequence[_Operand]
    params: Any

    def check(self, name: str, quantizer: Quantizer) -> None:
        """Raises ValueError where a quantizer does not fit the operands of that name."""
        operands = [each for each in self.operands if each.name == name]
        for operand in operands:
            if (reason := operand.refuses(quantizer)) is not None:
                raise ValueError(
                    f"{quantizer} does not fit the {name} of layer {operand.layer}: "
                    f"{_with_block(reason, quantizer, operands)}"
                )


class Fitting:
    """Checks runs, each size of a model traced once.

    Args:
        formats: spellings of quantizers to which trained weights are rounded.
    """

    def __init__(self, formats: tuple[str, ...] = ()):
        self._formats = formats
        self._sizes: dict[str, _Size] = {}
        self._checked: set[tuple[str, str]] = set()

    def check(self, run: Experiment) -> None:
        """Makes sure that a run can be trained and rounded on some devices.

        Raises:
            ValueError: a quantizer or the mesh does not fit; the message names it, the layer and
                its shape.
        """
        identity = run.size, str(run.policy)
        if identity in self._checked:
            return
        if run.size not in self._sizes:
            self._sizes[run.size] = _traced(run)
        size = self._sizes[run.size]
        for name, quantizer in run.policy.operands().items():
            if quantizer is not None and name != "gradients":
                size.check(name, quantizer)
        dot_general(run.policy)  # which refuses what no hardware multiplies
        if run.policy.gradients is not None and run.policy.gradients.granularity == "block":
            _trace_step(run)
        for quantizer in narrower(run.policy, self._formats):
            _check_rounding(size, run.policy, quantizer)
        mesh = check_mesh(run, _least_devices(run))
        state_shardings(size.params, mesh, AXES)
        self._checked.add(identity)


def check_mesh(run: Experiment, devices: int) -> Mesh:
    """The mesh of a run on a number of devices, which are only counted.

    Raises:
        ValueError: it needs another number, or they cannot share a batch.
    """
    mesh = make_mesh(**run.config["mesh"], devices=jax.devices()[:1] * devices)
    check_batch(run.config, mesh.shape)
    return mesh


def check_source(run: Experiment) -> None:
    """Makes sure that the text of a run can be there, without reading it.

    Raises:
        ValueError: no source is spelled so, or it has no files.
        FileNotFoundError: its folder or file does not exist.
    """
    source = parse_source(run.config["data"]["source"])
    if source.name.partition(":")[0] in _CHEAP and next(iter(source.files()), None) is None:
        raise ValueError(f"source {source.name!r} has no files")


def _least_devices(run: Experiment) -> int:
    mesh: dict[str, int] = run.config["mesh"]
    return max(0, max(1, mesh["data"]) * mesh["fsdp"] * mesh["tensor"])


def _traced(run: Experiment) -> _Size:
    """What passes through the layers of a model of a run's size."""
    model = nnx.eval_shape(lambda: Transformer(run.model, _EVERYWHERE, rngs=nnx.Rngs(0)))
    params, seen = parts_of(model)[1], []

    def follow(layer: str, name: str, old: Any, x: Any, _: Any, axis: Axis, __: Any) -> Any:
        seen.append(_Operand(layer, name, jax.ShapeDtypeStruct(x.shape, x.dtype), axis))
        return old

    for layer, slot in slots_of(model, "fitting"):
        for name in slot.operands:
            nothing = jax.ShapeDtypeStruct(stack_of(slot), jnp.float32)
            watch = Observation(nothing, follow=functools.partial(follow, layer, name))
            setattr(slot, f"{name}_seen", nnx.data(watch))
    graph, state = nnx.split(model)
    tokens_BT = jax.ShapeDtypeStruct((1, run.config["data"]["sequence_length"]), jnp.int32)
    jax.eval_shape(lambda state, tokens_BT: nnx.merge(graph, state)(tokens_BT), state, tokens_BT)
    return _Size(seen, params)


def _trace_step(run: Experiment) -> None:
    """The gradients of a run's loss, as its train step computes them.

    Raises:
        ValueError: an operand does not fit.
    """
    task = language_model(run.model, run.policy, run.scaling)
    constants = constants_for(run.model, run.policy)
    size = run.config["batch_size"] // run.config["accumulation"]
    tokens_BS = jnp.zeros((size, run.config["data"]["sequence_length"] + 1), jnp.int32)

    def gradients(key: jax.Array) -> Any:
        losses = functools.partial(token_losses, task)
        mean = lambda params: jnp.mean(losses(params, constants, key, tokens_BS))  # noqa: E731
        return jax.grad(mean)(task.init(key))

    jax.eval_shape(gradients, jax.random.key(0))


def _check_rounding(size: _Size, policy: Policy, quantizer: Quantizer) -> None:
    """Raises ValueError where a trained model cannot be evaluated with these weights instead."""
    trained = policy.weights
    if "learned" in (quantizer.scale, trained and trained.scale):
        raise ValueError(
            f"ptq_formats: {quantizer} cannot follow training with {trained or 'no quantizer'}: "
            "expected scales that are not learned"
        )
    dot_general(dataclasses.replace(policy, weights=quantizer))
    size.check("weights", quantizer)


def _with_block(reason: str, quantizer: Quantizer, operands: Sequence[_Operand]) -> str:
    """The reason, with the nearest block size that fits all operands of that name."""
    block = quantizer.block_size
    if not isinstance(block, int):
        return reason
    longest = max(max(each.array.shape) for each in operands)
    by_distance = sorted(range(1, longest + 1), key=lambda size: abs(size - block))
    nearest = next(
        size
        for size in by_distance  # 1 always fits
        if not any(
            each.refuses(dataclasses.replace(quantizer, block_size=size)) for each in operands
        )
    )
    return f"{reason.partition('; nearest')[0]}; nearest that fits all layers is block:{nearest}"
