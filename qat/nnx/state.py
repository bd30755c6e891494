"""What is put into a quantized model from outside: policies, noise keys, calibrated ranges."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qat.calibration import NO_BATCH, NOTHING_TO_CALIBRATE, check_decay, follow
from qat.groups import Axis
from qat.nnx.observation import Observation, observing
from qat.nnx.slots import LearnedScale, Slot, StaticRange
from qat.noise import fold, words_of
from qat.policy import AnyRules, Policy, Rules
from qat.quantizer import Quantizer

_SLOTS = ("dot_general", "einsum_op", "conv_general_dilated", "attention_fn")


def set_policy(model: nnx.Module, policy: AnyRules) -> None:
    """Puts other numbers into a model's policies; its compiled programs serve on.

    Args:
        model: built or converted with a policy; changed in place.
        policy: one for every quantized layer, or rules by layer path.

    Raises:
        ValueError: nothing in the model is quantized, or a layer's structure (which operands,
            which granularity, …) differs from that of its new policy.
    """
    slots = slots_of(model, "set_policy")
    rules = Rules.of(policy)
    new = [_fitted(path, slot, rules) for path, slot in slots]
    for (_, slot), value in zip(slots, new, strict=True):
        slot.policy.set_value(value)


def set_key(model: nnx.Module, key: jax.Array) -> None:
    """Gives every place that may round stochastically its noise, for one step.

    Args:
        model: built or converted with a policy; changed in place. Inside a compiled step the key
            may be traced.
        key: JAX random key; use another for every step, such as ``jax.random.fold_in(key, step)``.

    Raises:
        ValueError: nothing in the model is quantized.
    """
    for place, (_, slot) in enumerate(slots_of(model, "set_key")):
        words = fold(words_of(key), jnp.uint32(place))
        for size in stack_of(slot):
            layers = jnp.arange(size, dtype=jnp.uint32)
            words = jax.vmap(lambda layer, words=words: fold(words, layer), out_axes=-2)(layers)
        slot.key.set_value(words)


def needs_key(model: nnx.Module) -> bool:
    """Whether anything in a model rounds stochastically, so that `set_key` must precede a call."""
    policies = (n.policy.get_value() for _, n in nnx.iter_graph(model) if isinstance(n, Slot))
    quantizers = (q for policy in policies for q in policy.operands().values() if q is not None)
    return any(quantizer.rounding == "stochastic" for quantizer in quantizers)


def calibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    decay: float | None = None,
    call: Callable[[Any, Any], Any] | None = None,
) -> None:
    """Sets static ranges and learned scales of activations from what batches of data show.

    Args:
        model: with fixed or learned scales of activations; changed in place.
        batches: inputs of the model; what was calibrated before is forgotten. Nothing else that
            they change in the model, such as running statistics, is kept.
        decay: of an exponential moving average, between 0 and 1; None takes the widest range.
        call: (model, batch) → anything, how a batch runs; None is ``model(batch)``.

    Raises:
        ValueError: the model holds no such scale, there is no batch, or `decay` is not between 0
            and 1; the model is then as it was.
    """
    check_decay(decay)
    slots = [slot for _, slot in slots_of(model, "calibrate")]

    def range_after(
        old: jax.Array, x: jax.Array, quantizer: Quantizer, axis: Axis, key: Any
    ) -> jax.Array:
        return follow(old, x, quantizer, decay)

    watched, pairs = nnx.clone(model), []
    twins = [twin for _, twin in slots_of(watched, "calibrate")]
    for slot, twin in zip(slots, twins, strict=True):
        for name, held in _followed(slot):
            nothing = jnp.full_like(held.get_value(), jnp.nan)
            setattr(twin, name, nnx.data(Observation(nothing, follow=range_after)))
            pairs.append((held, getattr(twin, name)))
    if not pairs:
        raise ValueError(NOTHING_TO_CALIBRATE)
    run, any_batch = observing(watched, call or _call), False
    for batch in batches:
        run(batch)
        any_batch = True
    if not any_batch:
        raise ValueError(NO_BATCH)
    for held, seen in pairs:
        held.set_value(seen.get_value())


def _call(model: Any, batch: Any) -> Any:
    return model(batch)


def _followed(slot: Slot) -> list[tuple[str, nnx.Variable[Any]]]:
    """The numbers of a slot that follow data, by attribute: not those of weights."""
    names = [f"{operand}_value" for operand in slot.operands if operand != "weights"]
    held = [(name, getattr(slot, name)) for name in names]
    return [(name, value) for name, value in held if isinstance(value, LearnedScale | StaticRange)]


def slots_of(model: nnx.Module, function: str) -> list[tuple[str, Slot]]:
    """Slots with the path of their layer."""
    nodes = nnx.iter_graph(model)
    slots = [(layer_path(path), node) for path, node in nodes if isinstance(node, Slot)]
    if not slots:
        raise ValueError(f"{function}: the model has no quantized layer; build it with a policy")
    return slots


def layer_path(path: Iterable[Any]) -> str:
    """Path of a layer from that of its slot."""
    return "/".join(str(part) for part in path if part not in _SLOTS)


def stack_of(slot: Slot) -> tuple[int, ...]:
    """Leading axes of the stack of layers that a slot belongs to."""
    shown = slot.policy.get_value() if slot.mark is None else slot.mark.get_value()
    return tuple(jax.tree.leaves(shown)[0].shape[:-1])


def _fitted(path: str, slot: Slot, rules: Rules) -> Policy:
    """The new value of one policy state, in the shapes of the old (a scanned stack has axes)."""
    old: Policy = slot.policy.get_value()
    policy = rules.policy_for(path) or Policy()
    new = policy.restricted(slot.operands).traced()
    if _structure(new) != _structure(old):
        raise ValueError(
            f"set_policy: layer {path or '(root)'!r} was compiled for {old.structure}, "
            f"the new policy has {new.structure}"
        )
    fitted: Policy = jax.tree.map(lambda new, old: jnp.broadcast_to(new, old.shape), new, old)
    return fitted


def _structure(policy: Policy) -> Any:
    return jax.tree.structure(policy)
