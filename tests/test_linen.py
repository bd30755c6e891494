"""Flax Linen layers under a policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qat.linen
import qat.nnx
from qat.linen import quantize_model
from qat.policy import Policy
from tests.linen_checks import (
    KEY,
    LAYERS,
    W4A8,
    Stack,
    apply,
    assert_close,
    assert_equal,
    init,
    layer_input,
    lines,
    normal,
    of_flax,
    of_ours,
    policy_of,
    quantized,
    variables_of,
)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_a_policy_are_flax_layers(name):
    x = layer_input(name)
    ours, flax = (
        jax.make_jaxpr(lambda key, module=module: module.init_with_output(key, x))(KEY)
        for module in (of_ours(name, None), of_flax(name))
    )
    assert str(ours) == str(flax)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_the_parameters_of_flax_layers(name):
    x = layer_input(name)
    shapes = [
        jax.eval_shape(lambda m=m: m.init(KEY, x)) for m in (of_ours(name, W4A8), of_flax(name))
    ]
    assert shapes[0] == shapes[1]


def test_layers_start_as_flax_layers():
    x = layer_input("Dense")
    assert_equal(init(of_ours("Dense", W4A8), x), init(of_flax("Dense"), x))


def test_converted_layers_are_ours():
    @jax.jit
    def everything():
        results = []
        for name in LAYERS:
            x, flax, ours = layer_input(name), of_flax(name), of_ours(name, W4A8)
            converted = [quantize_model(layer, W4A8)[0] for layer in (flax, of_ours(name, None))]
            variables = variables_of(flax, x)
            results.append([module.apply(variables, x) for module in (ours, *converted)])
        return results

    for ours, converted, converted_later in everything():
        assert_equal(converted, ours)
        assert_equal(converted_later, ours)


def test_dense_multiplies_quantized_operands():
    x, layer = layer_input("Dense"), of_ours("Dense", W4A8)
    variables = variables_of(layer, x)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    expected = quantized(x, "int8", -1) @ quantized(kernel, "int4/channel", 0) + bias[None, None]
    assert_close(apply(layer, variables, x), expected)


def test_dense_general_has_one_scale_for_each_output():
    x, layer = layer_input("DenseGeneral"), of_ours("DenseGeneral", W4A8)
    variables = variables_of(layer, x)
    kernel = quantized(variables["params"]["kernel"], "int4/channel", (0, 1))
    expected = jnp.einsum("bij,ijkl->bkl", quantized(x, "int8", -1), kernel)
    assert_close(apply(layer, variables, x), expected + variables["params"]["bias"][None])


def test_einsum_has_one_scale_for_each_output():
    x, layer = layer_input("Einsum"), of_ours("Einsum", W4A8)
    variables = variables_of(layer, x)
    kernel = quantized(variables["params"]["kernel"], "int4/channel", 0)
    expected = jnp.einsum("bd,dhk->bhk", quantized(x, "int8", -1), kernel)
    assert_close(apply(layer, variables, x), expected + variables["params"]["bias"][None])


def test_einsum_takes_its_equation_at_the_call_and_refuses_what_flax_refuses():
    layer, x = qat.linen.Einsum((4, 3), policy=W4A8, use_bias=False), normal(2, 4)
    variables = {"params": {"kernel": normal(4, 3)}}
    expected = quantized(x, "int8", -1) @ quantized(normal(4, 3), "int4/channel", 0)
    assert_close(jax.jit(lambda x: layer.apply(variables, x, "ab, bc -> ac"))(x), expected)
    with pytest.raises(ValueError, match="explicit"):
        layer.apply(variables, x, "ab,bc")


def test_conv_has_one_scale_for_each_output_feature():
    x, layer = layer_input("Conv"), of_ours("Conv", W4A8)
    variables = variables_of(layer, x)
    kernel = quantized(variables["params"]["kernel"], "int4/channel", (0, 1, 2))
    plain = {"params": {**variables["params"], "kernel": kernel}}
    expected = apply(of_flax("Conv"), plain, quantized(x, "int8", -1))
    assert_close(apply(layer, variables, x), expected)


def test_embed_has_one_scale_for_each_row():
    ids, layer = layer_input("Embed"), of_ours("Embed", W4A8)
    variables = variables_of(layer, ids)
    table = quantized(variables["params"]["embedding"], "int4/channel", 1)
    np.testing.assert_array_equal(apply(layer, variables, ids), table[ids])
    x = normal(2, 5, 4)
    scores = apply(layer, variables, x, method="attend")
    assert_close(scores, quantized(x, "int8", -1) @ table.T)
    with pytest.raises(ValueError, match="integer"):
        jax.eval_shape(lambda: layer.apply(variables, x))


def test_linen_and_nnx_give_the_same_bits():
    rngs, x, policy = nnx.Rngs(0), normal(2, 6, 4), Policy.parse("w4a8q8kv4p6")
    pairs = [
        (nn.Dense(3), nnx.Linear(4, 3, rngs=rngs)),
        (nn.DenseGeneral(3, (1, 2)), nnx.LinearGeneral((6, 4), 3, axis=(1, 2), rngs=rngs)),
        (nn.Einsum((4, 2), "bti,ij->btj"), nnx.Einsum("bti,ij->btj", (4, 2), (2,), rngs=rngs)),
        (nn.Conv(3, (3,)), nnx.Conv(4, 3, (3,), rngs=rngs)),
        (
            nn.MultiHeadDotProductAttention(2),
            nnx.MultiHeadAttention(2, 4, 4, decode=False, rngs=rngs),
        ),
    ]
    linen = [quantize_model(module, policy)[0] for module, _ in pairs]
    graphs, states = zip(
        *(nnx.split(qat.nnx.quantize_model(model, policy)[0]) for _, model in pairs), strict=True
    )
    params = [nnx.to_pure_dict(nnx.state(model, nnx.Param)) for _, model in pairs]

    @jax.jit
    def everything(params, states):
        ours = [m.apply({"params": p}, x) for m, p in zip(linen, params, strict=True)]
        return ours, [nnx.merge(*parts)(x) for parts in zip(graphs, states, strict=True)]

    for ours, theirs in zip(*everything(params, states), strict=True):
        assert_equal(ours, theirs)


def test_layers_compute_in_their_dtype():
    x = normal(2, 4)
    layer = qat.linen.Dense(3, dtype=jnp.bfloat16, policy=W4A8)
    variables = variables_of(layer, x)
    assert variables["params"]["kernel"].dtype == jnp.float32
    assert apply(layer, variables, x).dtype == jnp.bfloat16
    embed = qat.linen.Embed(7, 4, dtype=jnp.bfloat16, policy=W4A8)
    variables = variables_of(embed, jnp.arange(7))
    assert apply(embed, variables, jnp.arange(7)).dtype == jnp.bfloat16
    assert apply(embed, variables, x, method="attend").dtype == jnp.bfloat16


def test_gradients_pass_straight_through_to_the_weights():
    layer, x = qat.linen.Dense(3, use_bias=False, policy=W4A8), normal(2, 4)
    gradient = jax.jit(jax.grad(lambda variables: layer.apply(variables, x).sum()))(
        variables_of(layer, x)
    )
    assert_close(gradient["params"]["kernel"], quantized(x, "int8", -1).T @ jnp.ones((2, 3)))


def test_a_policy_and_a_dot_general_are_one_too_many():
    layer = qat.linen.Dense(3, policy=W4A8, dot_general=jax.lax.dot_general)
    with pytest.raises(ValueError, match="Dense with a policy: it has a dot_general of its own"):
        layer.init(KEY, normal(2, 4))


def test_a_layer_is_seen_once_by_those_who_watch_modules():
    x, ours, flax = layer_input("Dense"), of_ours("Dense", W4A8), of_flax("Dense")
    variables = variables_of(flax, x)
    watched = [
        jax.eval_shape(lambda m=module: m.apply(variables, x, capture_intermediates=True)[1])
        for module in (flax, ours, quantize_model(flax, W4A8)[0])
    ]
    assert jax.tree.structure(watched[0]) == jax.tree.structure(watched[1])
    assert jax.tree.structure(watched[0]) == jax.tree.structure(watched[2])


def test_one_program_serves_all_formats():
    x, traces = normal(2, 4), []
    variables = variables_of(Stack(), x)

    @jax.jit
    def step(policy):
        traces.append(None)
        converted, _ = quantize_model(Stack(), [("blocks/.*", policy)])
        return [
            jax.value_and_grad(lambda v, m=module: m.apply(v, x).sum())(variables)
            for module in (Stack(policy), converted)
        ]

    policies = [Policy.parse(text).traced() for text in ("w4a8", "none", "we4m3ae5m2", "w2")]
    alone = [step(policy) for policy in policies]
    for ours, converted in alone:
        assert_equal(converted, ours)
    assert len({float(ours[0]) for ours, _ in alone}) == 4
    assert len(traces) == 1

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *policies)
    (losses, _), _ = jax.vmap(step)(stacked)
    assert_close(losses, jnp.stack([ours[0] for ours, _ in alone]))


def test_native_mode_runs_dense_layers():
    policy = policy_of(weights="int8/channel", activations="int8/token")
    native = dataclasses.replace(policy, mode="native")
    x = normal(2, 4)
    converted, report = quantize_model(nn.Dense(3), native, x)
    assert lines(report) == [("", "weights int8/channel, activations int8/token, native")]
    variables = variables_of(nn.Dense(3), x)
    fake = qat.linen.Dense(3, policy=policy)
    assert_close(apply(converted, variables, x), apply(fake, variables, x))
