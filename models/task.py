"""The transformer as a training task, and precision as its constants.

The model is built abstractly once to learn its graph; everything after is pure functions of
parameters and constants. The constants of a policy are the numbers of its formats in the places
where the model's layers keep them. Training a model with experts lessens their balance too; it is
evaluated without.
"""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

import qat.nnx
from models.transformer import Transformer, TransformerConfig, split
from qat.policy import Policy, Rules
from qat.training.scaling import Scaling
from qat.training.sharding import LogicalAxes, constrain
from qat.training.step import Constants, Params, Task

AXES: LogicalAxes = (
    ("embed/embedding", ("vocabulary", "width")),
    ("head/kernel", ("width", "vocabulary")),
    ("attention/qkv/kernel", ("layer", "width", "heads", None, None)),
    ("attention/out/kernel", ("layer", "heads", "width")),
    ("router/kernel", ("layer", "width", "expert")),
    ("mlp/gate_up/kernel", ("layer", ..., "width", None, "mlp")),  # between them experts, if any
    ("mlp/down/kernel", ("layer", ..., "mlp", "width")),
    ("blocks/.*(scale|_value)", ("layer", ...)),
    ("scale", (None,)),
    ("_value", (...,)),
)

_UNSCALED = Scaling()


def language_model(
    config: TransformerConfig,
    structure: Policy | Rules | None,
    scaling: Scaling = _UNSCALED,
) -> Task:
    """The task of training this shape under any policy of the given structure.

    Args:
        config: shape.
        structure: a policy or rules; only which operands are quantized, and how grouped, counts.
        scaling: changes the initial values; for what it changes in the model, see `scaled`.
    """
    model = _abstract(config, structure)
    graph, noisy = split(model)[0], qat.nnx.needs_key(model)

    def init(key: jax.Array) -> Params:
        params = split(Transformer(config, structure, rngs=nnx.Rngs(key)))[1]
        return scaling.initial_values(params, AXES)

    def merged(params: Params, constants: Constants, key: jax.Array) -> Transformer:
        model: Transformer = nnx.merge(graph, _gathered(params), constants)
        if noisy:
            qat.nnx.set_key(model, key)
        return model

    def apply(
        params: Params, constants: Constants, key: jax.Array, tokens_BT: jax.Array
    ) -> jax.Array:
        return merged(params, constants, key)(tokens_BT)

    def penalized(
        params: Params, constants: Constants, key: jax.Array, tokens_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        model = merged(params, constants, key)
        states_BTD, balance = model.states_and_balance(tokens_BT)
        return model.logits(states_BTD), config.balance * balance

    return Task(init, apply, AXES, penalized if config.experts else None)


def _gathered(params: Params) -> Params:
    """The parameters, the embedding whole along its width: a lookup in parts of rows is none."""
    embedding = constrain(params["embed"]["embedding"], "vocabulary", None)
    return {**params, "embed": {**params["embed"], "embedding": embedding}}


def scaled(config: TransformerConfig, scaling: Scaling) -> TransformerConfig:
    """The shape with the factors that the rule asks for in the model itself."""
    return dataclasses.replace(
        config,
        attention_scale=scaling.attention_scale(config.channels),
        residual_scale=scaling.residual_scale,
    )


def constants_for(config: TransformerConfig, policy: Policy | Rules | None) -> Constants:
    """The constants that run a shape's programs at a policy's precision."""
    model = _abstract(config, policy)
    if policy is not None:
        qat.nnx.set_policy(model, policy)
    return split(model)[2]


def model_of(
    config: TransformerConfig, policy: Policy | Rules | None, params: Params
) -> Transformer:
    """A model at a policy's precision with these parameters."""
    graph = split(_abstract(config, policy))[0]
    model: Transformer = nnx.merge(graph, params, constants_for(config, policy))
    return model


def matrix_params(config: TransformerConfig) -> int:
    """Parameters that a token meets in matrix products, for counting FLOPs: no norms, no embedding.

    Of the experts those that it passes through; empty slots and how tokens get there are left out.
    """
    return config.active_kernel_params + config.width * config.vocabulary


def _abstract(config: TransformerConfig, policy: Policy | Rules | None) -> Transformer:
    """The model without values, for its graph and shapes."""
    model: Transformer = nnx.merge(*_shapes(config, policy))
    return model


@functools.lru_cache(maxsize=256)  # a sweep asks for the same few formats after every run
def _shapes(config: TransformerConfig, policy: Policy | Rules | None) -> tuple[Any, Any]:
    """Graph and state of `_abstract`."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, policy, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)
