"""What the tests of storage share: quantized tensors of any codes and scales, made on the host."""

import jax
import jax.numpy as jnp
import numpy as np

from qat.formats import parse_format
from qat.grid import encode
from qat.groups import groups_of
from qat.quantization import QTensor
from qat.quantizer import Quantizer
from qat.scales import Scale

PATHS = ["model.safetensors", "model"]  # one of each kind of file

extreme_codes = jax.jit(lambda grid: encode(jnp.stack([grid.min_value, grid.max_value]), grid))


def bits(x):
    """The bytes of an array, to compare zeros' signs and NaNs too."""
    return np.asarray(x).reshape(-1).view(np.uint8)


def assert_same(actual, expected):
    """One structure, one dtype and shape a leaf, and the same bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(bits(a), bits(b))


def code_dtype(fmt):
    unsigned = fmt.levels is not None or fmt.lowest == 0
    size = next(size for size in (8, 16, 32) if fmt.bits <= size)
    return np.dtype(f"{'u' * unsigned}int{size}")


def with_codes(codes, fmt):
    """A tensor of given codes and one scale."""
    codes = jnp.asarray(np.asarray(codes).astype(code_dtype(fmt)))
    return QTensor(codes, Scale(jnp.ones((1,))), fmt, codes.shape, None, "float32")


def any_codes(random, fmt, shape):
    """Codes of a format, its ends and zero among them."""
    low, high = map(int, extreme_codes(fmt.grid()))
    ends = np.resize([low, high, 0], shape)
    codes = np.where(random.random(shape) < 0.1, ends, random.integers(low, high, shape, np.int64))
    return np.where(codes > 0, 1, -1) if fmt.min_magnitude else codes


def any_tensor(random, text, shape, axis, dtype="float32"):
    """A quantized tensor of any codes and scales, without compiling a quantizer."""
    quantizer = Quantizer.parse(text)
    groups = groups_of(jnp.zeros(shape), quantizer, axis)
    compact, fmt = groups.compact_shape, quantizer.format
    scale = np.ldexp(random.random(compact) + 1, random.integers(-120, 120, compact))
    tensor_scale = zero_point = None
    if quantizer.scale_format == "e8m0":
        scale = np.ldexp(1.0, random.integers(-126, 127, compact))
    if quantizer.scale_format == "e4m3":
        scale = random.choice(parse_format("e4m3").magnitudes, compact)
        tensor_scale = jnp.asarray(random.random((1,) * len(shape)), jnp.float32)
    if quantizer.zero_point:
        zero_point = jnp.asarray(any_codes(random, fmt, compact), jnp.float32)
    scale = np.where(random.random(compact) < 0.1, np.nan, scale)
    return QTensor(
        jnp.asarray(any_codes(random, fmt, shape).astype(code_dtype(fmt))),
        Scale(jnp.asarray(scale, jnp.float32), tensor_scale, zero_point),
        fmt,
        groups.tile,
        quantizer.scale_format,
        dtype,
    )
