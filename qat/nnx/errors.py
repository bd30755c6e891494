"""What each quantizer of a model loses on given inputs, and how much it clips.

The model runs once, compiled as it always runs, with an observation of every operand: in the
layers of a scanned stack as many as there are layers. Each adds up norms of the operand and of its
rounding error, so that nothing but a few numbers a layer leaves the program.

What is clipped is read off the quantizer itself: the derivative of the clipped straight-through
estimator is zero exactly where a value lies outside the grid's range.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qat.groups import Axis
from qat.nnx.format_names import format_name
from qat.nnx.observation import Observation, observing
from qat.nnx.slots import Slot, stacked
from qat.nnx.state import needs_key, set_key, slots_of, stack_of
from qat.quantization import fake_quant
from qat.quantizer import Quantizer

_TINY = 2.0**-126  # the smallest normal float32


@dataclasses.dataclass(frozen=True)
class QuantizationError:
    """The error of one quantizer of one layer on some inputs.

    Attributes:
        path: of the layer, such as "blocks/mlp/down".
        index: of the layer in its scanned stack; () where it is not stacked.
        operand: "weights", "activations", "kv_cache", "queries" or "probabilities".
        format: the quantizer, such as "int4/channel".
        values: how many were quantized, counted anew in every call; 0 where the inputs did not
            reach the layer, and what follows is then not a number.
        relative_error: root mean square of x − q(x), over that of x; 0 where x is.
        clipped_share: of the values, those beyond the largest or smallest of the grid, under the
            scale of their group; between 0 and 1.
        largest: magnitude of x.
    """

    path: str
    index: tuple[int, ...]
    operand: str
    format: str
    values: int
    relative_error: float
    clipped_share: float
    largest: float

    @property
    def layer(self) -> str:
        """Path and index, such as "blocks/mlp/down[3]"."""
        index = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        return (self.path or "(root)") + index


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Seen:
    """What was seen of one operand so far, float32 scalars.

    Attributes:
        values: their number.
        clipped: number of those outside the grid's range.
        norm: Euclidean norm.
        error_norm: that of the rounding error.
        largest: magnitude.
    """

    values: Any
    clipped: Any
    norm: Any
    error_norm: Any
    largest: Any


def quantization_errors(model: nnx.Module, *inputs: Any, **kwargs: Any) -> list[QuantizationError]:
    """Runs a model on inputs and measures the error of every quantizer that they reach.

    Stochastic rounding draws its noise from a fixed key. Gradients are no operand of a forward
    pass and are not measured; an operand whose format is "none" has no error.

    Args:
        model: built or converted with a policy; it stays as it is.
        *inputs: of a call, arrays or anything static.
        **kwargs: keywords of the call.

    Returns:
        A line for each operand of each layer, in the model's order; see `error_table`.

    Raises:
        ValueError: nothing in the model is quantized, or a layer's mode is native.
    """
    watched = nnx.clone(model)
    places = _observed(slots_of(watched, "quantization_errors"))
    if needs_key(watched):
        set_key(watched, jax.random.key(0))
    observing(watched, _call)(*inputs, **kwargs)
    return [error for place in places for error in _errors(*place)]


def error_table(errors: Iterable[QuantizationError]) -> str:
    """Errors as text, the largest first; where the inputs did not reach, last."""
    ordered = sorted(errors, key=_severity, reverse=True)
    head = ("layer", "operand", "format", "error", "clipped", "largest")
    rows = [head, *map(_cells, ordered)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = 3  # columns to the left, the others are numbers
    lines = (
        "  ".join(
            cell.ljust(width) if column < texts else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _observed(slots: Iterable[tuple[str, Slot]]) -> list[tuple[str, Slot, str]]:
    """Puts an observation of every operand into slots; says where: path, slot and operand."""
    places = []
    for path, slot in slots:
        policy = slot.policy.get_value()
        if policy.mode == "native":
            raise ValueError(
                f"quantization_errors: layer {path!r} multiplies natively; "
                f"expected a model with mode 'fake', whose quantized values are the same"
            )
        for operand in slot.operands:
            if getattr(policy, operand) is not None and operand != "gradients":
                nothing = stacked(_Seen(*[jnp.float32(0)] * 5), stack_of(slot))
                setattr(slot, f"{operand}_seen", nnx.data(Observation(nothing, follow=_after)))
                places.append((path, slot, operand))
    return places


def _call(model: Any, *inputs: Any, **kwargs: Any) -> Any:
    return model(*inputs, **kwargs)


def _after(old: _Seen, x: jax.Array, quantizer: Quantizer, axis: Axis, key: Any) -> _Seen:
    """What is known of an operand once these values of it were quantized."""
    if quantizer.scale != "learned":  # whose own estimator is a clipped one
        quantizer = dataclasses.replace(quantizer, gradient="clipped")
    quantize = functools.partial(fake_quant, quantizer=quantizer, axis=axis, key=key)
    quantized, passes = jax.jvp(quantize, (x,), (jnp.ones_like(x),))
    x = x.astype(jnp.float32)
    return _Seen(
        old.values + jnp.float32(x.size),
        old.clipped + jnp.sum(passes == 0, dtype=jnp.float32),
        jnp.hypot(old.norm, _norm(x)),
        jnp.hypot(old.error_norm, _norm(quantized.astype(jnp.float32) - x)),
        jnp.maximum(old.largest, jnp.max(jnp.abs(x), initial=0)),
    )


def _norm(x: jax.Array) -> jax.Array:
    """Euclidean norm without overflow or underflow."""
    largest = jnp.maximum(jnp.max(jnp.abs(x), initial=0), _TINY)
    return largest * jnp.sqrt(jnp.sum(jnp.square(x / largest)))


def _errors(path: str, slot: Slot, operand: str) -> list[QuantizationError]:
    """The lines of one operand, one for each layer of a stack."""
    seen: _Seen = jax.device_get(getattr(slot, f"{operand}_seen").get_value())
    quantizer: Quantizer = jax.device_get(getattr(slot.policy.get_value(), operand))
    lines = []
    for index in np.ndindex(*stack_of(slot)):
        name = format_name(jax.tree.map(lambda leaf, index=index: leaf[index], quantizer.format))
        if name != "none":
            at = jax.tree.map(lambda leaf, index=index: float(leaf[index]), seen)
            lines.append(_line(path, index, operand, f"{name}/{quantizer.structure}", at))
    return lines


def _line(
    path: str, index: tuple[int, ...], operand: str, format: str, seen: _Seen
) -> QuantizationError:
    """The ratios of what was added up."""
    if not seen.values:
        return QuantizationError(path, index, operand, format, 0, *[float("nan")] * 3)
    error = seen.error_norm / seen.norm if seen.norm else 0.0
    share = seen.clipped / seen.values
    return QuantizationError(
        path, index, operand, format, int(seen.values), error, share, seen.largest
    )


def _severity(error: QuantizationError) -> float:
    """By what lines are ordered: what is not a number first, what was not reached last."""
    if not error.values:
        return -1.0
    return float("inf") if np.isnan(error.relative_error) else error.relative_error


def _cells(error: QuantizationError) -> tuple[str, ...]:
    """A line of the table."""
    where = (error.layer, error.operand, error.format)
    if not error.values:
        return (*where, "not reached", "", "")
    return (
        *where,
        f"{error.relative_error:.2%}",
        f"{error.clipped_share:.3%}",
        f"{error.largest:.4g}",
    )
