"""What a quantizer needs beside its operand: learned scales, calibrated ranges, noise.

They live where Flax users look for them. A learned scale is a parameter of its layer,
"weights_scale", "activations_scale" and so on, trained like any other. A fixed range is a variable
of the collection "ranges", not a number until a batch was seen; whenever that collection is mutable
it follows the data. Under `nn.scan` both belong among `variable_axes`. Transforms of inputs, which
post-training methods put there, are variables of the collection "transforms".

A layer with a scale of its own has it from `init` on, so a model with such layers has to be
initialized after it was converted.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qat.calibration import (
    NO_BATCH,
    NOTHING_TO_CALIBRATE,
    check_decay,
    check_held,
    first_value,
    follow,
    needs_value,
    with_value,
)
from qat.groups import Axis
from qat.policy import Policy
from qat.quantizer import Quantizer
from qat.transforms import InputTransform

_RANGES = "ranges"
TRANSFORMS, INPUTS = "transforms", "inputs"  # a collection, and its variable in a layer


@dataclasses.dataclass
class _Calibration:
    """One batch of `calibrate`: the moving average's decay, and what the batch has met so far."""

    decay: float | None
    first: bool
    met: set[tuple[str, ...]] = dataclasses.field(default_factory=set)

    def forgets(self, module: nn.Module, operand: str) -> bool:
        """Whether what was known of an operand is from before the calibration."""
        place = (*module.path, operand)
        forgets = self.first and place not in self.met
        self.met.add(place)
        return forgets


_calibrating: contextvars.ContextVar[_Calibration | None] = contextvars.ContextVar(
    "calibrating", default=None
)

_met_transforms: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar(
    "met_transforms", default=None
)


def with_state(
    module: nn.Module, policy: Policy, lhs: jax.Array, rhs: jax.Array, rhs_axes: Axis
) -> Policy:
    """The policy of one contraction, its activations and weights with their numbers."""
    if policy.gradients is not None and needs_value(policy.gradients):
        check_held("gradients", policy.gradients)
    return dataclasses.replace(
        policy,
        activations=with_range(module, policy.activations, "activations", lhs),
        weights=with_scale(module, policy.weights, rhs, rhs_axes),
    )


def with_scale(
    module: nn.Module, quantizer: Quantizer | None, weights: jax.Array, axis: Axis
) -> Quantizer | None:
    """The quantizer of a layer's weights, a learned scale as a parameter of the layer."""
    if quantizer is None or not needs_value(quantizer):
        return quantizer
    check_held("weights", quantizer)
    first = functools.partial(first_value, "weights", quantizer, weights, axis)
    return with_value(quantizer, _held(module, "params", "weights_scale", first))


def with_range(
    module: nn.Module, quantizer: Quantizer | None, operand: str, x: jax.Array
) -> Quantizer | None:
    """The quantizer of what flows through a layer, with its learned scale or calibrated range."""
    if quantizer is None or not needs_value(quantizer):
        return quantizer
    check_held(operand, quantizer)
    learned = quantizer.scale == "learned"
    place = ("params", f"{operand}_scale") if learned else (_RANGES, operand)
    value = _held(module, *place, functools.partial(first_value, operand, quantizer))
    calibration = _calibrating.get()
    follows = calibration is not None or (not learned and module.is_mutable_collection(_RANGES))
    if follows and not module.is_initializing():
        if calibration is not None and calibration.forgets(module, operand):
            value = jnp.full_like(value, jnp.nan)
        decay = None if calibration is None else calibration.decay
        value = follow(value, x, quantizer, decay)
        module.put_variable(*place, value)
    return with_value(quantizer, value)


def input_transform(module: nn.Module) -> InputTransform | None:
    """What happens to a layer's inputs before its contraction, if anything."""
    if not module.has_variable(TRANSFORMS, INPUTS):
        return None
    if (met := _met_transforms.get()) is not None:
        met.add("/".join(module.path))
        return None
    transform: InputTransform = module.get_variable(TRANSFORMS, INPUTS)
    return transform


@contextlib.contextmanager
def meeting_transforms() -> Iterator[set[str]]:
    """Collects paths of layers that have a transform, and applies none."""
    met: set[str] = set()
    token = _met_transforms.set(met)
    try:
        yield met
    finally:
        _met_transforms.reset(token)


def noise_key(module: nn.Module, *quantizers: Quantizer | None) -> jax.Array | None:
    """A key of the rng "noise", where one of the quantizers rounds by it."""
    stochastic = any(q is not None and q.rounding == "stochastic" for q in quantizers)
    return module.make_rng("noise") if stochastic else None


def calibrate(
    module: nn.Module,
    variables: Any,
    batches: Iterable[Any],
    *,
    decay: float | None = None,
    call: Callable[..., Any] | None = None,
    rngs: Any = None,
) -> Any:
    """Sets static ranges and learned scales of activations from what batches of data show.

    Args:
        module: with fixed or learned scales of activations.
        variables: of the module, as `init` returned them; they are not changed.
        batches: inputs of the module; what was calibrated before is forgotten.
        decay: of an exponential moving average, between 0 and 1; None takes the widest range.
        call: (module, batch) → anything, how a batch runs; None is ``module(batch)``.
        rngs: as of `flax.linen.Module.apply`.

    Returns:
        The variables with other ranges and scales.

    Raises:
        ValueError: the module holds no such scale, there is no batch, or `decay` is not between 0
            and 1.
    """
    check_decay(decay)

    @functools.partial(jax.jit, static_argnums=0)
    def run(first: bool, variables: Any, batch: Any) -> Any:
        token = _calibrating.set(calibration := _Calibration(decay, first))
        try:
            mutable = ["params", _RANGES]
            _, changed = module.apply(variables, batch, method=call, mutable=mutable, rngs=rngs)
        finally:
            _calibrating.reset(token)
        if not calibration.met:
            raise ValueError(NOTHING_TO_CALIBRATE)
        return {**variables, **changed}

    first = True
    for batch in batches:
        variables = run(first, variables, batch)
        first = False
    if first:
        raise ValueError(NO_BATCH)
    return variables


def _held(module: nn.Module, collection: str, name: str, first: Callable[[], jax.Array]) -> Any:
    """A variable of a module, made where it is missing, in a method of any kind."""
    if not module.has_variable(collection, name):
        if not module.is_mutable_collection(collection):
            raise ValueError(
                f"layer {'/'.join(module.path)!r} has no {name!r} in the collection "
                f"{collection!r}: initialize the model with its policies, and under nn.scan "
                f"give that collection an axis; nn.RNN has no place for it, but NNX's RNN has"
            )
        module.put_variable(collection, name, first())
    return module.get_variable(collection, name)
