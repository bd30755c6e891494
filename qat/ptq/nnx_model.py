"""An NNX model as post-training quantization sees it."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from qat.nnx.slots import NoiseKey, PolicyState, StackMark, TransformState
from qat.nnx.transforms import (
    add_input_transforms,
    cache_rotation,
    dense_layers,
    input_transform,
    remove_quantizers,
    rotate_caches,
    transform_objection,
)
from qat.ptq.model import Parameters, is_numeric
from qat.ptq.weights import Weight
from qat.transforms import InputTransform

_MADE_BY_CODE = (nnx.RngState, PolicyState, NoiseKey, StackMark, TransformState)
_LEFT_BY_CALLS = (nnx.Cache, nnx.Intermediate)
_ELSEWHERE = (nnx.Param, *_MADE_BY_CODE, *_LEFT_BY_CALLS)


@dataclasses.dataclass(frozen=True, eq=False)
class NnxModel:
    """See `qat.ptq.model.Model`.

    Attributes:
        module: never changed; others are made of it.
        call: (module, batch) → anything, how a batch runs.
        rotated: weights whose inputs are the rotated residual stream.
    """

    module: nnx.Module
    call: Callable[[Any, Any], Any]
    rotated: frozenset[str] = frozenset()

    @property
    def result(self) -> nnx.Module:
        """The module."""
        return self.module

    @functools.cached_property
    def parameters(self) -> Parameters:
        """All `nnx.Param`."""
        return {path: node[...] for path, node in _parameters(self.module).items()}

    @property
    def others(self) -> Parameters:
        """Variables of one array of numbers, but for parameters."""
        return {path: node.get_value() for path, node in _others(self.module).items()}

    def function(self) -> Callable[[Parameters, Any], Any]:
        """A pure function, in which the module is cloned."""

        def run(parameters: Parameters, batch: Any) -> Any:
            module = nnx.clone(self.module)
            for path, node in _parameters(module).items():
                node.set_value(parameters[path])
            return self.call(module, batch)

        return run

    def declared(self, path: str) -> Weight | str:
        """By the dense layer that holds it; a stack of layers is one stack of weights."""
        layer, name = _layer(path), path.rpartition("/")[2]
        if name != "kernel" or layer not in self._layers:
            return "not the kernel of a dense layer"
        shape = self.parameters[path].shape
        inputs = np.size(self._layers[layer].in_features)
        stack = len(shape) - inputs - np.size(self._layers[layer].out_features)
        return Weight(0, (), shape, tuple(range(stack)), tuple(range(stack, stack + inputs)), ())

    def objection(self, path: str) -> str | None:
        """A layer needs a slot for its contraction."""
        return transform_objection(self.module, _layer(path))

    def transform(self, path: str) -> InputTransform | None:
        """From the slot of the layer."""
        return input_transform(self.module, _layer(path))

    @property
    def cache_seed(self) -> int | None:
        """From the slots of attention."""
        return cache_rotation(self.module)

    def with_parameters(self, parameters: Mapping[str, jax.Array]) -> "NnxModel":
        """A copy."""
        module = nnx.clone(self.module)
        nodes = _parameters(module)
        for path, value in parameters.items():
            nodes[path].set_value(value)
        return dataclasses.replace(self, module=module)

    def with_others(self, others: Mapping[str, jax.Array]) -> "NnxModel":
        """In a copy."""
        module = nnx.clone(self.module)
        nodes = _others(module)
        for path, value in others.items():
            nodes[path].set_value(value)
        return dataclasses.replace(self, module=module)

    def with_transforms(self, transforms: Mapping[str, InputTransform]) -> "NnxModel":
        """In the slots of a copy's layers."""
        by_layer = {_layer(path): transform for path, transform in transforms.items()}
        return self._changed(add_input_transforms, by_layer)

    def without_quantizers(self, paths: Collection[str], operands: Collection[str]) -> "NnxModel":
        """In the slots of a copy's layers."""
        return self._changed(remove_quantizers, {_layer(path) for path in paths}, operands)

    def with_rotated_cache(self, seed: int) -> "NnxModel":
        """Queries and probabilities stay."""
        return self._changed(rotate_caches, seed)

    def with_rotated_residual(self, seed: int) -> "NnxModel":
        """By the module's own `rotate_residual(seed)`, if it has one."""
        if not hasattr(self.module, "rotate_residual"):
            return self
        module: Any = nnx.clone(self.module)
        rotated = frozenset(module.rotate_residual(seed))
        return dataclasses.replace(self, module=module, rotated=rotated)

    def _changed(self, change: Callable[..., None], *args: Any) -> "NnxModel":
        module = nnx.clone(self.module)
        change(module, *args)
        return dataclasses.replace(self, module=module)

    @functools.cached_property
    def _layers(self) -> dict[str, Any]:
        return dense_layers(self.module)


def _parameters(module: nnx.Module) -> dict[str, nnx.Param[jax.Array]]:
    nodes = nnx.iter_graph(module)
    return {"/".join(map(str, path)): node for path, node in nodes if isinstance(node, nnx.Param)}


def _others(module: nnx.Module) -> dict[str, nnx.Variable[jax.Array]]:
    return {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Variable) and not isinstance(node, _ELSEWHERE)
        if is_numeric(node.get_value())
    }


def _layer(path: str) -> str:
    return path.rpartition("/")[0]
