"""Stochastic rounding: right on average, one of two neighbours, and a function of key and place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.dot_general import dot_general
from qat.formats import codebook, parse_format
from qat.grid import round_to_grid
from qat.noise import random_bits
from qat.policy import Policy
from qat.quantization import fake_quant, quantize
from qat.quantizer import Quantizer
from qat.scales import scale_for
from tests import numpy_oracle as oracle
from tests.checks import applied, assert_same_bits
from tests.numpy_oracle import Spec

DRAWS = 100_000
VALUES = 24  # a format
DENSE = (((1,), (0,)), ((), ()))
INTEGERS = [f"int{b}" for b in range(1, 17)]
FULL_RANGE = [f"int{b}full" for b in (2, 3, 4, 8, 16)]
UNSIGNED = [f"uint{b}" for b in (1, 2, 3, 4, 8, 16)]
FLOATS = [f"e{x}m{y}" for x in range(1, 9) for y in (0, 1, 2, 3, 7, 10)]
FLOATS += ["e4m3ieee", "e5m2ieee", "e4m3fnuz", "e5m2fnuz", "bf16", "fp16"]
GRIDS = [*INTEGERS, *FULL_RANGE, *UNSIGNED, "ternary", *FLOATS]
CODEBOOKS = {"nf4": oracle.NF4, "mine": (-2.0, -0.5, 0.0, 1.0, 3.0, *range(4, 15))}


@jax.jit
def statistics(y, grid, key):
    """Of DRAWS draws of each y: the smallest, the largest, and how often the largest came."""
    noise = random_bits(key, (DRAWS, *y.shape))
    drawn = round_to_grid(jnp.broadcast_to(y, noise.shape), grid, noise)
    largest = drawn.max(axis=0, keepdims=True)
    return drawn.min(axis=0), largest[0], jnp.mean((drawn == largest).astype(jnp.float32), axis=0)


def values_inside(fmt, seed=0):
    """Of both signs: anywhere, between the smallest values, far below the smallest, on values."""
    random = np.random.default_rng(seed)
    positive = fmt.values[fmt.values > 0]
    spread = np.log2(positive[-1]) - np.log2(positive[0]) + 6
    anywhere = positive[-1] * 2.0 ** -random.uniform(0, spread, VALUES // 3)
    near_top = random.uniform(0, 1, VALUES // 6) * positive[-1]
    tiny = positive[0] * np.array([0.9, 0.5, 0.1, 1e-3, 1e-5, 1e-9])
    special = [0.0, positive[0], positive[-1], positive[-1] * 0.999]
    magnitudes = np.concatenate([anywhere, near_top, tiny[: VALUES // 4], special])
    random.shuffle(sign := np.resize([1.0, -1.0], magnitudes.size))
    y = np.resize(np.clip(magnitudes * sign, fmt.lowest, fmt.highest), VALUES).astype(np.float32)
    return oracle.flushed(y)


def assert_unbiased(y, fmt, low, high, frequency, draws=DRAWS):
    """Draws are the neighbours of y; the mean is y within 4 standard errors and 2**-23 of a step.

    The frequency of the upper neighbour is binomial; its standard error is the exact one.
    """
    below, above = oracle.neighbours(y, fmt)
    assert ((low == below) | (low == above)).all()
    assert ((high == below) | (high == above)).all()
    gap = np.where(above > below, above - below, 1)
    wanted = (y.astype(np.float64) - below) / gap
    drawn = np.where(high == above, frequency, 0)
    drawn = np.where(above == below, wanted, drawn)
    standard_error = np.sqrt(wanted * (1 - wanted) / draws)
    assert (np.abs(drawn - wanted) <= 4 * standard_error + 2.0**-23).all()


@pytest.mark.parametrize("name", [*GRIDS, *CODEBOOKS])
def test_the_mean_of_many_draws_is_the_value(name):
    levels = CODEBOOKS.get(name)
    fmt = oracle.from_levels(levels) if levels else oracle.values_of(name)
    grid = (codebook(name, levels) if levels else parse_format(name)).grid()
    y = values_inside(fmt)
    assert_unbiased(y, fmt, *statistics(y, grid, jax.random.key(len(name))))


def test_values_outside_the_range_become_its_ends():
    for name in ("int4", "int4full", "uint4", "e4m3", "binary", "nf4"):
        fmt = oracle.values_of(name)
        y = np.resize(np.float32([np.inf, -np.inf, 1e30, -1e30]), VALUES)
        low, high, _ = statistics(y, parse_format(name).grid(), jax.random.key(0))
        np.testing.assert_array_equal(low, np.where(y > 0, fmt.highest, fmt.lowest))
        np.testing.assert_array_equal(high, low)


SCALED = {  # how values reach the grid: the row is drawn DRAWS times, each row its own group
    "token": Spec("int4", "token"),
    "token int8": Spec("int8", "token"),
    "token binary": Spec("binary", "token"),
    "token e2m1": Spec("e2m1", "token"),
    "full range": Spec("int4full", "token"),
    "unsigned": Spec("uint4", "token"),
    "codebook": Spec("nf4", "token"),
    "blocks": Spec("int3", "block", 8),
    "mxfp8": Spec.named("mxfp8"),
    "mxfp4": Spec.named("mxfp4"),
    "mxint8": Spec.named("mxint8"),
    "nvfp4": Spec.named("nvfp4"),
    "zero point": Spec("uint4", "token", zero_point=True),
    "zero point, signed": Spec("int4", "token", zero_point=True),
    "zero point, wide": Spec("int8full", "token", zero_point=True),
}
ROWS = {
    "normal": np.random.default_rng(0).standard_normal(32),
    "one outlier": np.where(np.arange(32) == 3, 40.0, np.random.default_rng(1).standard_normal(32)),
    "just above a power of two": np.append(np.linspace(-1.0, 1.0, 31), 1.99),
    "tiny": 1e-20 * np.random.default_rng(2).standard_normal(32),
}


@jax.jit
def draws_of_a_row(row, quantizer, key):
    """Mean and standard deviation of DRAWS errors over the row's largest magnitude; both ends, and
    how many draws lie between those.
    """
    x = jnp.broadcast_to(row, (DRAWS, row.size))
    drawn = fake_quant(x, quantizer, 1, key)
    size = jnp.max(jnp.abs(row))
    centred = (drawn - x) / size  # so that float32 sums and squares keep their digits
    ends = drawn.min(axis=0), drawn.max(axis=0)
    between = jnp.sum((drawn != ends[0][None]) & (drawn != ends[1][None]))
    return centred.mean(axis=0), centred.std(axis=0), ends, between


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", SCALED)
def test_scales_saturate_nothing_and_keep_the_mean(case, row):
    """Every scale is rounded up, so that even the largest value keeps its expectation."""
    spec, x = SCALED[case], ROWS[row].astype(np.float32)
    if case == "unsigned":
        x = np.abs(x)
    quantizer = Quantizer(
        spec.format,
        spec.granularity,
        spec.block_size,
        scale_format=spec.scale_format,
        zero_point=spec.zero_point,
        rounding="stochastic",
    )
    mean, deviation, (low, high), between = draws_of_a_row(x, quantizer.traced(), jax.random.key(7))
    assert between == 0
    size, rounding = np.abs(x).max(), 2.0**-19  # of scales and products in float32
    assert (low <= x + rounding * size).all()
    assert (high >= x - rounding * size).all()
    standard_error = np.maximum(deviation, (high - low) / size / np.sqrt(DRAWS)) / np.sqrt(DRAWS)
    np.testing.assert_array_less(np.abs(mean), 4 * standard_error + rounding)


@jax.jit
def compiled_scales(x, quantizer):
    return scale_for(x, quantizer, 0)


@pytest.mark.parametrize(
    "spec",
    [
        Spec("int4", "channel", up=True),
        Spec("e2m1", "channel", up=True),
        Spec("int4full", "channel", up=True),
        Spec.named("mxfp8", up=True),
        Spec.named("mxint8", up=True),
        Spec.named("nvfp4", up=True),
    ],
    ids=str,
)
def test_scales_are_rounded_up_as_in_numpy(spec):
    x = np.random.default_rng(0).standard_normal((64, 24)).astype(np.float32)
    x *= (10.0 ** np.linspace(-30, 30, 24)).astype(np.float32)
    x[3, :12] = 2.0 ** np.arange(-6, 6)
    quantizer = Quantizer(
        spec.format,
        spec.granularity,
        spec.block_size,
        scale_format=spec.scale_format,
        rounding="stochastic",
    )
    scale, _, tensor_scale = oracle.scales(x, spec, 0)
    actual, _, actual_tensor_scale = applied(compiled_scales(x, quantizer.traced()))
    np.testing.assert_array_equal(actual, scale)
    assert actual_tensor_scale == tensor_scale
    reach = scale * (tensor_scale or 1) * spec.values.highest
    largest = oracle.magnitudes(x, spec.values).reshape(scale.shape[0], -1, 24).max(axis=1)
    assert (largest <= reach * (1 + 2.0**-22)).all()


STOCHASTIC = ["int4/channel", "mxfp4", "nf4", "uint4/channel/zero_point"]


@pytest.mark.parametrize("text", STOCHASTIC)
def test_draws_depend_on_the_key_alone_and_stored_ones_are_the_same(text):
    x = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    quantizer = Quantizer.parse(f"{text}/stochastic")

    @jax.jit
    def both(x, key):
        return fake_quant(x, quantizer, 0, key), quantize(x, quantizer, 0, key).dequantize()

    first, stored = both(x, jax.random.key(0))
    assert_same_bits(stored, first)
    assert_same_bits(both(x, jax.random.key(0))[0], first)
    assert 0.05 < np.mean(np.asarray(both(x, jax.random.key(1))[0] != first)) < 0.95


def test_a_traced_format_draws_what_a_named_one_draws():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)), jnp.float32)
    quantizer = Quantizer("e3m2", "channel", rounding="stochastic")
    key = jax.random.key(5)
    traced = jax.jit(fake_quant, static_argnums=2)(x, quantizer.traced(), 0, key)
    named = jax.jit(functools.partial(fake_quant, quantizer=quantizer, axis=0))
    assert_same_bits(named(x, key=key), traced)


def test_raw_keys_and_typed_ones_are_the_same():
    typed = random_bits(jax.random.key(3), (100,))
    np.testing.assert_array_equal(random_bits(jax.random.PRNGKey(3), (100,)), typed)


def test_each_position_draws_for_itself():
    """Equal values in equal groups do not round alike."""
    quantizer = Quantizer("int2", "channel", rounding="stochastic")
    x = jnp.full((4096, 2), 0.5).at[0].set(1.0)
    drawn = jax.jit(fake_quant, static_argnums=2)(x, quantizer.traced(), 0, jax.random.key(0))
    up = np.asarray(drawn)[1:] > 0.5
    assert (abs(up.mean(axis=0) - 0.5) < 0.04).all()
    assert abs(np.corrcoef(up.T)[0, 1]) < 0.08
    assert abs(np.corrcoef(up[1:, 0], up[:-1, 0])[0, 1]) < 0.08


def test_both_operands_of_a_contraction_draw_for_themselves():
    """One key serves a whole layer."""
    row = jnp.full((1, 4096), 0.5).at[0, 0].set(1.0)
    quantizer = Quantizer("int2", "tensor", rounding="stochastic")

    @jax.jit
    def both(row):
        key, one = jax.random.key(0), jnp.eye(1)
        as_x = dot_general(Policy(activations=quantizer), key)(row.T, one, DENSE)
        as_w = dot_general(Policy(weights=quantizer), key)(one, row, DENSE)
        return as_x[1:, 0], as_w[0, 1:]

    drawn = np.stack(both(row)) > 0.5
    assert abs(np.corrcoef(drawn)[0, 1]) < 0.08


def test_a_missing_key_is_an_error():
    x, quantizer = jnp.ones((4, 4)), Quantizer("int4", rounding="stochastic")
    for function in (fake_quant, quantize):
        with pytest.raises(ValueError, match="needs a key"):
            jax.eval_shape(lambda x, function=function: function(x, quantizer, 0), x)
    policy = dataclasses.replace(Policy.parse("w4a8"), gradients=quantizer)
    dot = functools.partial(dot_general(policy), dimension_numbers=DENSE)
    with pytest.raises(ValueError, match="needs a key"):
        jax.eval_shape(jax.grad(lambda x: dot(x, x).sum()), x)


@functools.cache
def noise(seed, shape=(1024, 1024)):
    key = jax.random.fold_in(jax.random.key(seed), 9) if seed > 2 else jax.random.key(seed)
    return np.asarray(random_bits(key, shape))


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_uniform(seed):
    """Each of 256 values of the first, second and third byte as often; a χ² of 255 freedoms."""
    for shift in (24, 16, 8):
        counts = np.bincount((noise(seed).ravel() >> shift) & 0xFF, minlength=256)
        expected = noise(seed).size / 256
        chi_squared = np.square(counts - expected).sum() / expected
        assert 255 - 5 * np.sqrt(510) < chi_squared < 255 + 5 * np.sqrt(510)


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_neighbours_is_uncorrelated(seed):
    """Along both axes, at distances that are powers of two, and jointly in 16 × 16 cells."""
    unit = noise(seed) / 2.0**32 - 0.5
    for distance in (1, 2, 16, 256, 512):
        for pair in (
            (unit[distance:], unit[:-distance]),
            (unit[:, distance:], unit[:, :-distance]),
        ):
            correlation = np.mean(pair[0] * pair[1]) * 12
            assert abs(correlation) < 5 / np.sqrt(pair[0].size)
    cells = (noise(seed)[:, 1:] >> 28).astype(np.int64) * 16 + (noise(seed)[:, :-1] >> 28)
    counts = np.bincount(cells.ravel(), minlength=256)
    expected = cells.size / 256
    assert np.square(counts - expected).sum() / expected < 255 + 5 * np.sqrt(510)


def test_noise_of_different_keys_is_uncorrelated():
    units = np.stack([noise(seed).ravel() / 2.0**32 - 0.5 for seed in range(5)])
    correlations = np.corrcoef(units) - np.eye(5)
    assert np.abs(correlations).max() < 5 / np.sqrt(units.shape[1])


def test_one_position_is_uniform_over_keys():
    """The first element too, under keys that count up as steps do."""
    keys = jax.random.split(jax.random.key(0), 20_000)
    counted = jax.vmap(jax.random.key)(jnp.arange(20_000))
    for many in (keys, counted):
        drawn = np.asarray(jax.jit(jax.vmap(lambda k: random_bits(k, (4,))))(many)) / 2.0**32
        assert (np.abs(drawn.mean(axis=0) - 0.5) < 5 * np.sqrt(1 / 12 / 20_000)).all()
        assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 5 / np.sqrt(20_000)
