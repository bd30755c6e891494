"""Gradients against closed forms in float64 NumPy: estimators, learned scales, contractions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.dot_general import dot_general
from qat.einsum import einsum
from qat.policy import Policy
from qat.quantization import fake_quant
from qat.quantizer import Quantizer
from tests import numpy_oracle as oracle
from tests.checks import assert_same_bits
from tests.numpy_oracle import Spec


@functools.partial(jax.jit, static_argnames="axis")
def value_and_pullback(x, g, quantizer, axis=0):
    """Quantized x, and the gradient of x where g arrives."""
    value, pullback = jax.vjp(lambda x: fake_quant(x, quantizer, axis), x)
    return value, pullback(g)[0]


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize(
    "text",
    [
        "int4/block:16",
        "nvfp4",
        "nf4",
        "uint4/channel/zero_point",
        "int3/channel/mse",
        "int4/channel/percentile:95",
        "ternary/tensor/absmean",
    ],
)
def test_the_identity_lets_every_gradient_through(text):
    x, g = normal(64, 8), normal(64, 8, seed=1)
    _, gradient = value_and_pullback(x, g, Quantizer.parse(text).traced())
    assert_same_bits(gradient, g)


FIXED = {"int4": 1.0, "int4full": 1.2, "e2m1": 1.5, "e4m3": 0.7, "ternary": 0.9, "binary": 0.8}


def units_of(x, spec):
    """x in units of the format, from the oracle's scale."""
    scale, zero_point, _ = oracle.scales(x, spec, 0)
    return oracle.times_reciprocal(x, scale) + zero_point


@pytest.mark.parametrize("name", FIXED)
def test_clipped_stops_gradients_outside_the_range(name):
    x, g = normal(64, 8), normal(64, 8, seed=1)
    spec = Spec(name, scale="fixed", value=FIXED[name])
    quantizer = Quantizer(name, scale="fixed", value=FIXED[name], gradient="clipped")
    y = units_of(x, spec)
    inside = (y >= spec.values.lowest) & (y <= spec.values.highest)
    _, gradient = value_and_pullback(x, g, quantizer.traced())
    assert 0.1 < inside.mean() < 0.9
    np.testing.assert_array_equal(gradient, np.where(inside, g, 0))


@pytest.mark.parametrize(
    "text", ["int4/channel", "int8/channel", "e4m3/channel", "uint4/zero_point"]
)
def test_clipped_stops_nothing_where_the_scale_clips_nothing(text):
    """The largest magnitude may exceed the last code by the rounding of its scale."""
    x, g = normal(64, 8), normal(64, 8, seed=1)
    x[:, 7] = 1.0
    _, gradient = value_and_pullback(x, g, Quantizer.parse(f"{text}/clipped").traced())
    np.testing.assert_array_equal(gradient, g)


def test_clipped_with_a_zero_point_stops_outside_the_shifted_range():
    """Ends lie up to half a step from a code, since zero is one; what is beyond them stops."""
    x, g, ends = normal(64, 8), normal(64, 8, seed=1), (-0.5, 1.2)
    spec = Spec("uint4", scale="fixed", value=ends, zero_point=True)
    quantizer = Quantizer("uint4", scale="fixed", value=ends, zero_point=True, gradient="clipped")
    y = units_of(x, spec)
    _, gradient = value_and_pullback(x, g, quantizer.traced())
    beyond, inside = np.abs(y - 7.5) > 8.01, np.abs(y - 7.5) <= 7.5
    np.testing.assert_array_equal(gradient[beyond], 0)
    np.testing.assert_array_equal(gradient[inside], g[inside])


