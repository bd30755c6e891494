"""Convolutions under a policy: the same quantizers around `jax.lax.conv_general_dilated`.

Kernels are quantized along all that one output channel sums over, activations along the axes of
one example.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from qat.dot_general import Axes, contract
from qat.policy import Policy


def conv_general_dilated(
    policy: Policy | str | None, key: jax.Array | None = None
) -> Callable[..., jax.Array]:
    """A drop-in for `jax.lax.conv_general_dilated` that quantizes its operands.

    Args:
        policy: as in `qat.dot_general`.
        key: as in `qat.dot_general`.

    Returns:
        A function of the arguments of `jax.lax.conv_general_dilated` and one more keyword,
        ``mask``: 0 where the kernel stays zero, else 1, in a shape that broadcasts to the kernel's.
        Formats without a zero would fill the gaps of a kernel that was masked before.

    Raises:
        ValueError: not a policy, or its mode is native: there is no native convolution.
    """
    policy = Policy.of(policy)
    if policy is not None and policy.mode == "native":
        raise ValueError("mode 'native' cannot run a convolution; use mode 'fake' for this layer")

    def convolve(
        lhs: jax.Array, rhs: jax.Array, *args: Any, mask: jax.Array | None = None, **kwargs: Any
    ) -> jax.Array:
        operation = _Convolution(args, tuple(kwargs.items()))
        return contract(operation, policy or Policy(), key, lhs, rhs, mask)

    return convolve


@dataclasses.dataclass(frozen=True, eq=False)
class _Convolution:
    """`jax.lax.conv_general_dilated` with its static arguments."""

    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def __call__(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """The convolution."""
        return jax.lax.conv_general_dilated(lhs, rhs, *self.args, **dict(self.kwargs))

    def axes(self, lhs: jax.Array, rhs: jax.Array) -> tuple[Axes, Axes]:
        """All but the batch of lhs, and all but the output channels of rhs; features last."""
        (_, lhs_feature, *lhs_space), (_, rhs_feature, *rhs_space), _ = self._layout(lhs, rhs)
        return (*lhs_space, lhs_feature), (*rhs_space, rhs_feature)

    def gradient_axes(self, lhs: jax.Array, rhs: jax.Array) -> tuple[Axes, Axes]:
        """Channels of the result for lhs; its batch and space for rhs."""
        _, _, (batch, channel, *space) = self._layout(lhs, rhs)
        return (channel,), (batch, *space)

    def _layout(self, lhs: jax.Array, rhs: jax.Array) -> Any:
        """Where batch, features and space lie in lhs, rhs and the result."""
        position = 4  # of dimension_numbers after the operands, strides, padding and dilations
        numbers = self.args[position] if len(self.args) > position else None
        numbers = dict(self.kwargs).get("dimension_numbers", numbers)
        return jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, numbers)
