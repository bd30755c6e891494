"""Rounding and codes, bit for bit against ml_dtypes, gfloat and NumPy in float64."""

import re

import gfloat
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qat.formats import parse_format
from qat.grid import NAN_CODE, decode, encode, round_to_grid

ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e3m4ieee": ml_dtypes.float8_e3m4,
    "e4m3ieee": ml_dtypes.float8_e4m3,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
    "e5m2": ml_dtypes.float8_e5m2,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}
WIDE_DTYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}
INTEGERS = [f"int{bits}" for bits in range(2, 17)]
FLOATS = [f"e{x}m{y}" for x in range(1, 9) for y in range(11)]
GFLOATS = [(x, y) for x in range(1, 9) for y in range(8)]
IEEE = [f"e{x}m{y}ieee" for x in range(2, 9) for y in range(11)]
NAMED = ["none", "bf16", "fp16", "ternary", "binary", "e4m3fnuz", "e4m3b11fnuz", "e5m2fnuz"]
ALL = [*INTEGERS, *FLOATS, *IEEE, *NAMED]

PADDED = 2**13  # one compiled program serves every test
FLOAT32_MAX = np.finfo(np.float32).max
SMALLEST_NORMAL = np.finfo(np.float32).tiny

_round = jax.jit(round_to_grid)
_encode = jax.jit(encode)
_decode = jax.jit(decode)