@pytest.mark.parametrize("name", FIXED)
def test_trust_stops_gradients_where_the_error_exceeds_half_the_largest_step(name):
    """QuEST's mask; for integers it only ever stops what lies outside the range."""
    x, g = normal(64, 8), normal(64, 8, seed=1)
    spec = Spec(name, scale="fixed", value=FIXED[name])
    quantizer = Quantizer(name, scale="fixed", value=FIXED[name], gradient="trust")
    y, fmt = units_of(x, spec), spec.values
    trusted = np.abs(oracle.nearest(y, fmt)[0] - y) <= fmt.largest_step / 2
    _, gradient = value_and_pullback(x, g, quantizer.traced())
    assert 0.1 < trusted.mean() < 0.95
    np.testing.assert_array_equal(gradient, np.where(trusted, g, 0))


def test_trust_in_a_codebook_looks_at_its_largest_step():
    x, g = normal(64, 8), normal(64, 8, seed=1)
    quantizer = Quantizer("nf4", scale="gaussian", gradient="trust")
    value, gradient = value_and_pullback(x, g, quantizer.traced())
    scale = np.abs(np.asarray(value)).max()  # the largest level is 1
    trusted = np.abs(np.asarray(value) - x) <= scale * np.diff(oracle.NF4).max() / 2
    assert (~trusted).any()
    np.testing.assert_array_equal(gradient, np.where(trusted, g, 0))


LSQ = [  # format, granularity, block size, shape of the scale
    ("int4", "tensor", None, (1, 1)),
    ("int4", "channel", None, (1, 8)),
    ("int3", "block", 16, (4, 8)),
    ("uint4", "channel", None, (1, 8)),
    ("int8full", "tensor", None, (1, 1)),
    ("e2m1", "channel", None, (1, 8)),
    ("ternary", "channel", None, (1, 8)),
    ("binary", "tensor", None, (1, 1)),
    ("nf4", "channel", None, (1, 8)),
]


def lsq_in_numpy(x, scale, g, fmt):
    """(dx, ds) of Esser et al., equations 3 and 5 and section 2.2, with scales of full shape."""
    y = x.astype(np.float64) / scale
    inside = (y > fmt.lowest) & (y < fmt.highest)
    q = oracle.nearest(y, fmt)[0]
    return np.where(inside, g, 0), g * np.where(inside, q - y, q)


@jax.jit
def lsq(x, g, quantizer):
    """Gradients of x and of the quantizer's value where g arrives."""

    def quantized(x, value):
        return fake_quant(x, dataclasses.replace(quantizer, value=value), 0)

    return jax.vjp(quantized, x, quantizer.value)[1](g)


