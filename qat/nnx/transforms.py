"""Input transforms of layers: they go into the same slots as policies."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qat.nnx.conversion import is_free, slot_kind, stack_of_layer
from qat.nnx.slots import DotGeneral, FakeQuant, StackMark, TransformState, stacked
from qat.nnx.state import stack_of
from qat.policy import Policy
from qat.transforms import InputTransform

_DENSE = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)


def dense_layers(model: nnx.Module) -> dict[str, nnx.Linear | nnx.LinearGeneral]:
    """Dense layers by path."""
    dense = (nnx.Linear, nnx.LinearGeneral)
    return {path: node for path, node in _nodes(model).items() if isinstance(node, dense)}


def transform_objection(model: nnx.Module, path: str) -> str | None:
    """Why inputs of a layer cannot be transformed, if they cannot."""
    layer = _nodes(model).get(path)
    kind = slot_kind(layer) if isinstance(layer, _DENSE) else None
    if kind is None:
        return "no dense layer of Flax holds it"
    free = is_free(getattr(layer, kind.slot))
    if not free or getattr(layer, "dot_general_cls", None) is not None:
        return f"its {kind.slot} is its own"
    return None


def add_input_transforms(model: nnx.Module, transforms: Mapping[str, InputTransform]) -> None:
    """Puts transforms into the slots of layers, after what is there already; in place.

    Args:
        model: that holds the layers.
        transforms: by path of a layer without objection; arrays with the axes of the layer's stack
            in front.
    """
    nodes = _nodes(model)
    for path, transform in transforms.items():
        layer = nodes[path]
        kind = slot_kind(layer)
        assert kind is not None
        slot = getattr(layer, kind.slot)
        if not isinstance(slot, DotGeneral):
            slot = kind.make(layer, Policy(), stack_of_layer(layer))
            slot.path = path
            setattr(layer, kind.slot, nnx.data(slot))
        before = InputTransform() if slot.transform is None else slot.transform.get_value()
        slot.transform = nnx.data(TransformState(before.followed_by(transform)))


def input_transform(model: nnx.Module, path: str) -> InputTransform | None:
    """What becomes of the inputs of a layer, if anything."""
    layer = _nodes(model).get(path)
    kind = slot_kind(layer)
    slot = None if kind is None else getattr(layer, kind.slot)
    if not isinstance(slot, DotGeneral) or slot.transform is None:
        return None
    transform: InputTransform = slot.transform.get_value()
    return transform


def remove_quantizers(model: nnx.Module, paths: Collection[str], operands: Collection[str]) -> None:
    """Takes the quantizers of some operands, such as "weights", from layers; in place."""
    for path, slot in _nodes(model).items():
        if not isinstance(slot, DotGeneral) or path.rpartition("/")[0] not in paths:
            continue
        stack, policy = stack_of(slot), slot.policy.get_value()
        slot.policy.set_value(policy.without(operands))
        for operand in operands:
            setattr(slot, f"{operand}_value", nnx.data(None))
        if not jax.tree.leaves(slot.policy.get_value()):
            slot.mark = nnx.data(StackMark(stacked(jnp.zeros(1, jnp.bool_), stack)))


def rotate_caches(model: nnx.Module, seed: int) -> None:
    """Lets keys and values be quantized between a rotation and its inverse; in place."""
    for slot in _nodes(model).values():
        if isinstance(slot, FakeQuant) and slot.operands == ("kv_cache",):
            slot.rotation_seed = seed


def cache_rotation(model: nnx.Module) -> int | None:
    """The seed that `rotate_caches` has set, if it has."""
    slots = [node for node in _nodes(model).values() if isinstance(node, FakeQuant)]
    return next((s.rotation_seed for s in slots if s.rotation_seed is not None), None)


def _nodes(model: nnx.Module) -> dict[str, Any]:
    return {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model)}