def in_chunks(function, x, name):
    """`function` of a padded flat array, so that every length shares one program."""
    padded = np.zeros(-(-x.size // PADDED) * PADDED, x.dtype)
    padded[: x.size] = x
    grid = parse_format(name).grid()
    chunks = [np.asarray(function(chunk, grid)) for chunk in padded.reshape(-1, PADDED)]
    return np.concatenate(chunks)[: x.size]


def rounded(x, name):
    return in_chunks(_round, x, name)


def inputs(magnitudes):
    """Random, boundary, tie, subnormal, zero and huge inputs of both signs, float32."""
    random = np.random.default_rng(0)
    with np.errstate(over="ignore"):
        boundary = magnitudes.astype(np.float32)
    boundary = boundary[np.isfinite(boundary)]
    tie = ((boundary[1:].astype(np.float64) + boundary[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(v, np.float32(to)) for v in (boundary, tie) for to in (0, np.inf)]
    decades = random.standard_normal(500) * 10.0 ** random.uniform(-44, 38, 500)
    near = random.uniform(0, 1.2, 500) * min(float(boundary.max()), 1e38)
    bits = random.integers(0, 0x7F800000, 500, dtype=np.int32).view(np.float32)
    extreme = np.array([0, 1e-45, 1e-40, SMALLEST_NORMAL, 1e30, 1e38, FLOAT32_MAX])
    parts = [boundary, tie, *beside, decades, near, bits, extreme]
    x = np.concatenate([part.astype(np.float32) for part in parts])
    x = x[np.isfinite(x)]
    return np.concatenate([x, -x])


def magnitudes_of_dtype(dtype):
    """Every finite magnitude of an ml_dtypes or NumPy float, by its bit patterns."""
    bits = np.dtype(dtype).itemsize * 8
    values = np.arange(2**bits, dtype=f"uint{bits}").view(dtype).astype(np.float32)
    return np.unique(np.abs(values[np.isfinite(values)]))


def cast(x, dtype):
    """`x` through `dtype` and back, saturating."""
    largest = magnitudes_of_dtype(dtype).max()
    return np.clip(x, -largest, largest).astype(dtype)


def gfloat_format(exponent_bits, mantissa_bits):
    return gfloat.FormatInfo(
        f"e{exponent_bits}m{mantissa_bits}",
        1 + exponent_bits + mantissa_bits,
        mantissa_bits + 1,
        bias=2 ** (exponent_bits - 1) - 1,
        is_signed=True,
        domain=gfloat.Domain.Finite,
        has_nz=True,
        num_high_nans=0,
        has_subnormals=True,
        is_twos_complement=False,
    )


@pytest.mark.parametrize("name", [*ML_DTYPES, *WIDE_DTYPES])
def test_rounds_as_ml_dtypes_casts(name):
    dtype = (ML_DTYPES | WIDE_DTYPES)[name]
    x = inputs(magnitudes_of_dtype(dtype))
    np.testing.assert_array_equal(rounded(x, name), cast(x, dtype).astype(np.float32))


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_round_as_numpy_rint(name):
    largest = 2 ** (int(name[3:]) - 1) - 1
    x = inputs(np.arange(largest + 1))
    expected = np.clip(np.rint(x.astype(np.float64)), -largest, largest)
    np.testing.assert_array_equal(rounded(x, name), expected)


@pytest.mark.parametrize("dtype", [ml_dtypes.int2, ml_dtypes.int4])
def test_integers_are_values_of_ml_dtypes(dtype):
    largest = int(ml_dtypes.iinfo(dtype).max)
    x = inputs(np.arange(largest + 1))
    expected = np.clip(np.rint(x), -largest, largest).astype(dtype)
    np.testing.assert_array_equal(rounded(x, np.dtype(dtype).name), expected.astype(np.float32))


@pytest.mark.parametrize(("exponent_bits", "mantissa_bits"), GFLOATS)
def test_every_exmy_rounds_as_gfloat(exponent_bits, mantissa_bits):
    fmt = parse_format(f"e{exponent_bits}m{mantissa_bits}")
    oracle = gfloat_format(exponent_bits, mantissa_bits)
    x = inputs(gfloat.decode_ndarray(oracle, np.arange(2 ** (oracle.k - 1))))
    expected = gfloat.round_ndarray(oracle, x.astype(np.float64), sat=True)
    # OCP and float32 end some formats earlier than their codes do.
    expected = np.clip(expected, -fmt.max_value, fmt.max_value)
    np.testing.assert_array_equal(rounded(x, fmt.name), expected)
    if exponent_bits < 8 and fmt.name not in ("e4m3", "e5m2"):
        assert fmt.max_value == oracle.max


def test_e8m0_rounds_as_ml_dtypes_except_at_ties():
    """float8_e8m0fnu, a scale without zero and sign, takes the larger power at a tie."""
    x = inputs(2.0 ** np.arange(-126, 128))
    x = x[(x >= SMALLEST_NORMAL) & (x <= 2.0**127)]
    ours = rounded(x, "e8m0")
    theirs = x.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    tie = np.frexp(x)[0] == 0.75
    np.testing.assert_array_equal(ours[~tie], theirs[~tie])
    np.testing.assert_array_equal(theirs[tie], 2.0 ** np.ceil(np.log2(x[tie].astype(np.float64))))
    np.testing.assert_array_equal(np.abs(np.log2(ours[tie])) % 2, 1)  # the even code


@pytest.mark.parametrize("name", ["int4", "ternary", "e2m1", "e4m3", "e5m2ieee", "e8m3", "bf16"])
def test_nan_stays_and_infinity_saturates(name):
    largest = parse_format(name).max_value
    x = np.array([np.nan, np.inf, -np.inf, FLOAT32_MAX, -FLOAT32_MAX], np.float32)
    expected = np.array([np.nan, largest, -largest, largest, -largest], np.float32)
    np.testing.assert_array_equal(rounded(x, name), expected)


@pytest.mark.parametrize("name", [name for name in ALL if name != "binary"])
def test_zero_results_are_positive(name):
    smallest_step = 2.0 ** (parse_format(name).min_exponent - parse_format(name).mantissa_bits)
    x = np.array([0, -0.0, -0.49 * smallest_step], np.float32)
    np.testing.assert_array_equal(rounded(x, name).view(np.int32), 0)


def test_none_is_float32_itself():
    """Subnormals too, since rounding does no float arithmetic that a backend could flush."""
    x = np.concatenate([inputs(np.array([0.0, 1.0])), np.float32([np.inf, -np.inf])])
    np.testing.assert_array_equal(rounded(x, "none"), x)


def test_binary_is_the_sign():
    x = np.float32([3, 1e-30, 0, -1e-30, -7, np.inf])
    np.testing.assert_array_equal(rounded(x, "binary"), [1, 1, 1, -1, -1, 1])


def test_only_float32_is_rounded():
    with pytest.raises(TypeError, match="bfloat16"):
        round_to_grid(jnp.ones(3, jnp.bfloat16), parse_format("int4").grid())


@pytest.mark.parametrize("name", ML_DTYPES)
def test_codes_are_the_bit_patterns_of_ml_dtypes(name):
    x = inputs(magnitudes_of_dtype(ML_DTYPES[name]))
    values = cast(x, ML_DTYPES[name])
    patterns = np.abs(values).view(np.uint8).astype(np.int32)
    sign = np.sign(values.astype(np.float32)).astype(np.int32)
    np.testing.assert_array_equal(in_chunks(_encode, x, name), sign * patterns)


@pytest.mark.parametrize("name", ALL)
def test_decoding_codes_gives_the_rounded_value(name):
    """Float32's own subnormals apart: `decode` multiplies, and XLA on CPU flushes them to zero."""
    fmt = parse_format(name)
    values = np.float32([0, 1]) if fmt.bits > 16 else fmt.magnitudes
    x = inputs(values[:: max(1, values.size // 1000)])
    expected = rounded(x, name)
    normal = (np.abs(expected) >= SMALLEST_NORMAL) | (expected == 0)
    codes = in_chunks(_encode, x, name)
    actual = in_chunks(_decode, codes, name)
    np.testing.assert_array_equal(actual[normal].view(np.int32), expected[normal].view(np.int32))


@pytest.mark.parametrize("name", ALL)
def test_nan_has_a_code_of_its_own(name):
    codes = in_chunks(_encode, np.float32([np.nan, -np.nan]), name)
    np.testing.assert_array_equal(codes, NAN_CODE)
    assert np.isnan(in_chunks(_decode, codes, name)).all()


@pytest.mark.parametrize("name", [name for name in ALL if parse_format(name).bits <= 16])
def test_magnitudes_rise_from_the_smallest_to_the_largest(name):
    fmt = parse_format(name)
    magnitudes = fmt.magnitudes
    assert magnitudes.dtype == np.float32
    assert (np.diff(magnitudes) > 0).all()
    assert magnitudes[0] == fmt.min_magnitude
    assert magnitudes[-1] == fmt.max_value


@pytest.mark.parametrize("name", [*ML_DTYPES, *WIDE_DTYPES])
def test_magnitudes_are_those_of_ml_dtypes(name):
    expected = magnitudes_of_dtype((ML_DTYPES | WIDE_DTYPES)[name])
    np.testing.assert_array_equal(parse_format(name).magnitudes, expected)


@pytest.mark.parametrize("name", ["none", "e7m9"])
def test_a_wide_format_has_too_many_magnitudes_to_list(name):
    with pytest.raises(ValueError, match=f"'{name}' has too many values"):
        _ = parse_format(name).magnitudes


@pytest.mark.parametrize(
    ("name", "bits", "mantissa_bits", "min_exponent", "max_value"),
    [
        ("int4", 4, 2, 2, 7),
        ("int16", 16, 14, 14, 32767),
        ("ternary", np.log2(3), 0, 0, 1),
        ("binary", 1, 0, 0, 1),
        ("e4m3", 8, 3, -6, 448),
        ("e5m2", 8, 2, -14, 57344),
        ("e2m1", 4, 1, 0, 6),
        ("e3m0", 4, 0, -2, 16),
        ("e4m3fnuz", 8, 3, -7, 240),
        ("bf16", 16, 7, -126, ml_dtypes.finfo(ml_dtypes.bfloat16).max),
        ("fp16", 16, 10, -14, 65504),
        ("none", 32, 23, -126, np.inf),
    ],
)
def test_the_numbers_of_a_format(name, bits, mantissa_bits, min_exponent, max_value):
    fmt = parse_format(name)
    assert (fmt.bits, fmt.mantissa_bits) == (bits, mantissa_bits)
    assert (fmt.min_exponent, fmt.max_value) == (min_exponent, max_value)


@pytest.mark.parametrize("name", ALL)
def test_a_grid_holds_the_numbers_of_its_format(name):
    fmt, grid = parse_format(name), parse_format(name).grid()
    assert grid.min_value == fmt.lowest
    for number in ("mantissa_bits", "min_exponent", "min_magnitude", "max_value", "scaled"):
        assert getattr(grid, number) == getattr(fmt, number)


@pytest.mark.parametrize("name", ALL)
def test_a_format_is_parsed_from_its_name(name):
    fmt = parse_format(name)
    assert fmt.name == str(fmt) == name
    assert parse_format(fmt.name) == fmt
    assert fmt.quantizes == (name != "none")


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("int1", "binary"),
        ("fp32", "none"),
        ("bfloat16", "bf16"),
        ("float16", "fp16"),
        ("e4m3fn", "e4m3"),
        ("e2m1fn", "e2m1"),
        (" E5M2 ", "e5m2"),
    ],
)
def test_other_spellings(alias, name):
    assert parse_format(alias) == parse_format(name)


def test_a_codebook_is_spelled_by_its_levels():
    fmt = parse_format("Codebook(1, -1e0, .1, -0)")
    assert fmt.name == "codebook(-1,0,0.1,1)"
    assert parse_format(fmt.name) == fmt
    np.testing.assert_array_equal(fmt.values, np.float32([-1, 0, 0.1, 1]))
    for levels in ("", "1,two", "-1,-1", "1,inf", "-2,-1", "0,1e99"):
        with pytest.raises(ValueError, match=r"expected .* 'codebook\(-1,0,1\)'"):
            parse_format(f"codebook({levels})")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("int0", "int"),
        ("int17", "int16"),
        ("e9m1", "e8m1"),
        ("e4m11", "e4m10"),
        ("e4m33", "e4m3"),
        ("e4m3foo", "e4m3"),
        ("int", "int"),
        ("", ""),  # nothing is near
        ("fp4", "e2m1"),
        ("ternery", "ternary"),
        ("e1m3ieee", "e2m3ieee"),
        ("codebok(-1,1)", "codebook(-1,0,1)"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_spelling(name, nearest):
    message = f"{re.escape(repr(name))}.*nearest is '{re.escape(nearest)}"
    with pytest.raises(ValueError, match=message):
        parse_format(name)
