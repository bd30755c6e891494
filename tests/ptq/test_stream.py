"""Calibration streams: statistics of each layer, on inputs from the changed layers before it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.ptq.stream import Stream, batches_of


def mlp(parameters, x):
    hidden = jax.nn.relu(x @ parameters["a"])
    return jax.nn.relu(hidden @ parameters["b"]) @ parameters["c"]


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"a": (6, 8), "b": (8, 8), "c": (8, 3)}
    parameters = {
        n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=False)
    }
    batches = list(jax.random.normal(keys[3], (3, 20, 6)))
    return parameters, batches


def test_each_layer_sees_inputs_from_changed_layers_before_it(problem):
    parameters, batches = problem
    stream, seen = Stream(mlp, parameters, batches), {}

    def visit(weight, matrices_EKN, statistics):
        seen[stream.path(weight)] = statistics
        return jnp.round(matrices_EKN)

    stream.run(visit, stream.weights)
    assert list(seen) == ["a", "b", "c"]
    x = np.concatenate(batches).astype(np.float64)
    for name, statistics in seen.items():
        np.testing.assert_allclose(statistics.second_moment_KK[0], x.T @ x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(statistics.absmax_K[0], np.abs(x).max(0), rtol=1e-5)
        np.testing.assert_allclose(statistics.abssum_K[0], np.abs(x).sum(0), rtol=1e-5)
        assert statistics.tokens[0] == 60
        x = np.maximum(x @ np.round(np.asarray(parameters[name], np.float64)), 0)


def test_layers_that_are_left_alone_are_passed_through(problem):
    parameters, batches = problem
    stream, seen = Stream(mlp, parameters, batches), []

    def visit(weight, matrices_EKN, statistics):
        seen.append(float(jnp.trace(statistics.second_moment_KK[0])))

    stream.run(visit, [weight for weight in stream.weights if stream.path(weight) == "c"])
    x = np.concatenate(batches).astype(np.float64)
    for name in "ab":
        x = np.maximum(x @ np.asarray(parameters[name], np.float64), 0)
    np.testing.assert_allclose(seen, [np.square(x).sum()], rtol=1e-4)


def test_a_weight_that_is_used_twice_sees_both_inputs():
    def twice(parameters, x):
        return (jax.nn.relu(x @ parameters["w"]) @ parameters["w"]) @ parameters["v"]

    keys = jax.random.split(jax.random.key(1), 3)
    parameters = {
        name: jax.random.normal(key, (4, 4)) for name, key in zip("vw", keys, strict=False)
    }
    batches = list(jax.random.normal(keys[2], (2, 10, 4)))
    stream, seen = Stream(twice, parameters, batches), {}

    def visit(weight, matrices_EKN, statistics):
        seen[stream.path(weight)] = np.asarray(statistics.second_moment_KK[0])
        return jnp.round(matrices_EKN)

    stream.run(visit, stream.weights)
    x, w = np.concatenate(batches).astype(np.float64), np.asarray(parameters["w"], np.float64)
    hidden = np.maximum(x @ w, 0)
    np.testing.assert_allclose(seen["w"], x.T @ x + hidden.T @ hidden, rtol=1e-4, atol=1e-4)
    after = np.maximum(x @ np.round(w), 0) @ np.round(w)
    np.testing.assert_allclose(seen["v"], after.T @ after, rtol=1e-4, atol=1e-3)


def test_experts_have_statistics_of_their_own():
    def experts(parameters, x):
        return jnp.einsum("etk,ekn->etn", x.reshape(3, 5, 4), parameters["w"])

    x = jax.random.normal(jax.random.key(2), (15, 4))
    stream = Stream(experts, {"w": jnp.ones((3, 4, 2))}, [x])
    moments = []
    stream.run(lambda w, m, s: moments.append(s.second_moment_KK), stream.weights)
    routed = np.asarray(x, np.float64).reshape(3, 5, 4)
    np.testing.assert_allclose(moments[0], np.einsum("etk,etl->ekl", routed, routed), rtol=1e-4)


def test_batches_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"calibration batch 1 has shape \(3, 2\).*one shape"):
        list(batches_of([np.zeros((4, 2)), np.zeros((3, 2))]))
