"""What the tests of quantization share: a matrix of difficult columns, and comparisons of bits.

The matrix has a column for every second decade from 1e-30 to 1e30, for powers of two and their
neighbours, ties, outliers, zeros, one sign, NaN and infinity.
"""

import dataclasses
import functools

import jax
import numpy as np

from qat.formats import codebook
from qat.quantization import fake_quant
from qat.quantizer import Quantizer
from qat.scales import scale_for

ROWS = 64  # of the matrix


@functools.partial(jax.jit, static_argnames="axis")
def compiled(x, quantizer, axis=0):
    """Quantized values and scales, one program for all traced formats of a structure."""
    return fake_quant(x, quantizer, axis), scale_for(x, quantizer, axis)


def quantizer_of(spec):
    """A quantizer by its fields; named ones are parsed elsewhere."""
    fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    del fields["up"], fields["format"]
    levels = fields.pop("levels")
    return Quantizer(codebook(spec.format, levels) if levels else spec.format, **fields)


def assert_same(actual, expected):
    """Equal, and NaN in the same places; zeros of either sign are equal."""
    actual = np.asarray(actual)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual.astype(np.float32), expected.astype(np.float32))


def assert_same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    unsigned = f"uint{8 * actual.dtype.itemsize}"
    both_nan = np.isnan(actual) & np.isnan(expected)
    np.testing.assert_array_equal(
        np.where(both_nan, 0, actual.view(unsigned)), np.where(both_nan, 0, expected.view(unsigned))
    )


def applied(scale):
    """Float64 scales as the oracle has them: (scale, zero point, tensor scale)."""
    levels = (scale.scale, scale.zero_point, scale.tensor_scale)
    blocks, zero_point, tensor_scale = (
        None if a is None else np.asarray(a, np.float64) for a in levels
    )
    zero_point = np.zeros_like(blocks) if zero_point is None else zero_point
    return blocks, zero_point, None if tensor_scale is None else float(tensor_scale.item())


def columns_of_magnitudes(random):
    """Normal columns of every second decade; powers of two and their neighbours as largest."""
    for decade in range(-30, 31, 2):
        yield random.standard_normal(ROWS) * 10.0**decade
    one = np.float32(1)
    beside = [np.nextafter(one, np.float32(0)), np.nextafter(one, np.float32(2))]
    for exponent in (-100, -41, 0, 40, 99):
        for largest in (1.0, *beside, 1.5, 1.75, 1.875):
            column = random.uniform(-1, 1, ROWS)
            column[random.integers(ROWS)] = random.choice([-1, 1]) * largest
            yield column * 2.0**exponent


def columns_of_features(random):
    """Outliers, zeros, integers and half-integers (ties), one sign, a constant."""
    for position, value in ((7, 3.3), (40, -3.3e-20), (63, 2.0**-100)):
        yield np.where(np.arange(ROWS) == position, value, 0.0)
    for outlier in (1e4, -1e4, 1e30):
        yield np.where(np.arange(ROWS) == 9, outlier, random.standard_normal(ROWS))
    yield from (np.zeros(ROWS), np.full(ROWS, -2.5), np.full(ROWS, 7.0))
    yield from (sign * np.abs(random.standard_normal(ROWS)) for sign in (-1, 1))
    for largest in (3, 7, 8, 15, 127):
        yield random.integers(-largest, largest + 1, ROWS).astype(float)
        yield random.integers(-2 * largest, 2 * largest + 1, ROWS) / 2
    yield from (random.standard_normal(ROWS) * 10.0 ** random.uniform(-20, 0, ROWS) for _ in "ab")


@functools.cache
def matrix(poisoned=True):
    """(ROWS, columns) float32, and a last few columns with one NaN or infinity each."""
    random = np.random.default_rng(0)
    columns = [*columns_of_magnitudes(random), *columns_of_features(random)]
    bad = (np.nan, np.inf, -np.inf) if poisoned else ()
    columns += [np.where(np.arange(ROWS) == 11, b, random.standard_normal(ROWS)) for b in bad]
    return np.stack(columns, axis=1).astype(np.float32)
