"""What post-training quantization asks of a model, whichever library it is from."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from qat.ptq.weights import Weight
from qat.transforms import InputTransform

Parameters = dict[str, jax.Array]


def is_numeric(value: Any) -> bool:
    """Whether it is an array of numbers, as opposed to keys and what is no array."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and any(jnp.issubdtype(dtype, k) for k in (jnp.number, jnp.bool))


class Model(Protocol):
    """A model as a function of parameters by path, in whose layers inputs can be transformed."""

    @property
    def parameters(self) -> Parameters:
        """Arrays by "/"-separated path."""
        ...

    @property
    def others(self) -> Parameters:
        """Other arrays that belong to the model, by path: statistics of batches, calibrated ranges.

        Neither random keys nor what calls leave behind, such as caches.
        """
        ...

    def function(self) -> Callable[[Parameters, Any], Any]:
        """(parameters, batch) → what the model returns."""
        ...

    def declared(self, path: str) -> Weight | str:
        """How a parameter is contracted, by what its layer says; or why that is not known."""
        ...

    def objection(self, path: str) -> str | None:
        """Why inputs of the layer that holds this weight cannot be transformed, if so."""
        ...

    def transform(self, path: str) -> InputTransform | None:
        """What becomes of the inputs of the layer that holds a weight, if anything."""
        ...

    @property
    def cache_seed(self) -> int | None:
        """Of the rotation of keys and values where they are quantized; None without one."""
        ...

    def with_parameters(self, parameters: Mapping[str, jax.Array]) -> "Model":
        """With other values of some parameters."""
        ...

    def with_others(self, others: Mapping[str, jax.Array]) -> "Model":
        """With other values of all `others`."""
        ...

    def with_transforms(self, transforms: Mapping[str, InputTransform]) -> "Model":
        """With further changes of the inputs of layers, by path of their weight.

        Arrays have the axes of the layer's stack, if it is one, in front.
        """
        ...

    def without_quantizers(self, paths: Collection[str], operands: Collection[str]) -> "Model":
        """Without the quantizers of some operands, such as "weights", in these weights' layers."""
        ...

    def with_rotated_cache(self, seed: int) -> "Model":
        """With keys and values rotated where they are quantized for the cache."""
        ...

    @property
    def rotated(self) -> frozenset[str]:
        """Weights whose inputs are the rotated residual stream."""
        ...

    def with_rotated_residual(self, seed: int) -> "Model":
        """With the residual stream rotated, if the model can."""
        ...

    @property
    def result(self) -> Any:
        """The model as its user knows it."""
        ...