@pytest.mark.parametrize(("name", "granularity", "block_size", "shape"), LSQ)
def test_learned_scales(name, granularity, block_size, shape):
    """To x inside the range; to the scale, divided by √(elements that share it · largest value)."""
    x, g, fmt = normal(64, 8), normal(64, 8, seed=1), oracle.values_of(name)
    scale = np.random.default_rng(2).uniform(1.2, 1.8, shape) / fmt.highest
    scale = scale.astype(np.float32)
    quantizer = Quantizer(name, granularity, block_size, scale="learned", value=scale)
    dx, ds = lsq(x, g, quantizer.traced())
    tile = tuple(n // s for n, s in zip((64, 8), shape, strict=True))
    wanted_dx, per_element = lsq_in_numpy(x, np.kron(scale, np.ones(tile)), g, fmt)
    by_group = per_element.reshape(shape[0], tile[0], shape[1], tile[1]).sum(axis=(1, 3))
    wanted_ds = by_group / np.sqrt(np.prod(tile) * fmt.highest)
    np.testing.assert_allclose(dx, wanted_dx, rtol=1e-6)
    np.testing.assert_allclose(ds, wanted_ds, rtol=1e-4, atol=1e-5 * np.abs(wanted_ds).max())


def test_a_learned_scale_that_is_a_scalar():
    """One number for all groups collects the gradients of all."""
    x, g = normal(64, 8), normal(64, 8, seed=1)
    scale = np.float32(0.3)
    quantizer = Quantizer("int4", scale="learned", value=scale).traced()
    _, ds = lsq(x, g, quantizer)
    _, per_element = lsq_in_numpy(x, scale, g, oracle.values_of("int4"))
    np.testing.assert_allclose(ds, per_element.sum() / np.sqrt(512 * 7), rtol=1e-4)


DENSE = (((1,), (0,)), ((), ()))
CONTRACTIONS = {  # shapes of both sides, einsum
    "tokens": ((2, 3, 16), (16, 8), "btd,df->btf"),
    "merge": ((2, 3, 2, 8), (2, 8, 5), "btkc,kcd->btd"),
    "swapped": ((2, 3, 8), (8, 3, 5), "bij,jik->bk"),
    "table": ((2, 3, 8), (7, 8), "btd,vd->btv"),
    "attention": ((2, 5, 3, 8), (2, 4, 3, 8), "bthd,bshd->bhts"),
}
QUANTIZED_GRADIENTS = Policy(
    weights=Quantizer("int4", "channel"),
    activations=Quantizer("int8", "tensor"),
    gradients=Quantizer("e5m2", "token"),
)


@functools.partial(jax.jit, static_argnames="subscripts")
def product_and_gradients(policy, x, w, g, subscripts):
    product, pullback = jax.vjp(functools.partial(einsum(policy), subscripts), x, w)
    return product, *pullback(g)


def axes_of(subscripts):
    """Contracted axes of x, of w, and of the result for the gradients of x and of w."""
    inputs, out = subscripts.split("->")
    x, w = inputs.split(",")
    shared = [[i for i, d in enumerate(a) if d in b and d not in out] for a, b in ((x, w), (w, x))]
    alone = [[i for i, d in enumerate(out) if d not in a] for a in (x, w)]
    return [tuple(axes) for axes in (*shared, *alone)]


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "subscripts"), CONTRACTIONS.values(), ids=CONTRACTIONS
)
def test_each_gradient_contraction_has_a_gradient_quantized_for_it(x_shape, w_shape, subscripts):
    """dx = Q(g) · Q(w) with g quantized along the features of the output, dw = Q(x) · Q(g) with g
    quantized along the tokens, in the order of both operands' axes.
    """
    x, w = normal(*x_shape), normal(*w_shape, seed=1)
    inputs, out = subscripts.split("->")
    x_dims, w_dims = inputs.split(",")
    g = normal(*np.einsum(subscripts, x, w).shape, seed=2)
    g *= 10.0 ** np.random.default_rng(3).uniform(-2, 2, g.shape).astype(np.float32)
    actual = product_and_gradients(QUANTIZED_GRADIENTS.traced(), x, w, g, subscripts)

    x_axes, w_axes, for_x, for_w = axes_of(subscripts)
    xq = oracle.quantize(x, Spec("int8", "tensor"), x_axes).values.astype(np.float64)
    wq = oracle.quantize(w, Spec("int4", "channel"), w_axes).values.astype(np.float64)
    gx = oracle.quantize(g, Spec("e5m2", "token"), for_x).values.astype(np.float64)
    gw = oracle.quantize(g, Spec("e5m2", "token"), for_w).values.astype(np.float64)
    wanted = (
        np.einsum(subscripts, xq, wq),
        np.einsum(f"{out},{w_dims}->{x_dims}", gx, wq),
        np.einsum(f"{out},{x_dims}->{w_dims}", gw, xq),
    )
    for ours, theirs in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("for_gradients", "spec"),
    [("mxfp8", Spec.named("mxfp8")), ("int4/block:8", Spec("int4", "block", 8))],
)
def test_gradients_in_blocks(for_gradients, spec):
    x, w, g = normal(32, 16), normal(16, 32, seed=1), normal(32, 32, seed=2)
    policy = Policy(gradients=Quantizer.parse(for_gradients)).traced()
    _, dx, dw = product_and_gradients(policy, x, w, g, "td,df->tf")
    along_features, along_tokens = (oracle.quantize(g, spec, axis).values for axis in (1, 0))
    np.testing.assert_allclose(dx, along_features @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, x.T @ along_tokens, rtol=1e-5, atol=1e-5)


