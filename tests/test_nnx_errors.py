"""Errors and clipped shares of a model's quantizers, and ranges of scanned stacks, by NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import qat.nnx
from models.transformer import Transformer, TransformerConfig
from qat.formats import codebook, parse_format
from qat.nnx.format_names import format_name
from qat.policy import Policy
from qat.quantizer import Quantizer
from tests import numpy_oracle as oracle

CONFIG = TransformerConfig(vocabulary=16, width=8, layers=2, heads=2, kv_heads=1)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 6)))


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def layer(policy, dtype=jnp.float32):
    return qat.nnx.Linear(32, 4, policy=policy, dtype=dtype, rngs=nnx.Rngs(0))


def rms(x):
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))


def expected(x, spec, axis):
    """(relative error, clipped share, largest magnitude), all in NumPy."""
    x = np.asarray(x)
    result = oracle.quantize(x, spec, axis)
    y = np.concatenate(
        [
            (x[index] / result.scale[at] + result.zero_point[at]).ravel()
            for at, index in oracle.groups(x.shape, spec, axis)
        ]
    ).astype(np.float64)
    fmt, slack = spec.values, 1e-5 + (0.5 if spec.zero_point else 0.0)
    clipped = (y > fmt.highest * (1 + 1e-5) + slack) | (y < fmt.lowest * (1 + 1e-5) - slack)
    error = result.values.astype(np.float64) - x.astype(np.float64)
    return rms(error) / rms(x), clipped.mean(), np.abs(x).max()


def found(errors, path, operand, index=()):
    (error,) = [e for e in errors if (e.path, e.operand, e.index) == (path, operand, index)]
    return error


def assert_is(error, values):
    got = (error.relative_error, error.clipped_share, error.largest)
    np.testing.assert_allclose(got, [float(value) for value in values], rtol=2e-4, atol=1e-7)


CASES = [
    ("int3/channel", oracle.Spec("int3", "channel")),
    ("e2m1/block:16", oracle.Spec("e2m1", "block", 16)),
    ("mxfp4", oracle.Spec.named("mxfp4")),  # whose scale, rounded down, clips
    ("int4/percentile:80", oracle.Spec("int4", scale="percentile", percentile=80)),
    ("uint4/channel/zero_point", oracle.Spec("uint4", "channel", zero_point=True)),
    ("ternary/absmean", oracle.Spec("ternary", scale="absmean")),
    ("uint4", oracle.Spec("uint4")),  # holds no negative value
]


@pytest.mark.parametrize(("quantizer", "spec"), CASES, ids=[name for name, _ in CASES])
def test_errors_are_those_of_numpy(quantizer, spec):
    spec_of_x = dataclasses.replace(
        spec, granularity="token" if spec.granularity == "channel" else spec.granularity
    )
    model, x = layer(Policy(weights=quantizer, activations=quantizer)), normal(6, 32, seed=1)
    errors = qat.nnx.quantization_errors(model, x)
    assert [error.values for error in errors] == [32 * 4, 6 * 32]
    assert_is(found(errors, "", "weights"), expected(model.kernel[...], spec, 0))
    assert_is(found(errors, "", "activations"), expected(x, spec_of_x, 1))


def test_values_beyond_a_fixed_range_are_clipped():
    model, x = layer(Policy(activations="int8/fixed")), jnp.arange(64, dtype=jnp.float32)
    qat.nnx.calibrate(model, [jnp.full((1, 32), 47.5)])
    error = found(qat.nnx.quantization_errors(model, x.reshape(2, 32)), "", "activations")
    lost = np.maximum(np.arange(64) - 47.5, 0)
    assert error.clipped_share == 16 / 64
    assert error.relative_error == pytest.approx(rms(lost) / rms(x), rel=1e-2)
    assert error.format == "int8/tensor/fixed"


def test_learned_scales_clip_too():
    model, x = layer(Policy(activations="int4/learned")), normal(4, 32)
    model.dot_general.activations_value.set_value(jnp.float32(0.1))
    error = found(qat.nnx.quantization_errors(model, x), "", "activations")
    quantized = 0.1 * np.clip(np.rint(np.asarray(x) / np.float32(0.1)), -7, 7)
    assert error.clipped_share == np.mean(np.abs(x) > 0.7)
    assert error.relative_error == pytest.approx(rms(quantized - x) / rms(x), rel=1e-4)


@pytest.mark.parametrize("power", [-100, 0, 100])
def test_errors_neither_overflow_nor_underflow(power):
    model, x = layer(Policy(activations="int4")), normal(3, 32)
    scaled = qat.nnx.quantization_errors(model, x * 2.0**power)
    expected = qat.nnx.quantization_errors(model, x)
    assert scaled[0].relative_error == pytest.approx(expected[0].relative_error, rel=1e-6)


def test_bfloat16_is_measured_in_float32():
    x = normal(6, 32, seed=1, dtype=ml_dtypes.bfloat16)
    model = layer(Policy(activations="int4/token"), dtype=jnp.bfloat16)
    errors = qat.nnx.quantization_errors(model, x)
    assert_is(errors[0], expected(x, oracle.Spec("int4", "token"), 1))


def test_the_model_stays_as_it_is_and_none_has_no_line():
    model, x = layer(Policy.parse("w4")), normal(3, 32)
    graph, state = nnx.split(model)
    (error,) = qat.nnx.quantization_errors(model, x)
    assert error.operand == "weights"
    assert nnx.split(model)[0] == graph
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, nnx.split(model)[1], state))


@nnx.jit
def normed_inputs(model):
    """What enters each block's first projection, (L, B, T, D), by a loop that scans nothing."""
    graph, state = nnx.split(model.blocks)
    first, second = (
        nnx.merge(graph, jax.tree.map(lambda leaf, index=index: leaf[index], state))
        for index in range(CONFIG.layers)
    )
    x_BTD = model.embed(TOKENS)
    positions = model.positions(jnp.int32(0), TOKENS.shape[1], TOKENS.shape[1])
    after_BTD, *_ = first(x_BTD, positions, None)
    return jnp.stack([first.attention_norm(x_BTD), second.attention_norm(after_BTD)])


