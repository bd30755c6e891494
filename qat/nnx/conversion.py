"""Other people's NNX models under a policy, by filling the slots of their layers.

Flax's layers take their contraction as an attribute. Conversion walks a copy of the model and
fills that attribute; which axes are contracted, and whether a layer is a stack of scanned ones,
follows from what the layer itself declares. Nothing is guessed from a shape, and nothing outside
the copy is touched. `flax.nnx.Embed` has no slot for `attend`: on the copy it becomes our `Embed`.

What a model multiplies outside any layer, such as ``x @ self.w``, cannot be reached this way; the
report says so, with the line, when it is given example inputs to trace the model with.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from qat.contractions import (
    Contraction,
    ContractionReport,
    ConversionReport,
    find_contractions,
    layer_scope,
    naming_layer,
)
from qat.dot_general import dot_general
from qat.einsum import contracted_axes, einsum
from qat.nnx.layers import Embed
from qat.nnx.slots import (
    ATTENTION,
    PROJECTION,
    Attention,
    Convolution,
    DotGeneral,
    EinsumOp,
    Slot,
)
from qat.nnx.state import set_key
from qat.policy import AnyRules, Policy, Rules
from qat.spelling import expected_instead

M = TypeVar("M", bound=nnx.Module)

_UNTRACED = "(this is what the layers are; give example inputs to see what runs)"
_UNQUANTIZED = (
    None,
    jax.lax.dot_general,
    jax.lax.conv_general_dilated,
    jnp.einsum,
    nnx.dot_product_attention,
    dot_general(None),
    einsum(None),
)


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What became of a layer: the policy it has now, or why it is unquantized."""

    policy: Policy | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class _Layer:
    """How one of Flax's layers is converted.

    Attributes:
        slot: attribute that holds the contraction.
        make: (layer, policy, stack) → what goes into the slot.
        rank: of one layer's kernel, without the stack.
        operands: of a policy, that the layer uses.
    """

    slot: str
    make: Callable[[Any, Policy, tuple[int, ...]], Any]
    rank: Callable[[Any], int]
    operands: tuple[str, ...] = PROJECTION


def quantize_model(
    model: M, rules: AnyRules, *inputs: Any, **kwargs: Any
) -> tuple[M, ConversionReport]:
    """Converts a model: its layers contract as the rules say, its parameters stay as they are.

    Args:
        model: any NNX module; it stays as it is.
        rules: pairs (pattern, policy) by layer path, such as "blocks/0/linear"; the first whose
            pattern matches the whole path decides, None leaves a layer unquantized. Attention
            modules have a path too: their rule says how queries, keys and values, and
            probabilities are quantized. One policy, or its shorthand, is for all layers.
        *inputs: example inputs for the report, arrays or `jax.ShapeDtypeStruct`; nothing is run.
        **kwargs: keywords of the call.

    Returns:
        A copy to be called as before, and a report: with inputs, of every contraction that runs
        on them; without, of what every layer is about to do, and every matrix that no layer here
        knows of.

    Raises:
        ValueError: not an NNX module; a layer that no rule matches; a rule that matches no layer; a
            policy that a layer cannot run.
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(expected_instead("quantize_model", "an NNX module", model))
    rules, converted = Rules.of(rules), nnx.clone(model)
    nodes = [(_joined(path), node) for path, node in nnx.iter_graph(converted)]
    layers = [(path, node) for path, node in nodes if slot_kind(node) is not None]
    rules.check_all_match([path for path, _ in layers])
    outcomes = {path: _convert(path, node, rules) for path, node in layers}
    if not inputs and not kwargs:
        return converted, ConversionReport(tuple(_declared_lines(nodes, outcomes)), _UNTRACED)
    lines = _traced_lines(converted, outcomes, inputs, kwargs)
    return converted, ConversionReport(tuple(lines))


class MaskedConvolution(Convolution):
    """A quantized convolution whose kernel keeps its gaps, in formats without a zero too."""

    def __init__(self, policy: Policy, mask: jax.Array, *args: Any):
        super().__init__(policy, *args)
        self.mask = nnx.data(mask)

    def __call__(self, lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Convolves by the unmasked part of the kernel."""
        return super().__call__(lhs, rhs, *args, mask=self.mask, **kwargs)


def _linear(layer: nnx.Linear, policy: Policy, stack: tuple[int, ...]) -> DotGeneral:
    return DotGeneral(policy, layer.kernel[...], 0, stack)