def test_estimators_act_inside_a_contraction():
    """Where the activation was clipped, no gradient of it; the weight sees the clipped value."""
    x, w, g = normal(32, 16), normal(16, 8, seed=1), normal(32, 8, seed=2)
    policy = Policy(activations=Quantizer("int4", scale="fixed", value=1.0, gradient="clipped"))
    _, dx, dw = product_and_gradients(policy.traced(), x, w, g, "td,df->tf")
    spec = Spec("int4", scale="fixed", value=1.0)
    inside = np.abs(units_of(x, spec)) <= 7
    np.testing.assert_allclose(dx, np.where(inside, g @ w.T, 0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, oracle.quantize(x, spec, 1).values.T @ g, rtol=1e-5, atol=1e-5)


def test_stochastically_rounded_gradients_are_unbiased_and_independent_of_each_other():
    x, w, g = normal(8, 4), normal(4, 6, seed=1), normal(8, 6, seed=2)
    policy = Policy(gradients=Quantizer("int3", "token", rounding="stochastic")).traced()

    @jax.jit
    @jax.vmap
    def draws(key):
        dot = dot_general(policy, key)
        product = functools.partial(dot, dimension_numbers=DENSE)
        return jax.vjp(product, jnp.asarray(x), jnp.asarray(w))[1](jnp.asarray(g))

    dx, dw = (np.asarray(d, np.float64) for d in draws(jax.random.split(jax.random.key(0), 4000)))
    for drawn, wanted in ((dx, g @ w.T), (dw, x.T @ g)):
        standard_error = drawn.std(axis=0) / np.sqrt(4000)
        assert (np.abs(drawn.mean(axis=0) - wanted) <= 4 * standard_error + 1e-5).all()
    noise_x, noise_w = (dx - g @ w.T).reshape(4000, -1), (dw - x.T @ g).reshape(4000, -1)
    correlations = np.corrcoef(noise_x, noise_w, rowvar=False)[
        : noise_x.shape[1], noise_x.shape[1] :
    ]
    assert np.abs(correlations).max() < 5 / np.sqrt(4000)


RESIDUALS = {
    "named": "w4a8",
    "gradients": "w4a8grade5m2",
    "blocks": "w4g16a8",
    "two levels": "wnvfp4anvfp4",
    "codebook": "wnf4a8",
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("estimator", ["identity", "clipped"])
@pytest.mark.parametrize("text", RESIDUALS.values(), ids=RESIDUALS)
def test_what_is_kept_for_the_backward_pass(text, estimator, dtype):
    """No more than the operands, and a bit mask where the estimator needs one."""
    policy = Policy.parse(text)
    operands = {
        name: dataclasses.replace(quantizer, gradient=estimator)
        for name, quantizer in policy.operands().items()
        if name in ("weights", "activations")
    }
    policy = dataclasses.replace(policy, **operands)
    assert residual_bytes(policy, dtype) <= allowed_bytes(dtype, mask=estimator == "clipped")


def test_what_native_execution_keeps():
    policy = dataclasses.replace(Policy.parse("w4a8"), mode="native")
    assert residual_bytes(policy, jnp.bfloat16) <= allowed_bytes(jnp.bfloat16, mask=False)


def residual_bytes(policy, dtype):
    x, w = jnp.ones((4, 32, 64), dtype), jnp.ones((64, 128), dtype)
    dot = functools.partial(dot_general(policy), dimension_numbers=(((2,), (0,)), ((), ())))
    pullback = jax.eval_shape(lambda x, w: jax.vjp(jax.jit(dot), x, w)[1], x, w)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))


def allowed_bytes(dtype, mask):
    """Of both operands, their masks, and a kilobyte for policies and scales."""
    elements = 4 * 32 * 64 + 64 * 128
    return elements * (jnp.dtype(dtype).itemsize + mask) + 1024
