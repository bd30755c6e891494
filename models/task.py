"""The transformer as a training task, and precision as its constants.

The model is built abstractly once to learn its graph; everything after is pure functions of
parameters and constants. The constants of a policy are the numbers of its formats in the places
where the model's layers keep them.
"""

import jax
from flax import nnx

import qat.nnx
from models.transformer import Transformer, TransformerConfig, split
from qat.policy import Policy, Rules
from qat.training.sharding import LogicalAxes
from qat.training.step import Constants, Params, Task

# The stacked blocks have their layer axis first.
AXES: LogicalAxes = (
    ("embed/embedding", ("vocabulary", "width")),
    ("head/kernel", ("width", "vocabulary")),
    ("attention/qkv/kernel", (None, "width", "heads", None, None)),
    ("attention/out/kernel", (None, "heads", "width")),
    ("mlp/gate_up/kernel", (None, "width", None, "mlp")),
    ("mlp/down/kernel", (None, "mlp", "width")),
    ("scale", (None, None)),
)


def language_model(config: TransformerConfig, structure: Policy | Rules | None) -> Task:
    """The task of training this shape under any policy of the given structure.

    Args:
        config: shape.
        structure: a policy or rules; only which operands are quantized, and how grouped, counts.
    """
    graph = split(_abstract(config, structure))[0]

    def init(key: jax.Array) -> Params:
        return split(Transformer(config, structure, rngs=nnx.Rngs(key)))[1]

    def apply(params: Params, constants: Constants, tokens_BT: jax.Array) -> jax.Array:
        logits_BTV: jax.Array = nnx.merge(graph, params, constants)(tokens_BT)
        return logits_BTV

    return Task(init, apply, AXES)


def constants_for(config: TransformerConfig, policy: Policy | Rules | None) -> Constants:
    """The constants that run a shape's programs at a policy's precision."""
    model = _abstract(config, policy)
    if policy is not None:
        qat.nnx.set_policy(model, policy)
    return split(model)[2]


def matrix_params(config: TransformerConfig) -> int:
    """Parameters that take part in a matrix product, for counting FLOPs: no norms, no embedding."""
    return config.kernel_params + config.width * config.vocabulary


def _abstract(config: TransformerConfig, policy: Policy | Rules | None) -> Transformer:
    """The model without values, for its graph and shapes."""
    return nnx.eval_shape(lambda: Transformer(config, policy, rngs=nnx.Rngs(0)))
