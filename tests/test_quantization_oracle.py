"""Scales and rounding together, bit for bit against the loops of `numpy_oracle`."""

import dataclasses
import functools

import gfloat
import gfloat.formats
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.formats import codebook, parse_format
from qat.quantization import fake_quant, quantize
from qat.quantizer import Quantizer
from tests import numpy_oracle as oracle
from tests.checks import (
    ROWS,
    applied,
    assert_same,
    assert_same_bits,
    compiled,
    matrix,
    quantizer_of,
)
from tests.numpy_oracle import Spec

INTEGERS = [f"int{b}" for b in range(1, 17)]
FULL_RANGE = [f"int{b}full" for b in range(2, 17)]
UNSIGNED = [f"uint{b}" for b in range(1, 17)]
FLOATS = ["e1m0", "e1m3", "e2m0", "e2m1", "e2m3", "e3m0", "e3m2", "e3m4", "e4m2", "e4m3", "e5m2"]
FLOATS += ["e5m6", "e6m2", "e7m1", "e8m3", "e3m4ieee", "e4m3ieee", "e4m3fnuz", "e4m3b11fnuz"]
FLOATS += ["e5m2fnuz", "bf16", "fp16"]
NAMED = ["int1", "int4", "int16", "int4full", "uint4", "e2m1", "e5m2", "bf16"]
FORMATS = [*INTEGERS, *FULL_RANGE, *UNSIGNED, *FLOATS, "ternary", "nf4"]
ZERO_POINTS = ["int2", "int4", "int8", "int8full", "uint1", "uint4", "uint8", "int12", "uint16"]
CODEBOOKS = [(-2.0, -0.5, 0.0, 1.0, 3.0), (-1.5, -0.5, 0.5, 1.0, 1.5), (0.0, 0.25, 0.5, 1.0, 2.0)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def named(x, quantizer, axis=0):
    """Quantized values, a stored tensor's, and its codes, with the format as a constant."""
    tensor = quantize(x, quantizer, axis)
    return fake_quant(x, quantizer, axis), tensor.dequantize(), tensor.codes


def assert_as_the_oracle(x, spec, axis=0):
    """Scales and values of the program for traced formats; idempotent where the oracle is."""
    quantizer = quantizer_of(spec).traced()
    expected = oracle.quantize(x, spec, axis)
    fake, scale = compiled(x, quantizer, axis)
    np.testing.assert_array_equal(applied(scale)[0], expected.scale)
    known = ~np.isnan(expected.scale)
    np.testing.assert_array_equal(applied(scale)[1][known], expected.zero_point[known])
    assert applied(scale)[2] == expected.tensor_scale
    assert_same(fake, expected.values)
    return expected, fake


def assert_all_doors_agree(x, spec, axis=0):
    """With a traced format, a named one, and stored, in values and codes."""
    expected, fake = assert_as_the_oracle(x, spec, axis)
    constant, stored, codes = named(x, quantizer_of(spec), axis)
    assert_same_bits(constant, fake)
    assert_same_bits(stored, fake)
    kept = ~np.isnan(np.asarray(expected.values, np.float32))
    np.testing.assert_array_equal(np.asarray(codes)[kept], expected.codes[kept])


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name):
    """And quantizing twice is quantizing once."""
    _, fake = assert_as_the_oracle(matrix(), Spec(name, "channel"))
    again, _ = compiled(fake, Quantizer(name, "channel").traced())
    assert_same_bits(again, fake)


@pytest.mark.parametrize("name", NAMED)
def test_formats_as_constants_and_stored(name):
    """Compilers fold constants and rewrite what is left differently."""
    assert_all_doors_agree(matrix(), Spec(name, "channel"))


def test_operations_one_by_one():
    """As a program does them together."""
    spec = Spec("int4", "channel")
    with jax.disable_jit():
        fake = fake_quant(jnp.asarray(matrix()), quantizer_of(spec), 0)
    assert_same(fake, oracle.quantize(matrix(), spec, 0).values)


@pytest.mark.parametrize("levels", CODEBOOKS, ids=str)
def test_a_codebook_of_ones_own(levels):
    assert_all_doors_agree(matrix(), Spec("mine", "channel", levels=levels))
    quantizer = Quantizer(codebook("mine", levels), "channel").traced()
    fake, _ = compiled(matrix(), quantizer)
    assert_same_bits(compiled(fake, quantizer)[0], fake)


