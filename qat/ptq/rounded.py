"""What a rounding made of a stack of weights, put together as one quantized parameter.

Roundings know matrices alone. Here their values and scales become codes in the shape of the
parameter, with the groups that its quantizer has there, as `qat.quantize` would store it.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qat.grid import encode
from qat.groups import groups_of
from qat.ptq.rtn import spread
from qat.ptq.weights import Weight
from qat.quantization import QTensor, code_dtype
from qat.quantizer import Quantizer
from qat.scales import Scale


@dataclasses.dataclass(frozen=True)
class RoundedMatrices:
    """Of one weight.

    Attributes:
        codes_EKN: integers, as narrow as the format allows.
        scale: compact, (E, …) as `qat.scales.scale_for` gives it for each matrix.
    """

    codes_EKN: jax.Array
    scale: Scale

    @classmethod
    def of(cls, values_EKN: jax.Array, scale: Scale, quantizer: Quantizer) -> "RoundedMatrices":
        """From values of the grid without the zero point."""
        codes_EKN = _codes(values_EKN, scale, quantizer.traced())
        return cls(codes_EKN.astype(code_dtype(quantizer.host_format())), scale)


def stored(
    rounded: Sequence[RoundedMatrices], weights: Sequence[Weight], quantizer: Quantizer, dtype: str
) -> QTensor:
    """The quantized parameter of all slices of a stack, in order.

    Raises:
        ValueError: as `groups_of`.
    """
    first = weights[0]
    one = jax.ShapeDtypeStruct(first.shape[first.stacked :], jnp.float32)
    groups = groups_of(one, quantizer, first.matrix_axes)
    kept = [a for a in range(len(one.shape)) if a not in first.matrix_axes]
    order = (*first.matrix_axes, *kept)
    stack = first.shape[: first.stacked]

    def placed(matrices: Sequence[jax.Array], shape: tuple[int, ...]) -> jax.Array:
        whole = jnp.stack(matrices).reshape(*stack, *(shape[a] for a in order))
        inverse = np.argsort(order) + len(stack)
        return whole.transpose([*range(len(stack)), *inverse.tolist()])

    compact = groups.compact_shape
    levels = [r.scale.tensor_scale for r in rounded if r.scale.tensor_scale is not None]
    zeros = [r.scale.zero_point for r in rounded if r.scale.zero_point is not None]
    ones = (1,) * len(one.shape)
    return QTensor(
        placed([r.codes_EKN for r in rounded], one.shape),
        Scale(
            placed([r.scale.scale for r in rounded], compact),
            jnp.stack(levels).reshape(*stack, *ones) if levels else None,
            placed(zeros, compact) if zeros else None,
        ),
        quantizer.host_format(),
        groups.tile,
        quantizer.scale_format,
        dtype,
    )


@jax.jit
def _codes(values_EKN: jax.Array, scale: Scale, quantizer: Quantizer) -> jax.Array:
    def encoded(values_KN: jax.Array, scale: Scale) -> jax.Array:
        zero_point = spread(scale, values_KN.shape).zero_point
        return encode(values_KN if zero_point is None else values_KN + zero_point, quantizer.grid)

    return jax.vmap(encoded)(values_EKN, scale)
