"""HQQ against its iteration written for one group in float64, and against rounding to nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.ptq.hqq import round_hqq
from qat.ptq.rtn import dequantized, round_to_nearest
from qat.quantizer import Quantizer

QUANTIZERS = [
    *("int2/channel", "int3/channel", "int4/channel", "int8/channel", "binary/channel"),
    *("mxfp4", "mxint8", "nvfp4", "nf4", "int4/channel/mse", "e2m1/tensor"),
    *("uint4/channel/zero_point", "uint2/block:16/zero_point", "none/channel", "bf16/channel"),
]


def weight_of(seed=0, inputs=64, outputs=32):
    """Heavy-tailed, as trained weights are."""
    return np.random.default_rng(seed).standard_t(4, (inputs, outputs)).astype(np.float32) / 50


def column_errors(weight, rounded):
    return (np.abs(weight.astype(np.float64) - rounded) ** 0.7).sum(axis=0)


def shrunk(error, beta):
    with np.errstate(divide="ignore"):
        return np.sign(error) * np.maximum(np.abs(error) - np.abs(error) ** -0.3 / beta, 0)


def symmetric_errors(column, largest):
    """Of each iteration on one group of symmetric integers, rounding to nearest first."""
    scale = np.abs(column).max() / largest
    for i in range(21):
        values = np.clip(np.rint(column / scale), -largest, largest)
        yield (np.abs(column - values * scale) ** 0.7).sum()
        target = column / scale - shrunk(column / scale - values, 1.1**i)
        scale = scale * (values @ target) / (values @ values)


def shifted_errors(column, codes):
    """Of each iteration on one group of integers with a zero point."""
    low, high = min(column.min(), 0), max(column.max(), 0)
    scale = (high - low) / (codes - 1)
    zero = -np.rint(low / scale)

    def rounded(scale, zero):
        values = np.clip(np.rint(column / scale) + zero, 0, codes - 1) - zero
        return values, (np.abs(column - values * scale) ** 0.7).sum()

    yield rounded(scale, zero)[1]
    for i in range(20):
        values, _ = rounded(scale, zero)
        target = column / scale - shrunk(column / scale - values, 1.1**i)
        below = zero + np.floor((values - target).mean())
        scale = scale * (values @ target) / (values @ values)
        tried = [np.clip(z, 0, codes - 1) for z in (below, below + 1)]
        zero = min(reversed(tried), key=lambda z: rounded(scale, z)[1])
        yield rounded(scale, zero)[1]


@pytest.mark.parametrize(
    ("name", "errors"),
    [
        ("int3/channel", lambda column: symmetric_errors(column, 3)),
        ("int4/channel", lambda column: symmetric_errors(column, 7)),
        ("uint4/channel/zero_point", lambda column: shifted_errors(column, 16)),
        ("uint2/channel/zero_point", lambda column: shifted_errors(column, 4)),
    ],
)
def test_the_best_of_the_iteration_is_kept(name, errors):
    """Rounding a value the other way may lead elsewhere, in one column of a hundred."""
    weight = weight_of(outputs=200)
    rounded = dequantized(*round_hqq(jnp.asarray(weight), Quantizer.parse(name)))
    ours = column_errors(weight, rounded)
    expected = np.array([min(errors(column)) for column in weight.astype(np.float64).T])
    assert np.mean(np.abs(ours / expected - 1) < 1e-4) > 0.98


@pytest.mark.parametrize("name", QUANTIZERS)
def test_no_group_is_worse_than_rounded_to_nearest(name):
    weight, quantizer = weight_of(), Quantizer.parse(name)
    values, scale = round_hqq(jnp.asarray(weight), quantizer)
    nearest = round_to_nearest(jnp.asarray(weight), quantizer)
    tile = [n // m for n, m in zip(weight.shape, scale.scale.shape, strict=True)]

    def group_errors(rounded):
        powers = np.abs(weight.astype(np.float64) - rounded) ** 0.7
        split = powers.reshape(scale.scale.shape[0], tile[0], scale.scale.shape[1], tile[1])
        return split.sum(axis=(1, 3))

    before, after = (group_errors(dequantized(*r)) for r in (nearest, (values, scale)))
    assert (after <= before * (1 + 1e-5)).all()
    if quantizer.bits <= 4 and quantizer.scale_format != "e8m0":
        assert after.sum() < 0.99 * before.sum()
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), scale, nearest[1])


def test_scales_stay_in_their_format():
    weight = jnp.asarray(weight_of())
    mantissa, _ = np.frexp(round_hqq(weight, Quantizer.parse("mxfp4"))[1].scale)
    assert (mantissa == 0.5).all()
    quantizer = Quantizer.parse("nvfp4")
    scale, of_rtn = round_hqq(weight, quantizer)[1], round_to_nearest(weight, quantizer)[1]
    np.testing.assert_array_equal(scale.tensor_scale, of_rtn.tensor_scale)
    np.testing.assert_array_equal(scale.scale, scale.scale.astype(jnp.float8_e4m3fn))
    zero_point = round_hqq(weight, Quantizer.parse("uint3/channel/zero_point"))[1].zero_point
    assert set(np.unique(zero_point)) <= set(range(8))


def test_an_outlier_does_not_set_the_scale():
    """Weights on a grid but for one: they stay where they are, where rounding moves them all."""
    random = np.random.default_rng(0)
    weight = random.integers(-3, 4, (256, 8)).astype(np.float32) * 0.02
    weight[0], weight[1] = 0.06, 0.07
    kept = dequantized(*round_hqq(jnp.asarray(weight), Quantizer.parse("int3/channel")))
    moved = dequantized(*round_to_nearest(jnp.asarray(weight), Quantizer.parse("int3/channel")))
    assert np.abs(kept - weight)[2:].max() < 1e-3 < np.abs(moved - weight)[2:].max()


def test_a_scaled_weight_has_scaled_scales():
    weight, quantizer = jnp.asarray(weight_of()), Quantizer.parse("int3/channel")
    values, scale = round_hqq(weight, quantizer)
    for factor in (2.0**-40, 2.0**60):
        same, scaled = round_hqq(weight * factor, quantizer)
        assert np.mean(np.asarray(same) == values) > 0.99
        np.testing.assert_allclose(scaled.scale, scale.scale * factor, rtol=1e-2)


def test_zeros_and_what_is_not_a_number():
    weight = jnp.asarray(weight_of()).at[:, 1].set(0).at[5, 2].set(jnp.nan)
    for name in ("int3/channel", "uint4/channel/zero_point", "nvfp4"):
        rounded = np.asarray(dequantized(*round_hqq(weight, Quantizer.parse(name))))
        assert not rounded[:, 1].any()
        assert np.isnan(rounded[:16, 2]).all()
        assert np.isfinite(np.delete(rounded, 2, axis=1)).all()
