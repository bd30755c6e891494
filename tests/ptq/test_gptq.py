"""GPTQ against the published recursion in float64: the same codes, for every kind of quantizer."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.ptq.gptq import Feedback, Gptq, feedback, round_gptq, round_with_feedback
from qat.ptq.rtn import dequantized, round_to_nearest
from qat.ptq.statistics import Statistics, output_error
from qat.quantization import fake_quant
from qat.quantizer import Quantizer
from tests import numpy_oracle as oracle
from tests.checks import quantizer_of
from tests.numpy_oracle import Spec

# A block that divides no number of rows, and one compiled program for all.
ACT_ORDER = Gptq(block=40)
SETTINGS = {"act order": ACT_ORDER, "in order": Gptq(act_order=False, damping=0.05, block=40)}
DYNAMIC = Gptq(act_order=False, static_groups=False)


@functools.cache
def problem(inputs=96, outputs=24, tokens=300, dead=0, seed=0):
    """A weight and the second moment of correlated inputs of different sizes, float32."""
    random = np.random.default_rng(seed)
    sizes = np.exp(random.standard_normal(inputs))
    sizes[inputs - dead :] = 0
    low_rank = random.standard_normal((tokens, 8)) @ random.standard_normal((8, inputs))
    x = (low_rank + 0.5 * random.standard_normal((tokens, inputs))) * sizes
    weight = random.standard_normal((inputs, outputs)).astype(np.float32)
    return weight, np.asarray(Statistics.zeros(inputs).add(jnp.asarray(x)).second_moment_KK)


def nearest(row, scale, zero_point, spec):
    """Values of the grid, without the zero point, nearest to a row of weights."""
    y = row / scale
    shifted = np.rint(y) + zero_point if spec.zero_point else y
    return oracle.nearest(shifted, spec.values)[0] - zero_point


def least_squares_scales(weight, spec):
    """Of each column: the range of a hundred with the least squared error."""
    scale = np.ones((1, weight.shape[1]))
    for n, column in enumerate(weight.T):
        amax = np.abs(column).max()
        errors = {}
        for i in range(100):
            tried = oracle.float32_scale(amax * np.float32(1 - np.float32(i) * 0.008), spec.values)
            rounded = nearest(column.astype(np.float64), tried, 0, spec) * tried
            errors.setdefault(np.square(rounded - column).sum(), tried)
        scale[0, n] = errors[min(errors)]
    return scale, np.zeros_like(scale), None


def scales_of(weight, spec, tensor_scale=None):
    """(applied scale, zero point) of every weight, float64."""
    if spec.scale == "mse":
        scale, zero_point, levels = least_squares_scales(weight, spec)
    else:
        scale, zero_point, levels = oracle.scales(weight, spec, 0)
    if tensor_scale is not None:  # a block of a tensor whose scale is known
        blocks, *_ = oracle.scales(weight, Spec(spec.format, "block", spec.block_size), 0)
        scale = np.maximum(
            oracle.nearest(blocks / tensor_scale, oracle.values_of("e4m3"))[0], 2.0**-6
        )
        levels = tensor_scale
    scale = scale * (1 if levels is None else levels)
    repeats = np.ones(tuple(n // m for n, m in zip(weight.shape, scale.shape, strict=True)))
    return np.kron(scale, repeats), np.kron(zero_point, repeats)


def published(weight, second_moment, spec, settings):
    """Frantar et al., algorithm 1 without its blocks: one column of Wᵀ after another, float64."""
    hessian = second_moment.astype(np.float64)
    alive = np.diagonal(hessian) > 0
    mean = np.diagonal(hessian)[alive].mean()
    hessian[~alive, ~alive] = mean
    hessian += settings.damping * mean * np.eye(len(hessian))
    order = np.arange(len(hessian))
    if settings.act_order:
        order = np.argsort(-np.diagonal(hessian), kind="stable")
    inverse = np.linalg.inv(hessian[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T
    scale, zero_point = (a[order] for a in scales_of(weight, spec))
    left = weight.astype(np.float64)[order]
    values = np.zeros_like(left)
    tensor_scale = oracle.scales(weight, spec, 0)[2] if spec.scale_format == "e4m3" else None
    tile = len(left) if settings.static_groups else np.atleast_1d(spec.block_size)[0]
    for k in range(len(left)):
        if not settings.static_groups and k % tile == 0:
            rows = slice(k, k + tile)
            updated = scales_of(left[rows].astype(np.float32), spec, tensor_scale)
            scale[rows], zero_point[rows] = updated
        values[k] = nearest(left[k], scale[k], zero_point[k], spec)
        error = (left[k] - values[k] * scale[k]) / upper[k, k]
        left[k:] -= np.outer(upper[k, k:], error)
    result = np.zeros_like(values)
    result[order] = values
    return result


SPECS = {
    "int2": Spec("int2", "channel"),
    "int3": Spec("int3", "channel"),
    "int4": Spec("int4", "channel"),
    "int8": Spec("int8", "channel"),
    "int4full": Spec("int4full", "channel"),
    "e2m1": Spec("e2m1", "channel"),
    "e4m3": Spec("e4m3", "channel"),
    "ternary": Spec("ternary", "channel", scale="absmean"),
    "binary": Spec("binary", "channel", scale="absmean"),
    "bf16": Spec("bf16", "channel"),
    "nf4": Spec("nf4", "block", 32),
    "mxfp4": Spec.named("mxfp4"),
    "mxint8": Spec.named("mxint8"),
    "nvfp4": Spec.named("nvfp4"),
    "int4/block:16": Spec("int4", "block", 16),
    "int4/block:16x8": Spec("int4", "block", (16, 8)),
    "uint4/zero_point": Spec("uint4", "channel", zero_point=True),
    "uint3/block:16/zero_point": Spec("uint3", "block", 16, zero_point=True),
    "int3/mse": Spec("int3", "channel", scale="mse"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_codes_are_those_of_the_published_algorithm(spec, settings):
    weight, moment = problem()
    quantizer = quantizer_of(spec)
    values, scale = round_gptq(jnp.asarray(weight), quantizer, jnp.asarray(moment), settings)
    np.testing.assert_array_equal(values, published(weight, moment, spec, settings))
    _, of_rtn = round_to_nearest(jnp.asarray(weight), quantizer)
    jax.tree.map(np.testing.assert_array_equal, scale, of_rtn)


@pytest.mark.parametrize("name", ["uint3/block:16/zero_point", "int4/block:16x8", "nvfp4"])
def test_scales_of_blocks_that_are_not_static_come_from_updated_rows(name):
    spec, (weight, moment) = SPECS[name], problem()
    values, scale = round_gptq(
        jnp.asarray(weight), quantizer_of(spec), jnp.asarray(moment), DYNAMIC
    )
    np.testing.assert_array_equal(values, published(weight, moment, spec, DYNAMIC))
    _, static = round_to_nearest(jnp.asarray(weight), quantizer_of(spec))
    same = jax.tree.map(lambda a, b: a.shape == b.shape and (a == b).all(), scale, static)
    assert not same.scale and same.tensor_scale in (None, True)


def test_inputs_that_are_always_zero_are_rounded_to_nearest():
    weight, moment = problem(dead=7)
    spec = SPECS["int4"]
    for settings in SETTINGS.values():
        values, _ = round_gptq(
            jnp.asarray(weight), quantizer_of(spec), jnp.asarray(moment), settings
        )
        np.testing.assert_array_equal(values, published(weight, moment, spec, settings))
    nearest_values, _ = round_to_nearest(jnp.asarray(weight), quantizer_of(spec))
    np.testing.assert_array_equal(values[-7:], nearest_values[-7:])


@pytest.mark.parametrize("name", SPECS)
def test_without_correlations_nothing_differs_from_rounding_to_nearest(name):
    weight, _ = map(jnp.asarray, problem())
    quantizer = quantizer_of(SPECS[name])
    nearest_values, _ = round_to_nearest(weight, quantizer)
    for moment in (0.3 * jnp.eye(96), jnp.zeros((96, 96))):
        values, _ = round_gptq(weight, quantizer, moment, ACT_ORDER)
        np.testing.assert_array_equal(values, nearest_values)


@pytest.mark.parametrize("name", ["int4/block:16x8", "nvfp4"])
def test_values_and_scales_make_the_weight_that_training_sees(name):
    """What this module takes for granted of rounding to nearest."""
    weight, _ = map(jnp.asarray, problem())
    quantizer = quantizer_of(SPECS[name])
    whole = fake_quant(weight, quantizer, 0)
    np.testing.assert_array_equal(dequantized(*round_to_nearest(weight, quantizer)), whole)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.integers(0, 10**6),
    st.sampled_from(["int3", "int4", "int8", "e2m1", "e4m3"]),
    st.booleans(),
)
def test_the_output_error_is_below_that_of_rounding_to_nearest(seed, name, act_order):
    """Not a theorem, but so for three bits and more wherever inputs are clearly correlated."""
    weight, moment = map(jnp.asarray, problem(tokens=200, seed=seed))
    quantizer = Quantizer(name, "channel")
    settings = Gptq(act_order=act_order, block=40)
    rounded = dequantized(*round_gptq(weight, quantizer, moment, settings))
    nearest_weight = dequantized(*round_to_nearest(weight, quantizer))
    error = output_error(weight, rounded, moment)
    assert error < 0.8 * output_error(weight, nearest_weight, moment)


@pytest.mark.parametrize("block", [1, 1000])
def test_the_block_changes_no_code(block):
    weight, moment = map(jnp.asarray, problem())
    quantizer = Quantizer.parse("int4/channel")
    values, _ = round_gptq(weight, quantizer, moment, Gptq(block=block))
    np.testing.assert_array_equal(values, round_gptq(weight, quantizer, moment, ACT_ORDER)[0])


def test_a_stack_of_weights_and_factors():
    problems = [problem(seed=seed) for seed in (1, 2, 3)]
    weights, moments = (jnp.stack(list(map(jnp.asarray, a))) for a in zip(*problems, strict=True))
    settings, quantizer = ACT_ORDER, Quantizer.parse("int3/channel")
    factors = jax.tree.map(lambda *a: jnp.stack(a), *(feedback(m, settings) for m in moments))

    def one(weight, factor):
        return round_with_feedback(weight, quantizer, factor, settings)

    values, scale = jax.vmap(one)(weights, factors)
    for i, (weight, moment) in enumerate(zip(weights, moments, strict=True)):
        alone, its_scale = round_gptq(weight, quantizer, moment, settings)
        np.testing.assert_array_equal(values[i], alone)
        np.testing.assert_array_equal(scale.scale[i], its_scale.scale)


def test_one_program_serves_all_formats():
    weight, moment = map(jnp.asarray, problem())
    factor = feedback(moment, ACT_ORDER)
    traces = []

    @jax.jit
    def program(quantizer, factor):
        traces.append(quantizer)
        return round_with_feedback(weight, quantizer, factor, ACT_ORDER)[0]

    for name in ("int2", "int5", "e3m2", "none"):
        quantizer = Quantizer(name, "channel")
        values = program(quantizer.traced(), factor)
        alone, _ = round_gptq(weight, quantizer, moment, ACT_ORDER)
        np.testing.assert_array_equal(values, alone)
    assert len(traces) == 1


def test_a_weight_that_is_not_a_number_stays_in_its_column():
    weight, moment = map(jnp.asarray, problem())
    poisoned = weight.at[40, 3].set(jnp.nan)
    values, scale = round_gptq(poisoned, Quantizer.parse("int4/channel"), moment, ACT_ORDER)
    bad = np.isnan(dequantized(values, scale))
    assert bad[:, 3].all() and not np.delete(bad, 3, axis=1).any()


def with_few_tokens():
    x = np.random.default_rng(0).standard_normal((20, 96))
    return Statistics.zeros(96).add(jnp.asarray(x, jnp.float32)).second_moment_KK


def test_few_tokens_suffice_with_damping_and_not_without():
    weight, _ = map(jnp.asarray, problem())
    quantizer = Quantizer.parse("int4/channel")
    values, _ = round_gptq(weight, quantizer, with_few_tokens(), ACT_ORDER)
    assert np.isfinite(values).all()
    with pytest.raises(ValueError, match=r"singular with damping 0: expected a larger damping"):
        round_gptq(weight, quantizer, with_few_tokens(), Gptq(damping=0))


def test_bad_input_is_named():
    weight, moment = map(jnp.asarray, problem())
    quantizer = Quantizer.parse("int4/channel")
    with pytest.raises(ValueError, match=r"not finite: expected calibration batches"):
        round_gptq(weight, quantizer, moment.at[2, 3].set(jnp.nan))
    with pytest.raises(ValueError, match=r"act_order=True, static_groups=False.*act_order=False"):
        round_gptq(weight, Quantizer.parse("mxfp4"), moment, Gptq(static_groups=False))
    with pytest.raises(ValueError, match=r"stochastic': trained weights.*expected 'int4/channel'"):
        round_gptq(weight, Quantizer.parse("int4/channel/stochastic"), moment)
    with pytest.raises(ValueError, match=r"damping: expected a finite number from 0, got -0\.1"):
        Gptq(damping=-0.1)
    with pytest.raises(ValueError, match="block: expected an integer above 0, got 0"):
        Gptq(block=0)


def test_the_factor_is_a_pytree_of_two_arrays():
    factor = feedback(jnp.asarray(problem()[1]), Gptq())
    assert isinstance(factor, Feedback)
    assert sorted(factor.order_K.tolist()) == list(range(96))
    matrix = np.asarray(factor.matrix_KK)
    assert matrix.dtype == np.float32 and not np.triu(matrix).any()
