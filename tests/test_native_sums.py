"""Native sums longer than int32 can hold: whole numbers, so that the expected sums are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.contractions import find_contractions
from qat.dot_general import dot_general
from qat.native import Coded, native_product
from qat.policy import Policy

LENGTH = 140_001  # int8 overflows from 133,145 on


def native(weights, activations, **operands):
    return Policy(weights, activations, mode="native", **operands)


@pytest.mark.parametrize("spelling", ["int8", "uint7", "e4m3"])
def test_a_long_sum_does_not_overflow(spelling):
    dot = dot_general(native(spelling, spelling))
    product = dot(jnp.ones((1, LENGTH)), jnp.ones((LENGTH, 1)), (((1,), (0,)), ((), ())))
    assert float(product[0, 0]) == pytest.approx(LENGTH, rel=1e-4)


def test_parts_are_those_of_the_sum():
    random = np.random.default_rng(0)
    lhs, rhs = (random.integers(-128, 128, shape) for shape in ((3, 700, 401), (401, 2, 700)))
    lhs[0], rhs[:, 0] = -128, -128  # the largest sum there is
    numbers = (((1, 2), (2, 0)), ((), ()))

    def coded(values):
        scale = jnp.ones((1,) * values.ndim)
        return Coded(jnp.asarray(values, jnp.float32), scale, jnp.int8, 128.0)

    product = jax.jit(lambda a, b: native_product(coded(a), coded(b), numbers))(lhs, rhs)
    exact = np.einsum("abc,cda->bd", np.moveaxis(lhs, 0, 1), rhs)
    np.testing.assert_allclose(product, exact, rtol=2e-7, atol=64)
    assert float(product[0, 0]) == 700 * 401 * 128**2


@pytest.mark.parametrize(("length", "products"), [(133_144, 1), (133_145, 2), (2**19, 4)])
def test_a_sum_is_split_where_it_must_be(length, products):
    dot = dot_general(native("int8", "int8"))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, length), (length, 1))]
    found = find_contractions(lambda a, b: dot(a, b, (((1,), (0,)), ((), ()))), *shapes)
    assert len(found) == products


def test_the_gradient_of_a_large_batch_is_that_of_fake_mode():
    x_BTD, w_DF = jnp.ones((400, 500, 2)), jnp.ones((2, 2))

    def gradient(mode):
        dot = dot_general(Policy("int8/channel", "int8", gradients="int8", mode=mode))
        product = lambda w_DF: dot(x_BTD, w_DF, (((2,), (0,)), ((), ()))).sum()  # noqa: E731
        return jax.jit(jax.grad(product))(w_DF)

    np.testing.assert_allclose(gradient("native"), gradient("fake"), rtol=1e-5)
