"""What became of every parameter of a model."""

import dataclasses

import jax
import jax.numpy as jnp

from qat.quantization import QTensor


@dataclasses.dataclass(frozen=True)
class ParameterReport:
    """What became of one parameter.

    Attributes:
        path: "/"-separated.
        quantized: whether its values changed.
        reason: the method and quantizer, or why the parameter was left alone.
        nbytes: of codes and scales, or of the parameter as it is.
        relative_error: of the weights, as they were multiplied with transformed inputs: root mean
            square error over root mean square; 0 if left alone.
        output_errors: of the layer's outputs over the calibration tokens, in the same measure, for
            every slice of a stack; empty without calibration.
        rtn_output_errors: what rounding the same weights to nearest would have cost.
        stored: codes and scales of a quantized parameter; None else.
        exact_rows: where LLM.int8() left rows unquantized: the parameter in float16, 0 elsewhere;
            None else.
    """

    path: str
    quantized: bool
    reason: str
    nbytes: int
    relative_error: float = 0.0
    output_errors: tuple[float, ...] = ()
    rtn_output_errors: tuple[float, ...] = ()
    stored: QTensor | None = dataclasses.field(default=None, repr=False)
    exact_rows: jax.Array | None = dataclasses.field(default=None, repr=False)


def left_alone(path: str, value: jax.Array, reason: str) -> ParameterReport:
    """The report of a parameter that stayed as it was."""
    return ParameterReport(path, False, reason, value.nbytes)


def relative_error(weight: jax.Array, quantized: jax.Array) -> float:
    """Norm of the error over the norm of the weight; 0 for 0/0."""
    return float(_relative_error(weight, quantized))


@jax.jit
def _relative_error(weight: jax.Array, quantized: jax.Array) -> jax.Array:
    weight, quantized = weight.astype(jnp.float32), quantized.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), initial=0)
    unit = jnp.where(largest > 0, 1 / largest, 1)  # against overflow of the squares

    def size(x: jax.Array) -> jax.Array:
        rows = jnp.sum(jnp.square(x * unit), axis=-1)  # sums of sums lose less
        return jnp.sqrt(jnp.sum(rows))

    error = size(quantized - weight)
    return jnp.where(error > 0, error / size(weight), 0)
