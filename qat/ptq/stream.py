"""Calibration that streams: every weight sees inputs from the layers that were quantized before it.

The traced model is evaluated product by product over all batches. Where it reaches a weight, the
statistics of that weight's inputs are complete; what a visitor makes of them takes the weight's
place, and all that follows is computed from it. Beyond the model and its activations no more is
held than the statistics of one weight (as GPTQ's authors do by transformer block, here for any
model). A weight that is used several times, as in tied layers, sees its inputs of all uses from
the model with that weight unchanged.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qat.contractions import naming_layer
from qat.ptq.evaluation import Evaluation
from qat.ptq.graph import Graph, trace
from qat.ptq.statistics import Statistics
from qat.ptq.weights import Weight, find_weights

# (weight, its matrices (E, K, N), statistics of its inputs with leading axis E) → other matrices
Visit = Callable[[Weight, jax.Array, Statistics], jax.Array | None]


class Stream:
    """A model, traced on the shapes of its first calibration batch.

    Args:
        function: (parameters, batch) → anything; what it returns is not computed.
        parameters: arrays by path.
        batches: inputs of the model, all of the same structure and shapes.

    Attributes:
        weights: that `visit` may be called with, by path of the parameter; a stack of layers has
            several.
        reasons: why other parameters are none, by path.
    """

    def __init__(
        self,
        function: Callable[[dict[str, jax.Array], Any], Any],
        parameters: dict[str, jax.Array],
        batches: Sequence[Any],
    ):
        self._parameters, self._batches = parameters, batches
        self._paths = sorted(parameters)  # the order of a dictionary's leaves
        self._graph: Graph = trace(function, parameters, batches[0])
        weights, reasons = find_weights(self._graph, range(len(self._paths)))
        refused = {w.argument: reason for w in weights if (reason := w.objection()) is not None}
        self.reasons = {self._paths[p]: reason for p, reason in (reasons | refused).items()}
        self.weights = [weight for weight in weights if weight.argument not in refused]

    def path(self, weight: Weight) -> str:
        """Of the parameter that a weight is, or is a slice of."""
        return self._paths[weight.argument]

    def run(self, visit: Visit, chosen: Sequence[Weight]) -> None:
        """Calls `visit` for each of the chosen weights, in the order in which the model uses them.

        Where it returns other matrices, what follows sees them.
        """
        shared = len(self._paths)
        fixed = dict(
            zip(
                self._graph.arguments[:shared],
                (self._parameters[path] for path in self._paths),
                strict=True,
            )
        )
        batches = [
            dict(zip(self._graph.arguments[shared:], jax.tree.leaves(batch), strict=True))
            for batch in self._batches
        ]
        wanted = {use.inputs for weight in chosen for use in weight.uses}
        evaluation = Evaluation(self._graph, fixed, batches, wanted)
        waiting = [use.inputs for weight in chosen for use in weight.uses]
        for weight in chosen:
            path = self.path(weight)
            matrices_EKN = weight.matrices(self._parameters[path])
            with naming_layer(path.rpartition("/")[0]):
                changed_EKN = visit(weight, matrices_EKN, _statistics(weight, evaluation))
            for use in weight.uses:
                waiting.remove(use.inputs)
                if use.inputs not in waiting:
                    evaluation.release(use.inputs)
                if changed_EKN is not None:
                    operand = self._graph.shapes[use.operand]
                    value = weight.operand(use, changed_EKN).reshape(operand.shape)
                    evaluation.replace(use.operand, value.astype(operand.dtype))
            if changed_EKN is not None and len(weight.uses) > 1:
                evaluation.restart()


def _statistics(weight: Weight, evaluation: Evaluation) -> Statistics:
    """Of the inputs of all uses of a weight, over all batches."""
    experts, features, _ = weight.matrices_shape()
    zeros = Statistics.zeros(features)
    statistics: Statistics = jax.tree.map(lambda x: jnp.zeros((experts, *x.shape), x.dtype), zeros)
    for use in weight.uses:
        for inputs in evaluation.values(use.inputs):
            statistics = _followed(statistics, inputs, use.inputs_axes)
    if not bool(jnp.all(jnp.isfinite(statistics.absmax_K))):
        raise ValueError("its inputs are not finite on the calibration batches")
    return statistics


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _followed(
    statistics: Statistics, inputs: jax.Array, axes: tuple[tuple[int, ...], tuple[int, ...]]
) -> Statistics:
    """Statistics after one more batch."""
    batch, contracted = axes
    experts, features = statistics.absmax_K.shape
    others = tuple(a for a in range(inputs.ndim) if a not in (*batch, *contracted))
    x_ETK = inputs.transpose([*batch, *others, *contracted]).reshape(experts, -1, features)
    return jax.vmap(Statistics.add)(statistics, x_ETK)


def batches_of(calibration: Any) -> Iterator[Any]:
    """Calibration batches, checked to be alike."""
    if hasattr(calibration, "shape"):
        raise ValueError(
            f"calibration is an array of shape {calibration.shape}: expected batches, such as "
            "calibration=[array]"
        )
    first = None
    for i, batch in enumerate(calibration):
        shapes = jax.tree.map(jnp.shape, batch)
        if first is None:
            first = shapes
        if shapes != first:
            raise ValueError(
                f"calibration batch {i} has shape {shapes}, the first has {first}: "
                "expected batches of one shape"
            )
        yield batch
