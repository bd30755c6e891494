"""Quantizers against float64 NumPy, and the identities that hold bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from qat.formats import parse_format
from qat.quantization import QTensor, fake_quant, quantize
from qat.quantizer import Quantizer
from qat.scales import scale_for

INTEGERS = [f"int{bits}" for bits in range(1, 17)]
FLOATS = [f"e{x}m{y}" for x in range(1, 9) for y in range(11)]
OTHERS = ["none", "bf16", "fp16", "ternary", "e4m3ieee", "e4m3fnuz", "e4m3b11fnuz", "e5m2fnuz"]
FORMATS = [*INTEGERS, *FLOATS, *OTHERS]
GRANULARITIES = ["tensor", "channel", "token"]
SHAPES = [((7,), 0), ((6, 5), -1), ((3, 4, 5), (-1, 1))]
SMALLEST_NORMAL = np.finfo(np.float32).tiny


compiled = jax.jit(fake_quant, static_argnames="axis")


def scales(x, quantizer, axis):
    return scale_for(x, quantizer, axis).scale


compiled_scales = jax.jit(scales, static_argnames="axis")


def bits(x):
    """The bit patterns of an array, to compare zeros' signs and NaNs too."""
    x = np.asarray(x)
    return x.view(f"uint{8 * x.dtype.itemsize}")


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(bits(actual), bits(expected))


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def stacked(names, granularity="channel"):
    """One traced quantizer whose grid holds several formats."""
    each = [Quantizer(name, granularity).traced() for name in names]
    return jax.tree.map(lambda *numbers: jnp.stack(numbers), *each)


@st.composite
def arrays(draw):
    """(array, axis): any magnitude per tensor and per element, outliers, all-zero groups."""
    shape, axis = draw(st.sampled_from(SHAPES))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = random.standard_normal(shape) * 10.0 ** draw(st.integers(-29, 29))
    feature = draw(st.sampled_from(["plain", "outlier", "zero group", "zero", "mixed", "integers"]))
    if feature == "outlier":
        x[(0,) * x.ndim] *= 1e4
    elif feature == "zero group":
        x[..., :1] = 0
    elif feature == "zero":
        x = np.zeros(shape)
    elif feature == "mixed":
        x = x * 10.0 ** random.uniform(-6, 0, shape)
    elif feature == "integers":
        x = random.integers(-8, 8, shape)
    return jnp.asarray(x, draw(st.sampled_from([jnp.float32, jnp.bfloat16]))), axis


@settings(max_examples=80)
@given(arrays(), st.sampled_from(FORMATS), st.sampled_from(GRANULARITIES))
@example((jnp.asarray([0.0, -0.0, 1.0]), 0), "binary", "tensor")
def test_stored_and_fake_agree_and_quantizing_twice_changes_nothing(array, name, granularity):
    x, axis = array
    quantizer = Quantizer(name, granularity)
    once = fake_quant(x, quantizer, axis)
    assert_same_bits(quantize(x, quantizer, axis).dequantize(), once)
    assert_same_bits(compiled(x, quantizer.traced(), axis), once)
    assert_same_bits(compiled(once, quantizer.traced(), axis), once)


@pytest.mark.parametrize(
    "text", ["int4/tensor", "int4/channel", "e4m3/token", "bf16/tensor", "binary/channel"]
)
def test_stored_and_fake_agree_in_a_compiled_program(text):
    """Formats are constants here, which a compiler folds and rewrites differently."""
    x, quantizer = normal((6, 5)), Quantizer.parse(text)

    @jax.jit
    def both(x):
        return fake_quant(x, quantizer, 0), quantize(x, quantizer, 0).dequantize()

    fake, stored = both(x)
    assert_same_bits(fake, stored)
    assert_same_bits(fake, compiled(x, quantizer.traced(), 0))
    assert_same_bits(both(fake)[0], fake)


