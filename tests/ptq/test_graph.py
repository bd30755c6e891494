"""Traced graphs compute what the function does, on demand, and take other values in between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.timing import counting_compiles
from qat.ptq.evaluation import Evaluation
from qat.ptq.graph import trace


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (g,))


def layered(fixed, x):
    """Stacked layers, a nested jit, a custom gradient, a scan over time, a literal."""

    def layer(x, w):
        x = jax.nn.relu(x @ w["kernel"]) + w["bias"][None]
        return x, jnp.sum(x, axis=-1)

    x, sums = jax.lax.scan(layer, x, fixed["stack"])
    x, _ = jax.lax.scan(layer, x, fixed["stack"], reverse=True)
    steps, _ = jax.lax.scan(lambda c, t: (c * 0.5 + t, None), x[0], x)
    return doubled(jnp.tanh(x)), sums, steps, jnp.linalg.norm(x)


def inputs(layers=3, width=4, seed=0):
    """Kernels that do not make their inputs grow, so that rounding errors do not either."""
    k = jax.random.split(jax.random.key(seed), 3)
    stack = {
        "kernel": jax.random.normal(k[0], (layers, width, width)) / 2,
        "bias": jax.random.normal(k[1], (layers, width)),
    }
    batches = [jax.random.normal(key, (5, width)) for key in jax.random.split(k[2], 2)]
    return {"stack": stack}, batches


def evaluation(graph, fixed, batches, wanted):
    leaves = jax.tree.leaves(fixed)
    shared = dict(zip(graph.arguments[: len(leaves)], leaves, strict=True))
    varying = [{graph.arguments[-1]: batch} for batch in batches]
    return Evaluation(graph, shared, varying, wanted)


@pytest.mark.parametrize("layers", [1, 3])
def test_every_result_is_that_of_the_function(layers):
    fixed, batches = inputs(layers)
    graph = trace(layered, fixed, batches[0])
    values = evaluation(graph, fixed, batches, graph.results)
    expected = [jax.tree.leaves(layered(fixed, batch)) for batch in batches]
    for place, node in enumerate(graph.results):
        for value, want in zip(values.values(node), [e[place] for e in expected], strict=True):
            np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)
        values.release(node)


def test_scans_over_layers_are_unrolled_and_scans_over_time_are_not():
    fixed, batches = inputs(layers=3)
    names = [operation.name for operation in trace(layered, fixed, batches[0]).operations]
    assert names.count("dot_general") == 6
    assert names.count("scan") == 1


def test_layers_share_their_programs():
    fixed, batches = inputs(layers=6)

    def chain(fixed, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w["kernel"]), x), x, fixed["stack"])[0]

    graph = trace(chain, fixed, batches[0])
    products = [op for op in graph.operations if op.name == "dot_general"]
    wanted = [op.inputs[0] for op in products]
    values = evaluation(graph, fixed, batches, wanted)
    for node in wanted:
        list(values.values(node))
        values.release(node)
    assert len(graph.programs) <= 4  # slices and products, of the first layer and of all others


def test_only_equal_programs_of_other_graphs_are_shared():
    """Those that differ in a constant, or in which of their inputs they read, are others."""
    fixed, batches = inputs(layers=2, width=6, seed=1)
    table = np.arange(5 * 6, dtype=np.float32).reshape(5, 6)

    def chain(factor, table, kernel):
        def function(fixed, x):
            times = jax.lax.fori_loop(0, 3, lambda _, y: y + table, x)
            return times * factor @ fixed["stack"]["kernel"][kernel]

        return function

    def run(function):
        graph = trace(function, fixed, batches[0])
        (value, _) = evaluation(graph, fixed, batches, graph.results).values(graph.results[0])
        np.testing.assert_allclose(value, function(fixed, batches[0]), rtol=1e-5, atol=1e-5)

    run(chain(2.0, table, 0))
    with counting_compiles() as compiled:
        run(chain(2.0, table.copy(), 0))
    assert "_run_plan" not in compiled
    for others in [(3.0, table, 0), (2.0, table + 1, 0), (2.0, table, 1)]:
        run(chain(*others))


def test_a_replaced_value_is_what_follows_sees():
    fixed, batches = inputs(layers=2)

    def chain(fixed, x):
        return jax.lax.scan(lambda x, w: (x @ w["kernel"], None), x, fixed["stack"])[0]

    graph = trace(chain, fixed, batches[0])
    first, second = [op for op in graph.operations if op.name == "dot_general"]
    values = evaluation(graph, fixed, batches, [first.inputs[0], second.inputs[0], *graph.results])
    list(values.values(first.inputs[0]))
    other = jnp.eye(4) * 3
    values.replace(first.inputs[1], other)
    for value, batch in zip(values.values(second.inputs[0]), batches, strict=True):
        np.testing.assert_allclose(value, batch * 3, rtol=1e-6)
    values.restart()  # forgets the values, not the replacement
    kernel = fixed["stack"]["kernel"][1]
    for value, batch in zip(values.values(graph.results[0]), batches, strict=True):
        np.testing.assert_allclose(value, batch * 3 @ kernel, rtol=1e-5)


def test_what_nobody_waits_for_is_forgotten():
    fixed, batches = inputs(layers=4)
    graph = trace(layered, fixed, batches[0])
    products = [op for op in graph.operations if op.name == "dot_general"]
    wanted = [op.inputs[0] for op in products]
    values = evaluation(graph, fixed, batches, wanted)
    held = []
    for node in wanted:
        list(values.values(node))
        values.release(node)
        held.append(sum(x.size for x in values._batches[0].values()))
    assert max(held[:-1]) <= 2 * batches[0].size  # never more than a layer's inputs and results
    assert held[-1] == 0