@pytest.fixture(scope="module")
def transformer():
    """A calibrated model, each operand of which is quantized in another way."""
    policy = Policy(
        weights="int3/channel",
        activations="int4/fixed",
        kv_cache="int4/token",
        queries="int8/learned",
        probabilities="uint4/token",
    )
    model = nnx.jit(lambda: Transformer(CONFIG, policy, rngs=nnx.Rngs(0)))()
    qat.nnx.calibrate(model, [TOKENS])
    return model


def test_every_layer_of_a_scanned_stack_is_calibrated(transformer):
    ranges_L = transformer.blocks.attention.qkv.dot_general.activations_value[...]
    expected_L = [np.abs(normed).max() for normed in normed_inputs(transformer)]
    np.testing.assert_allclose(ranges_L, expected_L, rtol=1e-5)
    scales_L = transformer.blocks.attention.queries.queries_value[...]
    assert len(np.unique(scales_L)) == CONFIG.layers


def test_every_layer_of_a_scanned_stack_is_measured(transformer):
    errors = qat.nnx.quantization_errors(transformer, TOKENS)
    operands = {(error.path, error.operand) for error in errors}
    assert len(operands) == 4 * 2 + 3  # projections and what enters them; the rest of attention
    assert len(errors) == CONFIG.layers * len(operands)
    for index, normed_BTD in enumerate(normed_inputs(transformer)):
        weights = found(errors, "blocks/mlp/down", "weights", (index,))
        kernel = transformer.blocks.mlp.down.kernel[...][index]
        assert_is(weights, expected(kernel, oracle.Spec("int3", "channel"), 0))
        activations = found(errors, "blocks/attention/qkv", "activations", (index,))
        assert_is(activations, expected(normed_BTD, oracle.Spec("int4"), -1))


def test_a_rematerialized_stack_is_calibrated_alike(transformer):
    model = nnx.clone(transformer)
    model.config = dataclasses.replace(CONFIG, remat="full")
    qat.nnx.calibrate(model, [TOKENS])
    states = [
        nnx.state(m, (qat.nnx.StaticRange, qat.nnx.LearnedScale)) for m in (model, transformer)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), *states)


def test_a_failed_calibration_leaves_the_model_as_it_was():
    model = layer(Policy(activations="int8/fixed"))
    qat.nnx.calibrate(model, [jnp.full((2, 32), 3.0)])
    with pytest.raises(TypeError):
        qat.nnx.calibrate(model, [jnp.full((2, 32), 5.0), jnp.ones((2, 31))])
    assert model.dot_general.activations_value[...] == 3