@pytest.mark.parametrize("name", ZERO_POINTS)
def test_zero_points(name):
    spec = Spec(name, "channel", zero_point=True)
    _, fake = assert_as_the_oracle(matrix(), spec)
    again, _ = compiled(fake, quantizer_of(spec).traced())
    assert_same_bits(again, fake)


@pytest.mark.parametrize("name", ["int8", "uint16"])
def test_zero_points_as_constants_and_stored(name):
    """A product and a sum, which compilers may fuse and round once."""
    assert_all_doors_agree(matrix(), Spec(name, "channel", zero_point=True))


@pytest.mark.parametrize("name", oracle.NAMES)
def test_named_quantizers(name):
    spec, quantizer = Spec.named(name), Quantizer.parse(name)
    assert quantizer == quantizer_of(spec)
    _, fake = assert_as_the_oracle(matrix(), spec)
    assert_same_bits(compiled(fake, quantizer.traced())[0], fake)
    if name in ("mxfp4", "nvfp4"):
        assert_all_doors_agree(matrix(), spec)


GROUPED = {
    "tensor": Spec("", "tensor"),
    "channel": Spec("", "channel"),
    "token": Spec("", "token"),
    "block of 16": Spec("", "block", 16),
    "whole axis": Spec("", "block", 32),
    "blocks of 1": Spec("", "block", 1),
    "square blocks": Spec("", "block", (8, 4)),
    "MX": Spec("", "block", 16, scale_format="e8m0"),
    "two levels": Spec("", "block", 16, scale_format="e4m3"),
    "square MX": Spec("", "block", (8, 8), scale_format="e8m0"),
}
AXES = {"tensor": [0], "channel": [(0, -1)], "token": [-1, (0, 1, 2)], "whole axis": [1]}
AXES |= {"blocks of 1": [1], "square MX": [1]}


@pytest.mark.parametrize(
    ("case", "axis"),
    [(case, axis) for case in GROUPED for axis in AXES.get(case, [1, (0, 1)])],
)
def test_every_granularity(case, axis):
    """(6, 32, 8), with scales that differ from group to group, through the axes of contraction."""
    random = np.random.default_rng(3)
    shape = (6, 32, 8)
    x = random.standard_normal(shape) * 10.0 ** random.uniform(-6, 6, shape)
    x = (x * 10.0 ** random.integers(-3, 4, (6, 1, 8))).astype(np.float32)
    x[2, :16, 3] = 0
    for name in ("int4", "e4m3", "int8full", "uint4"):
        assert_as_the_oracle(x, dataclasses.replace(GROUPED[case], format=name), axis)


@pytest.mark.parametrize("name", ["int4", "int8full", "uint4", "e4m3", "e2m1", "int16", "bf16"])
def test_bfloat16(name):
    x = matrix().astype(ml_dtypes.bfloat16)
    fake, _ = compiled(x, Quantizer(name, "channel").traced())
    assert_same(fake, oracle.quantize(x, Spec(name, "channel"), 0).values)
    if parse_format(name).min_value is None:  # else the longer end may not fit bfloat16
        assert_same_bits(compiled(fake, Quantizer(name, "channel").traced())[0], fake)


MX = {  # name: as gfloat has it, the element dtype of ml_dtypes
    "mxfp8": (gfloat.formats.format_info_mxfp8_e4m3, ml_dtypes.float8_e4m3fn),
    "mxfp8e5m2": (gfloat.formats.format_info_mxfp8_e5m2, ml_dtypes.float8_e5m2),
    "mxfp6": (gfloat.formats.format_info_mxfp6_e2m3, ml_dtypes.float6_e2m3fn),
    "mxfp6e3m2": (gfloat.formats.format_info_mxfp6_e3m2, ml_dtypes.float6_e3m2fn),
    "mxfp4": (gfloat.formats.format_info_mxfp4_e2m1, ml_dtypes.float4_e2m1fn),
    "mxint8": (gfloat.formats.format_info_mxint8, None),
}


def blocks_of_columns(x, size=32):
    """(blocks, size) float64 of a matrix whose columns are contracted."""
    return np.asarray(x, np.float64).T.reshape(-1, size)


