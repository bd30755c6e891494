"""How each Flax layer runs under a policy.

Flax's own code runs wherever it has a slot for the contraction (`dot_general`,
`conv_general_dilated`, an attention's einsums): the slot is filled for the length of one call, on
the instance that Flax bound for this `apply`, which nobody else holds. `Einsum` and `Embed.attend`
have no slot, so their few lines are written out here, on Flax's own fields.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import InvalidRngError

from qat.contractions import quantized_scope
from qat.convolution import conv_general_dilated
from qat.dot_general import DotGeneral, dot_general
from qat.einsum import einsum_by
from qat.linen.state import input_transform, noise_key, with_range, with_scale, with_state
from qat.policy import Policy
from qat.quantization import fake_quant
from qat.quantizer import Quantizer
from qat.transforms import InputTransform

Call = Callable[..., Any]  # the layer's own method, bound

_ATTENTION = ("queries", "kv_cache", "probabilities")
_PROJECTION = ("weights", "activations", "gradients")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A method of Flax that contracts, or looks up, what a policy can quantize.

    Attributes:
        run: (module, policy, call, *args, **kwargs) → what the method returns, quantized.
        operands: of a policy, that it uses.
        slots: fields that hold a contraction of the module's own; one that is filled is kept.
        several: whether it contracts more than once, and may be quantized in part.
    """

    run: Callable[..., Any]
    operands: tuple[str, ...] = _PROJECTION
    slots: tuple[str, ...] = ()
    several: bool = False

    def objection(self, module: nn.Module, policy: Policy | None) -> str | None:
        """Why a module must be left as it is, if it must."""
        filled_slots = [slot for slot in self.slots if getattr(module, slot) is not None]
        if filled_slots:
            return f"it has a {filled_slots[0]} of its own"
        if isinstance(module, nn.ConvLocal):
            return "its kernel differs from place to place, which no quantized convolution does"
        attends = isinstance(module, nn.MultiHeadDotProductAttention)
        if attends and policy and policy.probabilities and not _takes_einsums(module):
            return "its attention_fn takes no einsum, in which probabilities could be quantized"
        return None