class Scanned(nnx.Module):
    """Three layers in a stack that Flax scans, each doubling what enters it."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stack(rngs):
            return nnx.Linear(8, 8, kernel_init=lambda *_: 2 * jnp.eye(8), rngs=rngs)

        self.layers = stack(rngs)

    def __call__(self, x, twice=False):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return layer(layer(x)) / 2 if twice else layer(x)

        return run(x, self.layers)


def test_a_stack_scanned_by_flax_is_measured():
    model, _ = qat.nnx.quantize_model(Scanned(rngs=nnx.Rngs(0)), "w4a4")
    x = normal(5, 8)
    errors = qat.nnx.quantization_errors(model, x)
    assert [error.index for error in errors if error.operand == "weights"] == [(0,), (1,), (2,)]
    x = np.asarray(x)
    error, _, largest = expected(x, oracle.Spec("int4"), -1)
    assert_is(found(errors, "layers", "activations", (0,)), (error, 0, largest))
    for index in (1, 2):  # get values on the grid, twice as large in every layer
        x = 2 * oracle.quantize(x, oracle.Spec("int4"), -1).values
        later = found(errors, "layers", "activations", (index,))
        assert later.relative_error < 1e-6
        assert later.largest == pytest.approx(np.abs(x).max(), rel=1e-5)


def test_several_calls_of_a_layer_add_up_and_static_inputs_stay_static():
    model, _ = qat.nnx.quantize_model(Scanned(rngs=nnx.Rngs(0)), "a4")
    once, twice = (qat.nnx.quantization_errors(model, normal(5, 8), twice=t) for t in (False, True))
    assert [error.values for error in once] == [40] * 3
    assert [error.values for error in twice] == [80] * 3
    # The second call gets values on the grid, twice as large: of the norm² it adds four parts.
    assert twice[0].relative_error ** 2 == pytest.approx(once[0].relative_error ** 2 / 5, rel=0.05)


@pytest.mark.parametrize(
    ("build", "shape", "operands"),
    [
        (lambda rngs: nnx.Einsum("btd,dhf->bthf", (8, 2, 4), rngs=rngs), (2, 3, 8), 2),
        (lambda rngs: nnx.RNN(nnx.GRUCell(8, 8, rngs=rngs)), (2, 3, 8), 4),
        (functools.partial(nnx.MultiHeadAttention, 2, 8, 8, decode=False), (2, 5, 8), 12),
    ],
    ids=["einsum", "recurrent", "attention"],
)
def test_converted_models_are_measured(build, shape, operands):
    model, _ = qat.nnx.quantize_model(build(rngs=nnx.Rngs(0)), "w4a4q4kv4p4")
    errors = qat.nnx.quantization_errors(model, normal(*shape))
    assert len(errors) == operands
    assert all(error.values and 0 < error.relative_error < 0.5 for error in errors)


def test_a_kernel_of_a_convolution_is_measured_by_output_channel():
    conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    model, _ = qat.nnx.quantize_model(
        conv, Policy(weights="int3/channel", activations="int4/token")
    )
    x = normal(2, 6, 6, 3)
    errors = qat.nnx.quantization_errors(model, x)
    assert_is(errors[0], expected(conv.kernel[...], oracle.Spec("int3", "channel"), (0, 1, 2)))
    assert_is(errors[1], expected(x, oracle.Spec("int4", "token"), (1, 2, 3)))


def test_stochastic_rounding_is_measured_with_a_noise_of_its_own():
    model, x = layer(Policy(activations="int4/stochastic")), normal(8, 32)
    errors = [qat.nnx.quantization_errors(model, x)[0].relative_error for _ in range(2)]
    nearest = qat.nnx.quantization_errors(layer(Policy(activations="int4")), x)[0].relative_error
    assert errors[0] == errors[1]
    assert 1.2 * nearest < errors[0] < 1.7 * nearest  # √2 where values lie evenly between steps


def test_a_table_has_the_worst_first_and_the_unreached_last():
    class Two(nnx.Module):
        def __init__(self):
            self.used, self.other = layer(Policy.parse("w2a8")), layer(Policy.parse("w4"))

        def __call__(self, x):
            return self.used(x)

    lines = qat.nnx.error_table(qat.nnx.quantization_errors(Two(), normal(3, 32))).splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["layer", "operand", "format"],
        ["used", "weights", "int2/channel"],
        ["used", "activations", "int8/tensor"],
        ["other", "weights", "int4/channel"],
    ]
    assert lines[-1].endswith("not reached")


def test_values_that_are_not_numbers_come_first():
    model = layer(Policy.parse("w2a8"))
    errors = qat.nnx.quantization_errors(model, jnp.full((2, 32), jnp.nan))
    worst = qat.nnx.error_table(errors).splitlines()[1]
    assert worst.startswith("(root)")
    assert "nan%" in worst


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nnx.Linear(32, 4, rngs=nnx.Rngs(0)), "no quantized layer"),
        (layer(Policy.parse("w8a8, native")), "multiplies natively; expected .* mode 'fake'"),
    ],
)
def test_what_cannot_be_measured_is_an_error(model, message):
    with pytest.raises(ValueError, match=message):
        qat.nnx.quantization_errors(model, normal(2, 32))


@pytest.mark.parametrize(
    "name",
    ["none", "int2", "int16", "int8full", "uint4", "binary", "bf16", "fp16", "nf4"],
)
def test_formats_in_a_state_have_their_names(name):
    assert format_name(Quantizer(name).traced().grid) == name


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e2m1", "e4m3fnuz", "e3m4ieee"])
def test_floats_in_a_state_have_their_names(name):
    assert format_name(Quantizer(name).traced().grid) == name


def test_formats_of_one_s_own_have_no_name():
    assert format_name(codebook("mine", [-1.0, 0.5, 2.0]).grid()) == "custom"
    odd = dataclasses.replace(parse_format("int4"), name="odd", max_value=5.0)
    assert format_name(odd.grid()) == "custom"
