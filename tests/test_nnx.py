"""Flax NNX layers under a policy, and policies that change without a recompilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat.nnx
from qat.policy import Policy, Rules
from qat.quantization import fake_quant
from qat.quantizer import Quantizer

W4A8 = Policy.parse("w4a8")


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=1)
def int4_per(array, axis):
    return fake_quant(array, Quantizer("int4", "channel"), axis)


@jax.jit
def int8_of_all(array):
    return fake_quant(array, Quantizer("int8"), axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _run(graph, state, x, method):
    return getattr(nnx.merge(graph, state), method)(x)


def run(model, x, method="__call__"):
    """A method of a model, compiled once for each structure."""
    return _run(*nnx.split(model), x, method)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


class Mlp(nnx.Module):
    """Two quantized layers, a quantized cache, and one layer without a policy."""

    def __init__(self, policy, rngs):
        self.up = qat.nnx.Linear(4, 8, policy=policy, rngs=rngs)
        self.cache = qat.nnx.FakeQuant(policy)
        self.down = qat.nnx.Linear(8, 3, policy=policy, rngs=rngs)
        self.plain = qat.nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.plain(self.down(self.cache(self.up(x))))


def test_linear_multiplies_quantized_operands():
    layer, x = qat.nnx.Linear(4, 3, policy=W4A8, rngs=nnx.Rngs(0)), normal(2, 5, 4)
    layer.bias[...] = normal(3)
    expected = int8_of_all(x) @ int4_per(layer.kernel[...], 0) + normal(1, 1, 3)
    assert_close(run(layer, x), expected)


def test_linear_general_has_one_scale_for_each_output():
    layer = qat.nnx.LinearGeneral(
        (2, 4), (3, 5), axis=(-2, -1), use_bias=False, policy=W4A8, rngs=nnx.Rngs(0)
    )
    x = normal(6, 2, 4)
    kernel = int4_per(layer.kernel[...], (0, 1))
    assert_close(run(layer, x), jnp.einsum("bij,ijkl->bkl", int8_of_all(x), kernel))


def test_embed_has_one_scale_for_each_row():
    layer = qat.nnx.Embed(7, 4, policy=W4A8, rngs=nnx.Rngs(0))
    table = int4_per(layer.embedding[...], 1)
    ids = jnp.asarray([[0, 6], [3, 3]])
    np.testing.assert_array_equal(run(layer, ids), table[ids])
    x = normal(2, 5, 4)
    assert_close(run(layer, x, "attend"), int8_of_all(x) @ table.T)


def test_fake_quant_has_one_scale_for_each_token_and_head():
    layer, x = qat.nnx.FakeQuant(Policy.parse("kv4")), normal(2, 3, 2, 4)
    expected = jax.jit(lambda x: fake_quant(x, Quantizer("int4", "token"), -1))(x)
    np.testing.assert_array_equal(run(layer, x), expected)


@pytest.mark.parametrize("policy", [None, Policy()])
def test_layers_without_quantizers_are_flax_layers(policy):
    ours = qat.nnx.Linear(4, 3, policy=policy, rngs=nnx.Rngs(0))
    assert_close(ours(normal(2, 4)), nnx.Linear(4, 3, rngs=nnx.Rngs(0))(normal(2, 4)))
    ours = qat.nnx.LinearGeneral(4, (3, 2), policy=policy, rngs=nnx.Rngs(0))
    flax = nnx.LinearGeneral(4, (3, 2), rngs=nnx.Rngs(0))
    assert_close(ours(normal(2, 4)), flax(normal(2, 4)))
    ours = qat.nnx.Embed(7, 4, policy=policy, rngs=nnx.Rngs(0))
    flax = nnx.Embed(7, 4, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(ours(jnp.arange(7)), flax(jnp.arange(7)))
    assert_close(ours.attend(normal(2, 4)), flax.attend(normal(2, 4)))


def test_layers_compute_in_their_dtype():
    layer = qat.nnx.Linear(4, 3, dtype=jnp.bfloat16, policy=W4A8, rngs=nnx.Rngs(0))
    assert run(layer, normal(2, 4)).dtype == jnp.bfloat16
    assert layer.kernel.dtype == jnp.float32
    embed = qat.nnx.Embed(7, 4, dtype=jnp.bfloat16, policy=W4A8, rngs=nnx.Rngs(0))
    assert run(embed, jnp.arange(7)).dtype == jnp.bfloat16
    assert run(embed, normal(2, 4), "attend").dtype == jnp.bfloat16


def test_gradients_pass_straight_through_to_the_weights():
    layer, x = qat.nnx.Linear(4, 3, use_bias=False, policy=W4A8, rngs=nnx.Rngs(0)), normal(2, 4)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    loss = jax.jit(lambda params: nnx.merge(graph, params, rest)(x).sum())
    gradient = jax.grad(loss)(params)
    assert_close(gradient["kernel"].get_value(), int8_of_all(x).T @ jnp.ones((2, 3)))


def test_the_numbers_of_a_policy_are_state_apart_from_the_parameters():
    model = Mlp(W4A8, nnx.Rngs(0))
    _, params, policies, rest = nnx.split(model, nnx.Param, qat.nnx.PolicyState, ...)
    assert len(jax.tree.leaves(params)) == 6
    assert [leaf.shape for leaf in jax.tree.leaves(policies)] == [(6,)] * 5
    assert not jax.tree.leaves(rest)


def test_set_policy_puts_other_numbers_into_the_same_program():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def counted(graph, state, x):
        traces.append(None)
        return nnx.merge(graph, state)(x)

    model, x = Mlp(Policy.parse("none"), nnx.Rngs(0)), normal(2, 4)
    outputs = []
    for text in ("none", "w4", "w4a8kv4", "we4m3ae5m2"):
        qat.nnx.set_policy(model, Policy.parse(text))
        outputs.append(counted(*nnx.split(model), x))
        built = Mlp(Policy.parse(text), nnx.Rngs(0))
        np.testing.assert_array_equal(outputs[-1], counted(*nnx.split(built), x))
    assert len(traces) == 1
    assert len({np.asarray(output).tobytes() for output in outputs}) == 4


@pytest.mark.parametrize("policy", [None, W4A8])
def test_equal_layers_have_equal_graphs(policy):
    """Otherwise a program compiled for one model would be compiled again for the next."""
    first, second = (qat.nnx.Linear(4, 3, policy=policy, rngs=nnx.Rngs(0)) for _ in range(2))
    assert nnx.graphdef(first) == nnx.graphdef(second)


def test_rules_set_each_layer_apart():
    model, x = Mlp(W4A8, nnx.Rngs(0)), normal(2, 4)
    rules = [("up", W4A8), ("cache", Policy.parse("kv2")), ("down", Policy.parse("none"))]
    qat.nnx.set_policy(model, Rules(rules))
    hidden = int8_of_all(x) @ int4_per(model.up.kernel[...], 0)
    hidden = jax.jit(lambda x: fake_quant(x, Quantizer("int2", "token"), -1))(hidden)
    assert_close(run(model, x), hidden @ model.down.kernel[...] @ model.plain.kernel[...])


def test_stacked_layers_take_one_policy():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return qat.nnx.Linear(4, 4, policy=W4A8, rngs=rngs)

    layers = stack(nnx.Rngs(0))
    qat.nnx.set_policy(layers, Policy.parse("w2a3"))
    numbers = layers.dot_general.policy.get_value().weights.grid.numbers
    assert numbers.shape == (3, 6)
    np.testing.assert_array_equal(numbers[:, 3], 1)  # the largest value of int2


def test_a_policy_of_another_structure_is_an_error_and_changes_nothing():
    model = Mlp(W4A8, nnx.Rngs(0))
    before = run(model, normal(2, 4))
    per_token = Policy(
        weights=Quantizer("int2", "channel"),
        activations=Quantizer("int2", "token"),
        kv_cache=Quantizer("int2", "token"),
    )
    expected = "'down' .*activations tensor.*activations token"
    with pytest.raises(ValueError, match=expected):
        qat.nnx.set_policy(model, Rules([("down", per_token), (".*", Policy.parse("w2a2kv2"))]))
    np.testing.assert_array_equal(run(model, normal(2, 4)), before)


@pytest.mark.parametrize(
    ("built", "new"),
    [
        (Policy.parse("w4"), Policy(weights=Quantizer("int4", "channel"))),
        (Policy(weights=Quantizer("int4", "channel")), Policy.parse("w4a8")),
        (Policy.parse("w4"), None),
    ],
    ids=["fewer", "more", "none"],
)
def test_other_operands_are_an_error(built, new):
    layer = qat.nnx.Linear(4, 3, policy=built, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"compiled for .*weights channel"):
        qat.nnx.set_policy(layer, Rules([(".*", new)]))


def test_a_layer_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no rule matches the layer 'cache'"):
        qat.nnx.set_policy(Mlp(W4A8, nnx.Rngs(0)), Rules([("up|down", W4A8)]))


def test_a_model_without_quantized_layers_is_an_error():
    with pytest.raises(ValueError, match="no quantized layer"):
        qat.nnx.set_policy(qat.nnx.Linear(4, 3, rngs=nnx.Rngs(0)), W4A8)