def code_of(method: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a Linen method, below Flax's handling of module state."""
    code: Callable[..., Any] = inspect.unwrap(method)
    return code


@contextlib.contextmanager
def filled(module: nn.Module, **fields: Any) -> Iterator[None]:
    """Holds other values in fields of a bound module, which is frozen to everybody else."""
    old = {name: getattr(module, name) for name in fields}
    try:
        for name, value in fields.items():
            object.__setattr__(module, name, value)
        yield
    finally:
        for name, value in old.items():
            object.__setattr__(module, name, value)


def absent(policy: Policy, *operands: str) -> tuple[str, ...]:
    """Those of the operands that the policy leaves as they are."""
    return tuple(name for name in operands if not policy.restricted([name]).description)


def _described(policy: Policy, *operands: str) -> str:
    """How these operands are quantized, "weights int4/channel, activations int8/tensor"."""
    used = policy.restricted(operands)
    native = used if operands == _PROJECTION else dataclasses.replace(used, mode="fake")
    return native.description


def _run_dense(module: nn.Module, policy: Policy, call: Call, *args: Any, **kwargs: Any) -> Any:
    with filled(module, dot_general=_dot_general(module, policy)):
        return call(*args, **kwargs)


def _run_conv(module: nn.Module, policy: Policy, call: Call, *args: Any, **kwargs: Any) -> Any:
    def slot(lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> Any:
        all_but_features = tuple(range(rhs.ndim - 1))
        full = with_state(module, policy, lhs, rhs, all_but_features)
        with _marked(policy, *_PROJECTION):
            convolve = conv_general_dilated(full, _noise(module, policy))
            return convolve(lhs, rhs, *args, mask=module.mask, **kwargs)

    with filled(module, conv_general_dilated=slot):
        return call(*args, **kwargs)


def _run_einsum(
    module: nn.Einsum, policy: Policy, call: Call, inputs: jax.Array, einsum_str: str | None = None
) -> jax.Array:
    equation = nn.merge_param("einsum_str", module.einsum_str, einsum_str).replace(" ", "")
    if "->" not in equation or equation.count(",") != 1:
        return call(inputs, einsum_str)  # type: ignore[no-any-return]  # it raises Flax's error
    kernel = module.param("kernel", module.kernel_init, module.shape, module.param_dtype)
    bias = None
    if module.use_bias:
        bias_shape, shape_beside = module._get_bias_shape(equation, inputs, kernel)
        bias = module.param("bias", module.bias_init, bias_shape, module.param_dtype)
    operands: Any = module.promote_dtype(inputs, kernel, bias, dtype=module.dtype)
    y = einsum_by(_dot_general(module, policy))(
        equation,
        *operands[:2],
        precision=module.precision,
        preferred_element_type=module.preferred_element_type,
    )
    return y if bias is None else y + operands[2].reshape(shape_beside)


def _run_lookup(module: nn.Embed, policy: Policy, call: Call, inputs: jax.Array) -> jax.Array:
    """Each row of the table is one channel."""
    table: Any
    (table,) = module.promote_dtype(module.embedding, dtype=module.dtype, inexact=False)
    if (quantizer := with_scale(module, policy.weights, table, -1)) is not None:
        table = fake_quant(table, quantizer, -1, _key(module, quantizer))
    with filled(module, embedding=table), _marked(policy, "weights"):
        return call(inputs)  # type: ignore[no-any-return]


def _run_attend(module: nn.Embed, policy: Policy, call: Call, query: jax.Array) -> jax.Array:
    operands: Any = module.promote_dtype(query, module.embedding, dtype=module.dtype)
    query, table = operands
    return _dot_general(module, policy)(query, table, (((query.ndim - 1,), (1,)), ((), ())))


def _run_attention(
    module: nn.MultiHeadDotProductAttention, policy: Policy, call: Call, *args: Any, **kwargs: Any
) -> Any:
    """Quantizes what the attention contracts; the projections around it are layers themselves."""
    attention, has_einsums = module.attention_fn, _takes_einsums(module)

    @functools.wraps(attention)  # the module asks for its signature
    def attend(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        query = _operand(module, policy.queries, "queries", query)
        key = _operand(module, policy.kv_cache, "keys", key)
        value = _operand(module, policy.kv_cache, "values", value)
        if not has_einsums:
            with _marked(policy, *_ATTENTION):
                return attention(query, key, value, *args, **kwargs)
        scores, weighted_values = _einsums(module, policy, kwargs.pop("precision", None))
        kwargs["qk_attn_weights_einsum"] = scores
        kwargs["attn_weights_value_einsum"] = weighted_values
        return attention(query, key, value, *args, **kwargs)

    with filled(module, attention_fn=attend):
        return call(*args, **kwargs)


def _einsums(module: nn.Module, policy: Policy, precision: Any) -> tuple[Call, Call]:
    """Queries times keys, and probabilities times values."""

    def scores(equation: str, query: jax.Array, key: jax.Array) -> jax.Array:
        with _marked(policy, "queries", "kv_cache"):
            return jnp.einsum(equation, query, key, precision=precision)

    def weighted_values(equation: str, weights: jax.Array, value: jax.Array) -> jax.Array:
        weights = _operand(module, policy.probabilities, "probabilities", weights)
        with _marked(policy, "probabilities", "kv_cache"):
            return jnp.einsum(equation, weights, value, precision=precision)

    return scores, weighted_values


def _takes_einsums(module: Any) -> bool:
    """Whether its attention can be given the contractions."""
    parameters = inspect.signature(module.attention_fn).parameters
    return {"qk_attn_weights_einsum", "attn_weights_value_einsum"} <= parameters.keys()


def _operand(module: nn.Module, quantizer: Quantizer | None, name: str, x: jax.Array) -> jax.Array:
    """An operand of attention, quantized along its last axis."""
    quantizer = with_range(module, quantizer, name, x)
    return x if quantizer is None else fake_quant(x, quantizer, -1, _key(module, quantizer))


def _dot_general(module: nn.Module, policy: Policy) -> DotGeneral:
    """The contraction of one layer: marked for reports, with what its quantizers need."""

    def contract(
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        (lhs_axes, rhs_axes), _ = dimension_numbers
        transform = input_transform(module) or InputTransform()
        lhs = transform.inputs(lhs, tuple(lhs_axes))
        full, key = with_state(module, policy, lhs, rhs, rhs_axes), _noise(module, policy)
        lhs, left = transform.around_exact(lhs, tuple(lhs_axes), full, key)
        with _marked(policy, *_PROJECTION):
            dot = dot_general(left, key)
            return dot(
                lhs,
                rhs,
                dimension_numbers,
                precision,
                preferred_element_type,
                out_sharding=out_sharding,
            )

    return contract


def _noise(module: nn.Module, policy: Policy) -> jax.Array | None:
    return _key(module, policy.weights, policy.activations, policy.gradients)


def _key(module: nn.Module, *quantizers: Quantizer | None) -> jax.Array | None:
    """As `noise_key`, with an error that says what to do."""
    try:
        return noise_key(module, *quantizers)
    except InvalidRngError as error:
        raise ValueError(
            "stochastic rounding needs the rng 'noise': apply(…, rngs={'noise': key}), and "
            "split_rngs={'noise': True, …} of an nn.scan, nn.vmap or nn.RNN around the layer"
        ) from error


def _marked(policy: Policy, *operands: str) -> contextlib.AbstractContextManager[Any]:
    """The scope that tells reports how a contraction is quantized, if it is."""
    description = _described(policy, *operands)
    return quantized_scope(description) if description else contextlib.nullcontext()


FLAX_LAYERS = {
    code_of(nn.Dense.__call__): Layer(_run_dense, slots=("dot_general", "dot_general_cls")),
    code_of(nn.DenseGeneral.__call__): Layer(_run_dense, slots=("dot_general", "dot_general_cls")),
    code_of(nn.Einsum.__call__): Layer(_run_einsum),
    code_of(nn.Embed.__call__): Layer(_run_lookup, ("weights",)),
    code_of(nn.Embed.attend): Layer(_run_attend),
    code_of(nn.Conv.__call__): Layer(
        _run_conv, slots=("conv_general_dilated", "conv_general_dilated_cls")
    ),
    code_of(nn.MultiHeadDotProductAttention.__call__): Layer(
        _run_attention,
        _ATTENTION,
        ("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls"),
        several=True,
    ),
}
