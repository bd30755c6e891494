"""Weights are found by following parameters to products, whoever wrote the model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qat.ptq.nnx_model import NnxModel
from qat.ptq.stream import Stream


def stream_of(function, parameters, batch):
    return Stream(function, parameters, [batch])


def found(function, parameters, batch):
    """(contracted axes, batch axes, matrices) by path, and reasons."""
    stream = stream_of(function, parameters, batch)
    weights = {stream.path(w): (w.contracted, w.batch, w.matrices_shape()) for w in stream.weights}
    return weights, stream.reasons


X = jnp.ones((5, 4))


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (lambda p, x: x @ p["w"], (4, 7), ((0,), (), (1, 4, 7))),
        (lambda p, x: x @ p["w"].T, (7, 4), ((1,), (), (1, 4, 7))),
        (
            lambda p, x: x @ p["w"].astype(jnp.bfloat16).reshape(4, 6),
            (4, 2, 3),
            ((0,), (), (1, 4, 6)),
        ),
        (lambda p, x: (p["w"].T @ x.T).T, (4, 7), ((0,), (), (1, 4, 7))),
        (
            lambda p, x: x.reshape(5, 2, 2).reshape(5, -1) @ p["w"].reshape(4, 7),
            (2, 2, 7),
            ((0, 1), (), (1, 4, 7)),
        ),
        (lambda p, x: jnp.einsum("tk,ekn->etn", x, p["w"]), (3, 4, 7), ((1,), (), (1, 4, 21))),
        (
            lambda p, x: jnp.einsum("etk,ekn->etn", jnp.stack([x] * 3), p["w"]),
            (3, 4, 7),
            ((1,), (0,), (3, 4, 7)),
        ),
        (lambda p, x: x[:, :1] @ p["w"], (1, 7), ((0,), (), (1, 1, 7))),
    ],
    ids=["plain", "transposed", "reshaped", "left", "two axes", "shared", "experts", "one input"],
)
def test_axes_are_followed_to_the_product(function, shape, expected):
    batch = X.astype(jnp.bfloat16) if shape == (4, 2, 3) else X
    weights, reasons = found(function, {"w": jnp.ones(shape)}, batch)
    assert weights == {"w": expected}
    assert not reasons


@pytest.mark.parametrize(
    ("function", "shape", "reason"),
    [
        (lambda p, x: x * p["w"][None], (4,), "used by mul"),
        (lambda p, x: x @ (p["w"] ** 2), (4, 7), "used by integer_pow"),
        (lambda p, x: x, (4, 7), "not used"),
        (lambda p, x: p["w"][jnp.argmax(x, 1)] @ p["w"].T, (4, 7), "also used by gather"),
        (lambda p, x: x @ p["w"] @ p["w"].T, (4, 7), "its products contract other axes"),
        (
            lambda p, x: jax.lax.scan(lambda c, t: (c @ p["w"] + t, c), x[0], x)[0],
            (4, 4),
            "used in a scan of the program",
        ),
    ],
    ids=["scale", "changed", "unused", "tied", "both ways", "recurrent"],
)
def test_what_is_no_weight_says_why(function, shape, reason):
    weights, reasons = found(function, {"w": jnp.ones(shape)}, X)
    assert not weights
    assert reasons["w"].startswith(reason)


def test_matrices_go_back_to_where_they_came_from():
    def function(p, x):
        return jnp.einsum("etk,nke->etn", jnp.stack([x] * 3), p["w"])

    value = jax.random.normal(jax.random.key(0), (7, 4, 3))
    stream = stream_of(function, {"w": value}, X)
    assert stream.reasons == {"w": "its batch axes do not lead"}

    def layered(p, x):
        return jax.lax.scan(lambda x, w: (x @ w.T, None), x, p["w"])[0]

    value = jax.random.normal(jax.random.key(0), (3, 4, 4))
    stream = stream_of(layered, {"w": value}, X)
    assert [w.index for w in stream.weights] == [(0,), (1,), (2,)]
    for i, weight in enumerate(stream.weights):
        matrices = weight.matrices(value)
        np.testing.assert_array_equal(matrices[0], value[i].T)
        np.testing.assert_array_equal(weight.parameter_slice(matrices), value[i])
        (use,) = weight.uses
        np.testing.assert_array_equal(weight.operand(use, matrices), value[i].T)


def test_layers_of_flax_declare_what_is_found():
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.first = nnx.LinearGeneral((2, 2), (3, 4), axis=(-2, -1), rngs=rngs)
            self.second = nnx.Linear(12, 5, rngs=rngs)

        def __call__(self, x):
            return self.second(self.first(x.reshape(-1, 2, 2)).reshape(-1, 12))

    model = NnxModel(Model(), lambda model, batch: model(batch))
    stream = stream_of(model.function(), model.parameters, X)
    for weight in stream.weights:
        declared = model.declared(stream.path(weight))
        assert declared.contracted == weight.contracted
        assert declared.matrices_shape() == weight.matrices_shape()
    assert len(stream.weights) == 2


def test_linen_scans_are_stacks_too():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(4)(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return scanned()(x, None)[0]

    model = Model()
    variables = model.init(jax.random.key(0), X)
    kernel = variables["params"]["ScanBlock_0"]["Dense_0"]["kernel"]
    stream = stream_of(
        lambda p, x: model.apply({"params": {"ScanBlock_0": {"Dense_0": p}}}, x),
        {"kernel": kernel, "bias": jnp.zeros((3, 4))},
        X,
    )
    assert [w.index for w in stream.weights] == [(0,), (1,), (2,)]
    assert stream.reasons.keys() == {"bias"}