def _linear_general(layer: nnx.LinearGeneral, policy: Policy, stack: tuple[int, ...]) -> DotGeneral:
    batch = len(layer.batch_axis)
    axes = tuple(range(batch, batch + len(layer.in_features)))
    return DotGeneral(policy, layer.kernel[...], axes, stack)


def _einsum(layer: nnx.Einsum, policy: Policy, stack: tuple[int, ...]) -> EinsumOp:
    axes = contracted_axes(layer.einsum_str, len(layer.kernel_shape))
    return EinsumOp(policy, layer.kernel[...], axes, stack)


def _conv(layer: nnx.Conv, policy: Policy, stack: tuple[int, ...]) -> Convolution:
    kernel = layer.kernel[...], tuple(range(len(layer.kernel_shape) - 1)), stack
    if layer.mask is None:
        return Convolution(policy, *kernel)
    return MaskedConvolution(policy, layer.mask, *kernel)


def _embed(layer: nnx.Embed, policy: Policy, stack: tuple[int, ...]) -> DotGeneral:
    return DotGeneral(policy, layer.embedding[...], -1, stack)


def _attention(layer: nnx.MultiHeadAttention, policy: Policy, stack: tuple[int, ...]) -> Attention:
    return Attention(policy, stack)


_LAYERS: dict[type, _Layer] = {
    nnx.Linear: _Layer("dot_general", _linear, lambda layer: 2),
    nnx.LinearGeneral: _Layer(
        "dot_general",
        _linear_general,
        lambda layer: len(layer.batch_axis) + len(layer.in_features) + len(layer.out_features),
    ),
    nnx.Einsum: _Layer("einsum_op", _einsum, lambda layer: len(layer.kernel_shape)),
    nnx.Conv: _Layer("conv_general_dilated", _conv, lambda layer: len(layer.kernel_shape)),
    nnx.Embed: _Layer("dot_general", _embed, lambda layer: 2),
    nnx.MultiHeadAttention: _Layer(
        "attention_fn",
        _attention,
        lambda layer: 3,
        ATTENTION,
    ),
}


def slot_kind(node: Any) -> _Layer | None:
    """How a node is converted; a subclass keeps its slots, but an embedding may differ in all."""
    if isinstance(node, nnx.Embed) and type(node) not in (nnx.Embed, Embed):
        return None
    return next((kind for layer, kind in _LAYERS.items() if isinstance(node, layer)), None)


def is_free(held: Any) -> bool:
    """Whether what a layer's slot holds is Flax's or ours, and may be replaced."""
    return held in _UNQUANTIZED or isinstance(held, Slot | Attention)


def _convert(path: str, layer: Any, rules: Rules) -> _Outcome:
    """Fills a layer's slot, where a rule and the layer allow it."""
    kind = slot_kind(layer)
    assert kind is not None
    pattern, policy = rules.match(path) or ("", rules.policy_for(path))
    held = getattr(layer, kind.slot, None)
    if not is_free(held):
        return _Outcome(reason=f"its {kind.slot} is its own")
    if getattr(layer, "dot_general_cls", None) is not None:
        return _Outcome(reason="its dot_general_cls is its own")
    if policy is not None and any(policy.operands()[operand] for operand in kind.operands):
        with naming_layer(path):
            slot = kind.make(layer, policy, stack_of_layer(layer))
        slot.path = path
        if type(layer) is nnx.Embed:
            layer.__class__ = Embed
        setattr(layer, kind.slot, nnx.data(slot))
        if (used := policy.restricted(kind.operands)).description:
            return _Outcome(used)  # else the formats of its operands are "none", for now
    return _Outcome(reason=Rules.why_unquantized(pattern, policy, kind.operands))


def stack_of_layer(layer: Any) -> tuple[int, ...]:
    """Leading axes of a stack of layers, by what one layer declares."""
    kind = slot_kind(layer)
    assert kind is not None
    holder: Any = layer.query if isinstance(layer, nnx.MultiHeadAttention) else layer
    kernel = holder.embedding if isinstance(layer, nnx.Embed) else holder.kernel
    shape: tuple[int, ...] = kernel.shape
    return shape[: len(shape) - kind.rank(layer)]


