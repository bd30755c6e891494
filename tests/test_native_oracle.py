"""Low-precision execution against fake quantization and against exact integers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.dot_general import dot_general
from qat.einsum import einsum
from qat.policy import Policy
from qat.quantizer import Quantizer
from tests import numpy_oracle as oracle
from tests.numpy_oracle import Spec

DENSE = (((1,), (0,)), ((), ()))
PAIRS = [  # weights, activations
    ("int8", "int8"),
    ("int3", "int8"),
    ("int8full", "int4full"),
    ("e4m3", "e4m3"),
    ("e2m1", "e5m2"),
]
CONTRACTIONS = {
    "merge": ((2, 3, 2, 8), (2, 8, 5), "btkc,kcd->btd"),
    "table": ((2, 3, 8), (7, 8), "btd,vd->btv"),
    "attention": ((2, 5, 3, 8), (2, 4, 3, 8), "bthd,bshd->bhts"),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def policies(weights, activations, granularities=("channel", "token"), **options):
    """The same policy, native and fake."""
    native = Policy(
        weights=Quantizer(weights, granularities[0], **options),
        activations=Quantizer(activations, granularities[1], **options),
        mode="native",
    )
    return native, dataclasses.replace(native, mode="fake")


@pytest.mark.parametrize(("weights", "activations"), PAIRS)
def test_native_agrees_with_fake_and_with_exact_products(weights, activations):
    """Codes of small integers multiply exactly, so that only the scales' product is rounded."""
    x, w = normal(8, 64), normal(64, 16, seed=1)

    @jax.jit
    def both(x, w):
        return [dot_general(policy)(x, w, DENSE) for policy in policies(weights, activations)]

    native, fake = both(x, w)
    np.testing.assert_allclose(native, fake, rtol=2e-5, atol=2e-5)
    xq = oracle.quantize(x, Spec(activations, "token"), 1)
    wq = oracle.quantize(w, Spec(weights, "channel"), 0)
    values = oracle.values_of(activations), oracle.values_of(weights)
    codes = [decoded(q.codes, fmt) for q, fmt in zip((xq, wq), values, strict=True)]
    exact = (codes[0] @ codes[1]) * xq.scale * wq.scale
    np.testing.assert_allclose(native, exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize("estimator", ["identity", "clipped"])
def test_gradients_of_native_execution_are_those_of_fake(estimator):
    """Its own gradients quantized too."""
    x, w, g = normal(8, 64), normal(64, 16, seed=1), normal(8, 16, seed=2)
    options = {"scale": "fixed", "value": 1.5, "gradient": estimator}
    policy_pair = [
        dataclasses.replace(policy, gradients=Quantizer("e5m2", "token"))
        for policy in policies("int4", "int8", **options)
    ]

    @jax.jit
    def gradients(x, w, g):
        dots = [functools.partial(dot_general(p), dimension_numbers=DENSE) for p in policy_pair]
        return [jax.vjp(dot, x, w)[1](g) for dot in dots]

    for ours, theirs in zip(*gradients(x, w, g), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def decoded(codes, fmt):
    return fmt.values[np.searchsorted(fmt.codes, codes)]


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "subscripts"), CONTRACTIONS.values(), ids=CONTRACTIONS
)
def test_native_contractions_of_any_shape(x_shape, w_shape, subscripts):
    x, w = normal(*x_shape), normal(*w_shape, seed=1)
    native, fake = (
        jax.jit(functools.partial(einsum(policy), subscripts))(x, w)
        for policy in policies("int8", "int4")
    )
    np.testing.assert_allclose(native, fake, rtol=1e-5, atol=1e-5)


def test_native_with_scales_for_tensors():
    x, w = normal(4, 3, 16), normal(16, 8, seed=1)
    native, fake = (
        jax.jit(functools.partial(einsum(policy), "btd,df->btf"))(x, w)
        for policy in policies("int8", "int8", ("channel", "tensor"))
    )
    np.testing.assert_allclose(native, fake, rtol=1e-5, atol=1e-5)


def test_native_products_are_low_precision_in_the_program():
    """An int8 product with an int32 accumulator, and not a product of converted floats."""
    x, w = jnp.asarray(normal(8, 64)), jnp.asarray(normal(64, 16))
    for pair, element, accumulator in (
        (("int8", "int8"), "i8", "i32"),
        (("e4m3", "e5m2"), "f8", "f32"),
    ):
        dot = functools.partial(dot_general(policies(*pair)[0]), dimension_numbers=DENSE)
        (product,) = [
            line
            for line in jax.jit(dot).lower(x, w).as_text().splitlines()
            if "dot_general" in line
        ]
        operands, result = product.split(":")[-1].split("->")
        assert operands.count(f"x{element}") == 2, product
        assert accumulator in result


def test_native_does_not_hide_what_is_not_a_number():
    x, w = normal(64, 64), normal(64, 16, seed=1)
    x[5, 9], x[7, 1] = np.nan, np.inf
    for pair in (("int8", "int8"), ("e4m3", "e4m3")):
        dot = functools.partial(dot_general(policies(*pair)[0]), dimension_numbers=DENSE)
        product = np.asarray(jax.jit(dot)(x, w))
        assert np.isnan(product[[5, 7]]).all()
        assert np.isfinite(np.delete(product, [5, 7], axis=0)).all()


def test_native_with_fixed_scales_does_not_hide_nan():
    x, w = normal(8, 16), normal(16, 4, seed=1)
    x[5, 9] = np.nan
    policy = policies("int8", "int8", ("tensor", "tensor"), scale="fixed", value=2.0)[0]
    dot = functools.partial(dot_general(policy), dimension_numbers=DENSE)
    product = np.asarray(jax.jit(dot)(x, w))
    assert np.isnan(product[5]).all()


def test_native_stochastic_rounding_draws_what_fake_draws():
    x, w, key = normal(8, 64), normal(64, 16, seed=1), jax.random.key(3)
    native, fake = (
        jax.jit(functools.partial(dot_general(policy, key), dimension_numbers=DENSE))(x, w)
        for policy in policies("int4", "int8", rounding="stochastic")
    )
    np.testing.assert_allclose(native, fake, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_native_keeps_the_dtype_or_takes_the_preferred(dtype):
    x, w = jnp.ones((8, 64), dtype), jnp.ones((64, 16), dtype)
    dot = functools.partial(dot_general(policies("int8", "int8")[0]), dimension_numbers=DENSE)
    assert jax.eval_shape(dot, x, w).dtype == dtype
    wide = jax.jit(functools.partial(dot, preferred_element_type=jnp.float32))(x, w)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, 64, rtol=1e-4)


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Policy(weights=Quantizer("int4", "channel"), mode="native"), "activations are not quant"),
        (policies("int8", "e4m3")[0], "integers or both floats"),
        (policies("int12", "int8")[0], "weights .*int12"),
        (policies("nf4", "int8")[0], "weights .*nf4"),
        (policies("uint8", "uint8")[0], "uint8"),
        (policies("bf16", "bf16")[0], "bf16"),
        (policies("int4", "int8", scale_format="e8m0")[0], None),
        (
            Policy(weights="int4/block:32", activations="int8/token", mode="native"),
            "weights .*blocks",
        ),
        (
            Policy(weights="int8/channel", activations="uint8/token/zero_point", mode="native"),
            "activations .*zero point",
        ),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_native_refuses_with_a_reason(policy, reason):
    if reason is None:
        dot_general(policy)
        return
    with pytest.raises(ValueError, match=f"(?s)native.*{reason}"):
        dot_general(policy)
