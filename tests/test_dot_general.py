"""The quantized contraction against `jax.lax.dot_general` and closed forms in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from qat.dot_general import dot_general
from qat.policy import Policy
from qat.quantization import fake_quant
from qat.quantizer import Quantizer

W4A8 = Policy.parse("w4a8")
DENSE = (((1,), (0,)), ((), ()))
CONTRACTIONS = {  # name: shapes of both sides, dimension numbers, einsum
    "tokens": ((2, 3, 4), (4, 5), (((2,), (0,)), ((), ())), "btd,df->btf"),
    "merge": ((2, 3, 2, 4), (2, 4, 5), (((2, 3), (0, 1)), ((), ())), "btkc,kcd->btd"),
    "swapped": ((2, 3, 4), (4, 3, 5), (((1, 2), (1, 0)), ((), ())), "bij,jik->bk"),
    "table": ((2, 3, 4), (7, 4), (((2,), (1,)), ((), ())), "btd,vd->btv"),
    "batched": ((2, 3, 4), (2, 4, 5), (((2,), (1,)), ((0,), (0,))), "bij,bjk->bik"),
    "outer": ((3,), (2,), (((), ()), ((), ())), "i,j->ij"),
}


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


@functools.partial(jax.jit, static_argnames="dimension_numbers")
def quantized_by_hand(x, w, dimension_numbers):
    """Both operands after W4A8."""
    (x_axes, w_axes), _ = dimension_numbers
    x = fake_quant(x, Quantizer("int8", "tensor"), axis=x_axes)
    return x, fake_quant(w, Quantizer("int4", "channel"), axis=w_axes)


@functools.partial(jax.jit, static_argnames="dimension_numbers")
def products(policy, x, w, dimension_numbers):
    """Products without and with a policy, the gradients, and the factors they are made of."""
    unquantized = dot_general(None)(x, w, dimension_numbers)
    expected = jax.lax.dot_general(x, w, dimension_numbers)
    product, pullback = jax.vjp(lambda x, w: dot_general(policy)(x, w, dimension_numbers), x, w)
    g = jnp.sin(1 + jnp.arange(product.size, dtype=product.dtype)).reshape(product.shape)
    by_hand = quantized_by_hand(x, w, dimension_numbers)
    return unquantized, expected, product, pullback(g), (*by_hand, g)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "dimension_numbers", "einsum"), CONTRACTIONS.values(), ids=CONTRACTIONS
)
def test_contractions_and_their_gradients(x_shape, w_shape, dimension_numbers, einsum):
    """dx = g · quantized w, dw = quantized x · g; without a policy, `jax.lax.dot_general`."""
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    unquantized, expected, product, (dx, dw), xwg = products(
        W4A8.traced(), normal(*x_shape), normal(*w_shape), dimension_numbers
    )
    close(unquantized, expected)

    x, w, g = (np.asarray(a, np.float64) for a in xwg)
    inputs, out = einsum.split("->")
    x_dims, w_dims = inputs.split(",")
    close(product, np.einsum(f"{inputs}->{out}", x, w))
    close(dx, np.einsum(f"{out},{w_dims}->{x_dims}", g, w))
    close(dw, np.einsum(f"{out},{x_dims}->{w_dims}", g, x))


@pytest.mark.parametrize("field", ["weights", "activations"])
def test_an_operand_left_out_is_not_touched(field):
    x, w = normal(6, 4), normal(4, 3)
    policy = dataclasses.replace(W4A8, **{field: None})
    x_quantized, w_quantized = quantized_by_hand(x, w, DENSE)
    expected = x_quantized @ w if field == "weights" else x @ w_quantized
    actual = jax.jit(dot_general(policy), static_argnums=2)(x, w, DENSE)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_bfloat16_and_may_accumulate_wider():
    x, w = normal(6, 4, dtype=jnp.bfloat16), normal(4, 3, dtype=jnp.bfloat16)
    x_quantized, w_quantized = quantized_by_hand(x, w, DENSE)
    expected = np.asarray(x_quantized, np.float64) @ np.asarray(w_quantized, np.float64)
    contract = jax.jit(dot_general(W4A8), static_argnums=(2, 3, 4))
    narrow, wide = contract(x, w, DENSE), contract(x, w, DENSE, None, jnp.float32)
    assert (narrow.dtype, wide.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(narrow.astype(jnp.float32), expected, rtol=0.02, atol=0.02)
    np.testing.assert_allclose(wide, expected, rtol=1e-5, atol=1e-5)


def test_a_traced_policy_is_an_argument_of_a_compiled_program():
    x, w = normal(6, 4), normal(4, 3)
    compiled = jax.jit(lambda policy, x, w: dot_general(policy)(x, w, DENSE))
    products = [compiled(Policy.parse(text).traced(), x, w) for text in ("none", "w4a8", "we2m1")]
    np.testing.assert_allclose(products[0], x @ w, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_less(1e-3, np.abs(products[1] - products[0]).max())
    np.testing.assert_array_less(1e-3, np.abs(products[2] - products[1]).max())
    assert compiled._cache_size() == 1


def test_out_sharding_places_the_product():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    x, w = jnp.ones((8, 4)), jnp.ones((4, 16))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, PartitionSpec("x"))
        product = jax.jit(
            lambda x, w: dot_general(W4A8)(x, w, DENSE, out_sharding=PartitionSpec(None, "x"))
        )(x, w)
    assert product.sharding.spec == PartitionSpec(None, "x")
    np.testing.assert_allclose(product, 4, rtol=1e-5)


@pytest.mark.usefixtures("unchecked_annotations")
def test_a_wrong_operand_is_an_error():
    with pytest.raises(ValueError, match="int32"):
        dot_general(W4A8)(jnp.ones((2, 3), jnp.int32), jnp.ones((3, 4)), DENSE)


def test_operands_that_do_not_fit_fail_as_they_do_in_lax():
    lhs, rhs = jnp.ones((2, 3, 6)), jnp.ones((8, 4))
    numbers = (((2,), (0,)), ((), ()))
    with pytest.raises(TypeError) as expected:
        jax.lax.dot_general(lhs, rhs, numbers)
    with pytest.raises(TypeError) as found:
        dot_general(None)(lhs, rhs, numbers)
    assert str(found.value) == str(expected.value)