@pytest.mark.parametrize("name", MX)
def test_microscaling_as_gfloat(name):
    """But for -2 of MXINT8, which OCP lets implementations leave out to be symmetric."""
    x = matrix(poisoned=False)[:, ::5]
    ours, scale = compiled(x, Quantizer.parse(name).traced())
    least = -127 * np.asarray(scale.scale).T.reshape(-1) if name == "mxint8" else [-np.inf]
    quantized = functools.partial(gfloat.quantize_block, MX[name][0])
    theirs = [quantized(block, gfloat.compute_scale_amax) for block in blocks_of_columns(x)]
    theirs = np.maximum(theirs, np.asarray(least)[:, None])
    np.testing.assert_array_equal(blocks_of_columns(ours), theirs)


@pytest.mark.parametrize("name", [name for name in MX if name != "mxint8"])
def test_microscaled_elements_as_ml_dtypes_casts(name):
    """Division by a power of two is exact, so that the elements alone decide."""
    x = matrix(poisoned=False)
    ours, scale = compiled(x, Quantizer.parse(name).traced())
    scale = np.asarray(scale.scale, np.float64).T.reshape(-1, 1)
    largest = float(ml_dtypes.finfo(MX[name][1]).max)
    elements = np.clip(blocks_of_columns(x) / scale, -largest, largest).astype(MX[name][1])
    np.testing.assert_array_equal(blocks_of_columns(ours), elements.astype(np.float64) * scale)
    np.testing.assert_array_equal(scale, scale.astype(ml_dtypes.float8_e8m0fnu).astype(np.float64))


def test_block_scales_of_two_levels_are_e4m3_and_lose_nothing_at_any_magnitude():
    """The largest of each block is reached to the precision of its scale, from 1e-30 to 1e30."""
    x = np.random.default_rng(1).standard_normal((64, 8)).astype(np.float32)
    for decade in (-30, -4, 0, 4, 30):
        scaled = x * np.float32(10.0**decade)
        fake, scale = compiled(scaled, Quantizer.parse("nvfp4").traced())
        blocks = np.asarray(scale.scale)
        np.testing.assert_array_equal(
            blocks, blocks.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        )
        assert scale.scale.max() == 448
        largest = np.abs(blocks_of_columns(scaled, 16)).max(axis=1)
        reached = np.abs(blocks_of_columns(fake, 16)).max(axis=1)
        np.testing.assert_allclose(reached, largest, rtol=1 / 16)


def any_matrix(seed, kind, factor, spread):
    """(64, 8): normal, half-integers, many magnitudes, one sign, shifted, or sparse columns."""
    random = np.random.default_rng(seed)
    normal = random.standard_normal((ROWS, 8))
    x = {
        "normal": normal,
        "ties": random.integers(-20, 21, (ROWS, 8)) / 2,
        "mixed": normal * 10.0 ** random.uniform(-9, 0, (ROWS, 8)),
        "one sign": np.abs(normal),
        "shifted": normal + 3 * random.standard_normal(8),
        "sparse": normal * (random.uniform(size=(ROWS, 8)) < 0.1),
    }[kind]
    return (x * factor * 10.0 ** (random.integers(-28, 28, 8) * spread)).astype(np.float32)


MATRICES = st.builds(
    any_matrix,
    st.integers(0, 2**32),
    st.sampled_from(["normal", "ties", "mixed", "one sign", "shifted", "sparse"]),
    st.floats(0.125, 1.0, width=32) | st.just(1.0),
    st.booleans(),
)


STRUCTURES = {
    "zero point": (Spec("", "channel", zero_point=True), ZERO_POINTS),
    "zero point by block": (Spec("", "block", 16, zero_point=True), ["uint4", "int4", "int4full"]),
    "channel": (Spec("", "channel"), FORMATS[:-1]),
    "codebook": (Spec("", "channel"), ["nf4"]),
    "MX": (Spec("", "block", 32, scale_format="e8m0"), [*INTEGERS, *FULL_RANGE, *FLOATS]),
    "two levels": (  # coarse formats: in others, a rounded block scale may spare the last code
        Spec("", "block", 16, scale_format="e4m3"),
        ["e2m1", "int2", "int4", "int4full", "ternary"],
    ),
}


@settings(max_examples=40)
@pytest.mark.parametrize("structure", STRUCTURES)
@given(x=MATRICES, data=st.data())
def test_any_matrix_as_the_oracle_and_twice_as_once(structure, x, data):
    spec, names = STRUCTURES[structure]
    spec = dataclasses.replace(spec, format=data.draw(st.sampled_from(names)))
    quantizer = quantizer_of(spec).traced()
    once, _ = compiled(x, quantizer)
    assert_same(once, oracle.quantize(x, spec, 0).values)
    assert_same_bits(compiled(once, quantizer)[0], once)