def scales_in_numpy(amax, largest):
    """amax / largest in float32, rounded to 20 significant bits."""
    fraction, exponent = np.frexp(amax * (np.float32(1) / np.float32(largest)))
    return np.ldexp(np.rint(fraction * np.float32(2**20)), exponent - 20)


def test_quantizing_twice_has_the_same_scale_for_every_significand():
    """Exhaustively: scales have 2**19 significands, largest magnitudes 2**23, and formats few.

    A power of two changes no significand, so only the odd part of a format's largest value counts.
    """
    fractions = {np.frexp(f.max_value)[0] for f in map(parse_format, FORMATS) if f.scaled}
    odd_parts = {fraction.as_integer_ratio()[0] for fraction in fractions}
    scale = (1 + np.arange(2**19) / 2**19).astype(np.float32)
    amax = (0x3F800000 + np.arange(2**23, dtype=np.int32)).view(np.float32)
    for largest in odd_parts:
        np.testing.assert_array_equal(scales_in_numpy(np.float32(largest) * scale, largest), scale)
        y = amax * (np.float32(1) / scales_in_numpy(amax, largest))
        assert np.abs(y - np.float32(largest)).max() < 0.1  # rounds to the largest value


@pytest.mark.parametrize("name", ["int3", "int4", "int8", "int16", "e2m1", "e4m3", "e5m2", "e3m0"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_many_groups_are_idempotent(name, dtype):
    x = normal((8, 10_000), dtype=dtype)
    quantizer = Quantizer(name, "channel").traced()
    once = compiled(x, quantizer, 0)
    assert_same_bits(compiled(once, quantizer, 0), once)


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "int12", "e2m1", "e4m3", "e5m2", "e3m0"])
@pytest.mark.parametrize(
    ("granularity", "axis", "shared"),
    [("tensor", 0, None), ("channel", 0, (0,)), ("token", -1, (2,)), ("token", (1, 2), (1, 2))],
)
def test_values_are_the_nearest_of_the_format(name, granularity, axis, shared):
    """Exact wherever float64 sees no tie nearby."""
    x = normal((6, 8, 12))
    fmt = parse_format(name)
    x64 = np.asarray(x, np.float64)
    amax = np.abs(np.asarray(x)).max(axis=shared, keepdims=True)
    scale = scales_in_numpy(amax, fmt.max_value)
    np.testing.assert_allclose(scale, amax / fmt.max_value, rtol=2**-19)
    quantizer = Quantizer(name, granularity).traced()
    np.testing.assert_array_equal(compiled_scales(x, quantizer, axis), scale)

    if name.startswith("int"):
        levels = np.arange(-fmt.max_value, fmt.max_value + 1)
    else:
        levels = np.concatenate([-fmt.magnitudes[:0:-1], fmt.magnitudes]).astype(np.float64)
    y = x64 / scale
    above = np.clip(np.searchsorted(levels, y), 1, levels.size - 1)
    low, high = levels[above - 1], levels[above]
    nearest = np.where(y - low < high - y, low, high)
    tie = np.abs((y - low) - (high - y)) < 1e-5 * np.abs(high)
    expected = nearest.astype(np.float32) * scale
    actual = np.asarray(compiled(x, quantizer, axis))
    np.testing.assert_array_equal(actual[~tie], expected[~tie])
    assert tie.mean() < 0.01


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scales_broadcast_and_are_float32(granularity):
    shape = {"tensor": (1, 1, 1), "channel": (1, 4, 1), "token": (1, 4, 1)}[granularity]
    x = normal((3, 4, 5), dtype=jnp.bfloat16)
    scale = scales(x, Quantizer("int4", granularity), axis=(0, -1))
    assert (scale.shape, scale.dtype) == (shape, jnp.float32)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_passes_straight_through(granularity, dtype):
    x, weights = normal((6, 5), dtype=dtype), normal((6, 5), seed=1, dtype=dtype)

    @jax.jit
    def derivatives(quantizer):
        quantized = functools.partial(fake_quant, quantizer=quantizer, axis=0)
        _, pullback = jax.vjp(quantized, x)
        return pullback(weights)[0], *jax.jvp(quantized, (x,), (weights,))

    for name in ("int4", "e4m3", "binary", "bf16", "none"):
        quantizer = Quantizer(name, granularity).traced()
        gradient, value, tangent = derivatives(quantizer)
        assert_same_bits(gradient, weights)
        assert_same_bits(tangent, weights)
        assert_same_bits(value, compiled(x, quantizer, 0))