def _traced_lines(
    model: nnx.Module,
    outcomes: dict[str, _Outcome],
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[ContractionReport]:
    """A line for every contraction of the traced program."""
    model = nnx.clone(model)
    nodes = {_joined(path): node for path, node in nnx.iter_graph(model)}
    for path, outcome in outcomes.items():
        if outcome.reason is not None and not isinstance(nodes[path], Slot):
            _mark(path, nodes[path])
    if any(isinstance(node, Slot) for node in nodes.values()):
        set_key(model, jax.random.key(0))  # noise must not be missing
    graph, state = nnx.split(model)

    def run(state: Any, *inputs: Any, **kwargs: Any) -> Any:
        return nnx.merge(graph, state)(*inputs, **kwargs)

    found = find_contractions(run, state, *inputs, **kwargs)
    return [_line(contraction, outcomes) for contraction in found]


@dataclasses.dataclass(frozen=True)
class _Marked:
    """An unquantized contraction that says in the trace whose it is."""

    path: str
    contract: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Contracts as it always did."""
        with layer_scope(self.path):
            return self.contract(*args, **kwargs)

    def quantizer(self, operand: str) -> None:
        """No operand has one."""


def _mark(path: str, layer: Any) -> None:
    """Lets a layer that stays unquantized be found in the trace."""
    kind = slot_kind(layer)
    assert kind is not None
    held = getattr(layer, kind.slot, None) or jax.lax.dot_general
    if type(layer) is nnx.Embed:
        layer.__class__ = Embed
    if not isinstance(held, nnx.Module) and getattr(layer, "dot_general_cls", None) is None:
        setattr(layer, kind.slot, nnx.static(_Marked(path, held)))


def _line(contraction: Contraction, outcomes: dict[str, _Outcome]) -> ContractionReport:
    """What became of one contraction, with the formats that the program holds as data."""
    outcome = outcomes.get(contraction.layer) if contraction.layer is not None else None
    if outcome is None:
        where = f"outside any layer this knows, at {contraction.source}"
        return ContractionReport(contraction, f"{where}; {contraction.advice}")
    if contraction.quantized is None or outcome.policy is None:
        plain = dataclasses.replace(contraction, quantized=None)
        return ContractionReport(plain, outcome.reason or f"its own code; {contraction.advice}")
    used = outcome.policy.restricted(_operands(contraction, outcome.policy)).description
    reason = None if used else "none of its operands is quantized"
    return ContractionReport(dataclasses.replace(contraction, quantized=used or None), reason)


def _operands(contraction: Contraction, policy: Policy) -> tuple[str, ...]:
    """Those operands of a layer's policy that meet in one of its contractions."""
    if contraction.operation == "gather":
        return ("weights",)
    if not any(policy.operands()[operand] for operand in ATTENTION):
        return PROJECTION
    # Queries and keys have their features last; values are contracted along their length.
    inputs, _, out = contraction.equation.partition("->")
    lhs, _, rhs = inputs.partition(",")
    scores = lhs[-1:] == rhs[-1:] and lhs[-1:] not in out
    return ("queries", "kv_cache") if scores else ("probabilities", "kv_cache")


def _declared_lines(
    nodes: list[tuple[str, Any]], outcomes: dict[str, _Outcome]
) -> list[ContractionReport]:
    """A line for every layer, and for every matrix that none of them holds."""
    lines = []
    for path, node in nodes:
        if path in outcomes:
            policy, reason = outcomes[path].policy, outcomes[path].reason
            if policy is not None and _calls_its_own(node):
                policy, reason = None, "its __call__ is its own; give example inputs to see"
            described = None if policy is None else policy.description
            layer = _declared(path, type(node).__name__, (), described)
            lines.append(ContractionReport(layer, reason))
        elif isinstance(node, nnx.Param) and node.ndim >= 2 and not _is_known(path, outcomes):
            reason = "held by no layer this knows; give example inputs to see what multiplies it"
            lines.append(ContractionReport(_declared(path, "parameter", node.shape, None), reason))
    return lines


def _declared(
    path: str, operation: str, shape: tuple[int, ...], quantized: str | None
) -> Contraction:
    """What a layer says it contracts, before any input is known."""
    return Contraction(operation, "", (), shape, None, path, "", path, quantized)


def _calls_its_own(layer: Any) -> bool:
    """Whether a layer is of a subclass that may contract in another way."""
    ours = type(layer).__module__.startswith(("flax.", "qat."))
    base = next(base for base in _LAYERS if isinstance(layer, base))
    return not ours and type(layer).__call__ is not base.__call__


def _is_known(path: str, outcomes: dict[str, _Outcome]) -> bool:
    """Whether a parameter belongs to a layer, or to the slot of one."""
    holders = path.split("/")[:-1]
    return any("/".join(holders[:n]) in outcomes for n in range(len(holders) + 1))


def _joined(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))
