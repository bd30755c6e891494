"""Changes of a contraction's inputs that its weights undo: another place to round, same function.

Inputs are divided by a scale for each feature, or rotated, and the weights times the inverse: in
real numbers the product stays what it was, but what the quantizers see has its outliers spread or
moved to the other operand. A transform lives beside the layer's policy, as data, and runs before
the activation quantizer. Features may also be left out of that quantizer altogether, as
LLM.int8() does with outliers.

Shapes: K features, those along the contraction axes; N outputs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qat.policy import Policy
from qat.quantization import fake_quant, key_for
from qat.rotation import Rotation

Axes = tuple[int, ...]


@runtime_checkable
class Step(Protocol):
    """An invertible linear map of the features."""

    def inputs(self, x: Array) -> Array:
        """Of inputs (..., K)."""
        ...

    def weights(self, weight_KN: Array) -> Array:
        """Of weights (K, N), by the inverse transposed, so that the product stays."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaling:
    """Division of each feature by a number above 0.

    Attributes:
        scale_K: float32.
    """

    scale_K: Float[Array, "*L K"]

    def inputs(self, x: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
        """Of inputs (..., K)."""
        return x * jnp.broadcast_to((1 / self.scale_K).astype(x.dtype), x.shape)

    def weights(self, weight_KN: Float[Array, "K N"]) -> Float[Array, "K N"]:
        """Of weights (K, N)."""
        return weight_KN * self.scale_K[:, None].astype(weight_KN.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotating:
    """A rotation of the features.

    Attributes:
        rotation: of K features.
    """

    rotation: Rotation

    def inputs(self, x: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
        """Of inputs (..., K)."""
        return self.rotation.apply(x, -1)

    def weights(self, weight_KN: Float[Array, "K N"]) -> Float[Array, "K N"]:
        """Of weights (K, N)."""
        return self.rotation.apply(weight_KN, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputTransform:
    """What happens to the inputs of one contraction before it.

    Attributes:
        steps: applied in this order.
        exact_K: features that the activation quantizer leaves alone; None for none.
    """

    steps: tuple[Step, ...] = ()
    exact_K: Bool[Array, "*L K"] | None = None

    def followed_by(self, other: "InputTransform") -> "InputTransform":
        """Both, `other` on what this one makes."""
        exact_K = self.exact_K if other.exact_K is None else other.exact_K
        return InputTransform((*self.steps, *other.steps), exact_K)

    def inputs(self, x: Array, axes: Axes) -> Array:
        """Inputs after all steps.

        Args:
            x: inputs.
            axes: their contraction axes, which are flattened in this order to features.
        """
        for step in self.steps:
            x = _along(step.inputs, x, axes)
        return x

    def around_exact(
        self, x: Array, axes: Axes, policy: Policy, key: jax.Array | None
    ) -> tuple[Array, Policy]:
        """Inputs quantized but for exact features, if any, and what of the policy is left to do.

        Args:
            x: inputs after all steps.
            axes: as in `inputs`.
            policy: of the contraction.
            key: for stochastic rounding.

        Raises:
            ValueError: some features stay exact in a native policy, which has one product only.
        """
        if self.exact_K is None or policy.activations is None:
            return x, policy
        if policy.mode == "native":
            raise ValueError(
                "mode 'native' with features that stay unquantized: expected mode 'fake'"
            )
        exact = _beside(self.exact_K, x, axes)
        quantized = fake_quant(
            jnp.where(exact, 0, x), policy.activations, axes, key_for(policy.activations, key, 0)
        )
        return jnp.where(exact, x, quantized), dataclasses.replace(policy, activations=None)


def _along(function: Callable[[Array], Array], x: Array, axes: Axes) -> Array:
    """A function of (..., K) along several axes."""
    last = tuple(range(x.ndim - len(axes), x.ndim))
    moved = jnp.moveaxis(x, axes, last)
    features = math.prod(moved.shape[x.ndim - len(axes) :])
    flat = moved.reshape(*moved.shape[: x.ndim - len(axes)], features)
    return jnp.moveaxis(function(flat).reshape(moved.shape), last, axes)


def _beside(features_K: Array, x: Array, axes: Axes) -> Array:
    """An array of the features in the shape that broadcasts against the inputs."""
    return _along(lambda flat: jnp.broadcast_to(features_K, flat.shape), x, axes)