def test_no_gradient_flows_through_the_scale():
    gradient = jax.grad(lambda x: scales(x, Quantizer("int4"), 0).sum())(normal((6, 5)))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", ["int2", "int8", "int16", "e4m3", "e2m1", "ternary", "binary"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_makes_its_group_nan(name, bad):
    x = normal((6, 5)).at[1, 2].set(bad)
    quantizer = Quantizer(name, "channel")
    for result in (fake_quant(x, quantizer, 0), quantize(x, quantizer, 0).dequantize()):
        assert np.isnan(result).all(axis=0).tolist() == [False, False, True, False, False]
        assert np.isfinite(result).all(axis=0).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize(("name", "infinity"), [("bf16", 3.3895314e38), ("fp16", 65504.0)])
def test_formats_without_a_scale_saturate_infinity_and_keep_nan_to_itself(name, infinity):
    x = jnp.asarray([1.0, np.inf, -np.inf, np.nan, 2.0, 0.5, 0.0])
    expected = np.float32([1, infinity, -infinity, np.nan, 2, 0.5, 0])
    np.testing.assert_array_equal(fake_quant(x, Quantizer(name), 0), expected)
    np.testing.assert_array_equal(quantize(x, Quantizer(name), 0).dequantize(), expected)


@pytest.mark.parametrize("name", ["ternary", "int3", "int4", "e2m1"])
def test_the_largest_numbers_are_not_rounded_to_zero(name):
    """Though 1/scale might fall below float32's range, where XLA on CPU sees zero."""
    x = jnp.asarray([1e38, -2e38, 3e38, 1.0])
    result = np.asarray(compiled(x, Quantizer(name).traced(), 0))
    assert np.isfinite(result).all()
    assert result[2] > 5e37


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_none_is_bit_identical(granularity, dtype):
    x = normal((6, 5), dtype=dtype).at[0, :3].set(jnp.asarray([np.inf, np.nan, 1e30], dtype))
    x = x.at[1, 0].set(jnp.asarray(SMALLEST_NORMAL, dtype))
    assert_same_bits(compiled(x, Quantizer("none", granularity).traced(), 0), x)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "int1"])
def test_zeros_stay_zero(name):
    result = compiled(
        jnp.asarray([[0.0, 1.0], [-0.0, -2.0]]), Quantizer(name, "channel").traced(), 0
    )
    np.testing.assert_array_equal(bits(result[:, 0]), 0)


def test_a_program_is_compiled_once_for_every_format():
    traces = []

    @jax.jit
    def quantized(x, quantizer):
        traces.append(None)
        return fake_quant(x, quantizer, 0)

    for name in [*INTEGERS, *FLOATS[::4], *OTHERS]:
        quantized(normal((6, 5)), Quantizer(name, "channel").traced())
    assert len(traces) == 1


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_stacked_formats_under_vmap_equal_a_loop(granularity):
    x, names = normal((6, 5)), ["int2", "int8", "e4m3", "bf16", "binary", "none"]
    sweep = jax.jit(jax.vmap(lambda quantizer: fake_quant(x, quantizer, 0)))
    swept = sweep(stacked(names, granularity))
    for row, name in zip(swept, names, strict=True):
        assert_same_bits(row, compiled(x, Quantizer(name, granularity).traced(), 0))


