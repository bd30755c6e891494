"""What was measured to go wrong in quantization libraries, once each, as a property that holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.dot_general import dot_general
from qat.policy import Policy
from qat.quantization import fake_quant, quantize
from qat.quantizer import Quantizer
from tests import numpy_oracle as oracle
from tests.checks import assert_same_bits, compiled
from tests.numpy_oracle import Spec

DENSE = (((1,), (0,)), ((), ()))
INTEGERS = [f"int{bits}" for bits in range(2, 17)]
FLOATS = [f"e{x}m{y}" for x in (2, 3, 4, 5, 6) for y in (0, 1, 2, 3)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_operands_may_have_one_shape_or_be_one_array():
    """Which operand is the weight follows from its place, not from its shape or identity."""
    x, w = normal(16, 16), normal(16, 16, seed=1)
    policy = Policy.parse("w2a8").traced()
    dot = jax.jit(lambda x, w: dot_general(policy)(x, w, DENSE))
    for left, right in ((x, w), (w, x), (x, x)):
        activations = oracle.quantize(left, Spec("int8", "tensor"), 1).values
        weights = oracle.quantize(right, Spec("int2", "channel"), 0).values
        np.testing.assert_allclose(dot(left, right), activations @ weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["int2", "int3", "int5", "int6", "int7", "e2m1", "e4m3", "e5m2"])
def test_stochastic_rounding_is_stochastic_in_every_format(name):
    x = normal(64, 64)
    quantizer = Quantizer(name, "channel", rounding="stochastic").traced()
    draw = jax.jit(lambda key, quantizer: fake_quant(jnp.asarray(x), quantizer, 0, key))
    draws = np.stack([draw(jax.random.key(seed), quantizer) for seed in range(2)])
    assert (draws[0] != draws[1]).mean() > 0.05


@pytest.mark.parametrize("magnitude", [1e-30, 1e-8, 1e-4, 1.0, 1e4, 1e30])
def test_two_level_scales_do_not_lose_small_tensors(magnitude):
    """A block scale alone would be below the smallest e4m3 value, and all results zero."""
    x = normal(64, 8)
    scaled = x * np.float32(magnitude)
    fake, _ = compiled(scaled, Quantizer.parse("nvfp4").traced())
    error = np.linalg.norm(np.asarray(fake, np.float64) - scaled) / np.linalg.norm(
        scaled.astype(np.float64)
    )
    assert error < 0.12


@pytest.mark.parametrize("name", ["mxfp8", "mxfp8e5m2", "mxfp6", "mxfp6e3m2", "mxfp4", "mxint8"])
def test_microscaling_is_exact_at_powers_of_two(name):
    """log2 in floating point is off by one there for some, and the scale then by a factor of 2."""
    exponents = np.arange(-100, 101)
    x = np.ldexp(np.float32(1), exponents)[None] * np.ones((32, 1), np.float32)
    fake, scale = compiled(x, Quantizer.parse(name).traced())
    largest = oracle.values_of(oracle.NAMES[name][0]).highest
    np.testing.assert_array_equal(fake, x)
    expected = 2.0 ** (exponents - np.floor(np.log2(largest)))
    np.testing.assert_array_equal(scale.scale[0], expected.astype(np.float32))


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "int4full", "int8full"])
def test_quantizing_twice_is_quantizing_once(name):
    x = normal(8, 5000)
    quantizer = Quantizer(name, "channel").traced()
    once, _ = compiled(x, quantizer)
    assert_same_bits(compiled(once, quantizer)[0], once)


def test_one_compiled_train_step_serves_every_format():
    """Fifteen integers and twenty floats, forward, backward and update."""
    traces = []

    @jax.jit
    def step(w, x, policy):
        traces.append(None)

        def loss(w):
            return jnp.mean(jnp.square(dot_general(policy)(x, w, DENSE) - 1))

        value, gradient = jax.value_and_grad(loss)(w)
        return value, w - 0.1 * gradient

    w, x = normal(16, 8) / 4, normal(32, 16, seed=1)
    unquantized, _ = step(w, x, Policy.parse("none").traced())
    formats = [*INTEGERS, *FLOATS]
    losses = {n: float(step(w, x, Policy.parse(f"w{n}a{n}").traced())[0]) for n in formats}
    assert len(traces) == 1
    assert step._cache_size() == 1
    assert len({losses[name] for name in INTEGERS}) == len(INTEGERS)
    assert len(set(losses.values())) > 25  # exponents beyond the data's range change nothing
    np.testing.assert_allclose(losses["int16"], unquantized, rtol=1e-4)


@pytest.mark.parametrize("text", ["int4/channel", "e4m3/channel", "nf4", "mxfp4"])
def test_the_gradient_is_not_zero(text):
    x, quantizer = normal(64, 8), Quantizer.parse(text).traced()
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(fake_quant(x, quantizer, 0) ** 2)))(x)
    fake, _ = compiled(x, quantizer)
    np.testing.assert_array_equal(gradient, 2 * np.asarray(fake))


PACKED = [  # quantizer, bits an element
    ("int3/channel", 3),
    ("uint5/channel/zero_point", 5),
    ("ternary/channel", 1.6),
]


@pytest.mark.parametrize(("text", "bits"), PACKED)
def test_packed_storage_takes_the_bits_of_the_format(text, bits):
    """Not a byte an element; and it comes back bit for bit."""
    stored = _quantized(jnp.asarray(normal(64, 40)), Quantizer.parse(text))
    packed = stored.pack()
    scales = sum(leaf.nbytes for leaf in jax.tree.leaves(stored.scale))
    assert packed.nbytes <= np.ceil(64 * 40 * bits / 8) + scales
    assert_same_bits(packed.unpack().codes, stored.codes)
    assert_same_bits(packed.unpack().dequantize(), stored.dequantize())


@functools.partial(jax.jit, static_argnums=1)
def _quantized(x, quantizer):
    return quantize(x, quantizer, 0)
