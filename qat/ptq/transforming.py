"""The equivalent transformations, each from one model to another that computes the same.

What a layer needs is found by its own file (`awq`, `smoothquant`, `qat.rotation`); here it is found
for all layers, put beside them, and its inverse into their weights. Statistics come from the model
as it is, unrounded, streamed layer by layer.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qat.ptq.awq import awq_scale
from qat.ptq.methods import Settings
from qat.ptq.model import Model
from qat.ptq.smoothquant import smoothing_scale
from qat.ptq.statistics import Statistics
from qat.ptq.stream import Stream
from qat.ptq.weights import Weight
from qat.quantizer import Quantizer
from qat.rotation import Rotation
from qat.transforms import InputTransform, Rotating, Scaling, Step

Targets = Mapping[str, Sequence[Weight]]  # weights that will be rounded, by path of the parameter
_FindStep = Callable[[Weight, jax.Array, Statistics], Any]


@dataclasses.dataclass(frozen=True)
class Transformation:
    """What all of them are given.

    Attributes:
        quantizer: of the weights.
        settings: numbers of the methods.
    """

    quantizer: Quantizer
    settings: Settings

    def apply(self, name: str, model: Model, targets: Targets, stream: Stream | None) -> Model:
        """The transformation of this name, on the inputs of all targets.

        Args:
            name: of the transformation.
            model: unrounded.
            targets: weights by path of their parameter, as traced if there is a stream.
            stream: of the model; None without calibration.
        """
        if name == "quarot":
            return self._quarot(model, targets)
        assert stream is not None
        transform: Callable[[Model, Targets, Stream], Model] = getattr(self, f"_{name}")
        return transform(model, targets, stream)

    def _smoothquant(self, model: Model, targets: Targets, stream: Stream) -> Model:
        def find(weight: Weight, matrix_KN: jax.Array, statistics: Statistics) -> jax.Array:
            return smoothing_scale(matrix_KN, statistics, self.settings.smoothing)

        return _scaled(model, targets, _found(stream, targets, find))

    def _awq(self, model: Model, targets: Targets, stream: Stream) -> Model:
        def find(weight: Weight, matrix_KN: jax.Array, statistics: Statistics) -> jax.Array:
            return awq_scale(matrix_KN, self.quantizer, statistics)

        return _scaled(model, targets, _found(stream, targets, find))

    def _quarot(self, model: Model, targets: Targets) -> Model:
        """The residual stream offline where the model can, other inputs as they come."""
        seed = self.settings.seed
        model = model.with_rotated_residual(seed)
        steps = {
            path: [Rotating(Rotation.of(weights[0].matrices_shape()[1], seed + 1))] * len(weights)
            for path, weights in targets.items()
            if path not in model.rotated
        }
        return _with_steps(model, targets, steps).with_rotated_cache(seed + 2)

    def _llm_int8(self, model: Model, targets: Targets, stream: Stream) -> Model:
        def find(weight: Weight, matrix_KN: jax.Array, statistics: Statistics) -> jax.Array:
            return statistics.absmax_K >= self.settings.outliers

        masks = _found(stream, targets, find)
        transforms = {
            path: InputTransform((), _stacked(targets[path], found))
            for path, found in masks.items()
        }
        return model.with_transforms(transforms)


def _found(stream: Stream, targets: Targets, find: _FindStep) -> dict[str, list[Any]]:
    """What `find` returns for every slice of every target, from the model as it is."""
    found: dict[str, list[Any]] = defaultdict(list)

    def visit(weight: Weight, matrices_EKN: jax.Array, statistics: Statistics) -> None:
        alone = jax.tree.map(lambda x: x[0], statistics)
        found[stream.path(weight)].append(find(weight, matrices_EKN[0], alone))

    stream.run(visit, [weight for weight in stream.weights if stream.path(weight) in targets])
    return found


def _scaled(model: Model, targets: Targets, found: Mapping[str, Sequence[jax.Array]]) -> Model:
    """Inputs divided by what was found."""
    steps = {path: [Scaling(scale_K) for scale_K in scales] for path, scales in found.items()}
    return _with_steps(model, targets, steps)


def _with_steps(model: Model, targets: Targets, steps: Mapping[str, Sequence[Step]]) -> Model:
    """One more step for the inputs of each slice, and its inverse in the weights."""
    parameters: dict[str, jax.Array] = {}
    transforms = {}
    for path, each in steps.items():
        value, weights = model.parameters[path], targets[path]
        for weight, step in zip(weights, each, strict=True):
            matrix_KN = step.weights(weight.matrices(value)[0].astype(jnp.float32))
            changed = weight.parameter_slice(matrix_KN[None]).astype(value.dtype)
            parameters[path] = parameters.get(path, value).at[weight.index].set(changed)
        transforms[path] = InputTransform((_stacked(weights, each),))
    return model.with_parameters(parameters).with_transforms(transforms)


def _stacked(weights: Sequence[Weight], leaves: Sequence[Any]) -> Any:
    """One tree for all slices of a stack, whose axes lead; slices come in order."""
    stack = weights[0].shape[: len(weights[0].index)]

    def joined(*xs: jax.Array) -> jax.Array:
        return jnp.stack(xs).reshape(*stack, *xs[0].shape)

    return jax.tree.map(joined, *leaves)