def test_stacked_formats_under_scan_equal_a_loop():
    x, names = normal((6, 5)), ["int8", "e4m3", "int3", "none"]
    _, layers = jax.lax.scan(lambda _, q: (None, fake_quant(x, q, 0)), None, stacked(names))
    for row, name in zip(layers, names, strict=True):
        assert_same_bits(row, compiled(x, Quantizer(name, "channel").traced(), 0))


def test_gradients_pass_through_checkpoint():
    x, quantizer = normal((6, 5)), Quantizer("int4", "channel").traced()

    @jax.checkpoint
    def loss(x):
        return jnp.sum(jnp.square(fake_quant(x, quantizer, 0)))

    gradient = jax.jit(jax.grad(loss))(x)
    np.testing.assert_array_equal(gradient, 2 * compiled(x, quantizer, 0))


@pytest.mark.parametrize("name", ["int4", "e4m3"])
def test_channels_on_eight_devices_equal_one_device(name):
    x, quantizer = normal((16, 64)), Quantizer(name, "channel").traced()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = PartitionSpec(None, "x")
    sharded = jax.shard_map(
        lambda x: fake_quant(x, quantizer, 0), mesh=mesh, in_specs=columns, out_specs=columns
    )
    assert_same_bits(jax.jit(sharded)(x), compiled(x, quantizer, 0))


@pytest.mark.parametrize(
    ("name", "storage", "itemsize"),
    [("int2", "int8", 1), ("e5m2", "int8", 1), ("int9", "int16", 2), ("none", "int32", 4)],
)
def test_codes_take_the_smallest_integer(name, storage, itemsize):
    stored = quantize(normal((6, 5)), Quantizer(name, "channel"), 0)
    assert stored.codes.dtype == storage
    assert stored.shape == (6, 5)
    assert stored.nbytes == 30 * itemsize + 5 * 4


def test_a_stored_tensor_passes_through_jit():
    x = normal((6, 5), dtype=jnp.bfloat16)
    stored = quantize(x, Quantizer("int4", "channel"), 0)
    assert_same_bits(jax.jit(QTensor.dequantize)(stored), stored.dequantize())


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("function", [scales, fake_quant, quantize])
@pytest.mark.parametrize(
    ("x", "axis", "message"),
    [
        (jnp.ones((2, 3)), 2, r"axis 2 is not an axis .* \(2, 3\)"),
        (jnp.ones((2, 3)), (0, -3), "axis -3 .* expected -2 to 1"),
        (jnp.ones((2, 3), jnp.int32), 0, "floating-point .* int32"),
    ],
)
def test_what_cannot_be_quantized_is_an_error(function, x, axis, message):
    with pytest.raises(ValueError, match=message):
        function(x, Quantizer("int4", "channel"), axis)


def test_stored_codes_need_a_named_format():
    with pytest.raises(ValueError, match="named Format"):
        quantize(jnp.ones(3), Quantizer("int4").traced(), 0)


@pytest.mark.parametrize("text", ["int4/channel", "e4m3/token", "bf16/tensor", "none/channel"])
def test_a_quantizer_is_parsed_from_its_spelling(text):
    quantizer = Quantizer.parse(text)
    assert str(quantizer) == text
    assert (quantizer.format, quantizer.granularity) == (
        parse_format(text.split("/")[0]),
        text.split("/")[1],
    )


def test_the_granularity_may_be_left_out():
    assert Quantizer.parse("int4") == Quantizer("int4", "tensor")


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4/chanel", "unknown option 'chanel'.*nearest is 'channel'"),
        ("itn4/channel", "unknown format 'itn4'.*nearest is 'int4'"),
        ("int4/channel/2", "unknown option '2'"),
        ("int4/channel/token", "granularity is given twice"),
    ],
)
def test_an_unknown_spelling_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        Quantizer.parse(text)


@pytest.mark.parametrize(
    ("name", "expected"), [("int4", 4), ("e4m3", 8), ("bf16", 16), ("none", 16)]
)
def test_bits_count_unquantized_as_sixteen(name, expected):
    assert Quantizer(name).bits == expected
