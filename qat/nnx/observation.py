"""Watching what flows through a model: numbers that its calls change, and nothing else.

Whoever wants to know something of an operand puts an `Observation` into its slot: a variable that
says how it follows what it sees. Calibration follows the range, an error report the rounding
error; both are pure functions, compiled with the model, and nothing is sent to the host meanwhile.

Observations are ordinary NNX state, so they come out of everything that hands state on. A scan
over stacked layers written by hand has to do so: its body returns
``flax.nnx.state(layer, qat.nnx.Observation)`` among its outputs, and afterwards
``flax.nnx.update(stack, those)``. Where nobody observes, that state is empty and costs nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


class Observation(nnx.Variable[Any]):
    """What is known of an operand; its metadata `follow` says what one more call makes of it.

    `follow` is a pure function (value so far, operand, quantizer, contraction axes, noise key) →
    value.
    """


def observing(model: nnx.Module, call: Callable[..., Any]) -> Callable[..., None]:
    """Compiles a call after which a model's observations have followed what it computed.

    Args:
        model: with observations in its slots, which are changed in place, and nothing else is.
        call: (model, *inputs) → anything.

    Returns:
        A function of inputs: their arrays are traced, all else is static.
    """
    parts: Any = nnx.split(model, Observation, ...)
    graph, _, rest = parts

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def observe(structure: Any, static: tuple[Any, ...], arrays: Any, seen: Any, rest: Any) -> Any:
        leaves = [arrays.get(place, leaf) for place, leaf in enumerate(static)]
        inputs, keywords = jax.tree.unflatten(structure, leaves)
        merged = nnx.merge(graph, seen, rest)
        call(merged, *inputs, **keywords)
        return nnx.state(merged, Observation)

    def run(*inputs: Any, **keywords: Any) -> None:
        leaves, structure = jax.tree.flatten((inputs, keywords))
        arrays = {place: leaf for place, leaf in enumerate(leaves) if hasattr(leaf, "dtype")}
        static = tuple(None if place in arrays else leaf for place, leaf in enumerate(leaves))
        seen = nnx.state(model, Observation)
        nnx.update(model, observe(structure, static, arrays, seen, rest))

    return run
