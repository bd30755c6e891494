"""Packed tensors bit for bit and at their true size, in memory and through files."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.formats import parse_format
from qat.grid import encode
from qat.packing import pack_bits, pack_trits, unpack_bits, unpack_trits
from qat.quantization import quantize
from qat.quantizer import Quantizer
from qat.storage import PackedTensor, load, pack, save
from tests.storage_checks import (
    PATHS,
    any_codes,
    any_tensor,
    assert_same,
    bits,
    code_dtype,
    extreme_codes,
    with_codes,
)

INTEGERS = [f"int{b}" for b in range(1, 17)]
FULL = [f"int{b}full" for b in range(2, 17)]
UNSIGNED = [f"uint{b}" for b in range(1, 17)]
FLOATS = [f"e{x}m{y}" for x in range(1, 9) for y in range(11)]
IEEE = [f"e{x}m{y}ieee" for x in range(2, 9) for y in range(11)]
NAMED = ["none", "bf16", "fp16", "ternary", "binary", "nf4", "e4m3fnuz", "e4m3b11fnuz", "e5m2fnuz"]
FORMATS = [*INTEGERS, *FULL, *UNSIGNED, *FLOATS, *IEEE, *NAMED]
# Stored bits a code, by quantizer.
QUANTIZERS = {
    "int3/channel": 3,
    "int5full/block:32x8": 5,
    "uint4/block:32/zero_point": 4,
    "int7/tensor/zero_point": 7,
    "ternary/tensor": 1.6,
    "binary/token": 1,
    "bf16": 16,
    "e8m3/channel": 12,
    "none": 32,
    "nf4": 4,
    "mxfp4": 4,
    "mxfp6": 6,
    "nvfp4": 4,
}
SHAPES = [((1536,), 0), ((64, 24), 0), ((3, 8, 64), -1)]

pack_and_unpack = jax.jit(
    lambda values, width: (
        packed := pack_bits(values, width),
        unpack_bits(packed, width, values.size),
    ),
    static_argnums=1,
)
codes_of = jax.jit(encode)


def normal(shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


class TestPacking:
    @pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 16, 19, 31, 32])
    def test_is_little_endian_and_comes_back(self, width):
        values = np.random.default_rng(width).integers(0, 2**width, 13, np.uint32)
        each = (values[:, None] >> np.arange(width, dtype=np.uint32)) & 1
        packed, restored = pack_and_unpack(jnp.asarray(values), width)
        np.testing.assert_array_equal(packed, np.packbits(each.astype(np.uint8), bitorder="little"))
        np.testing.assert_array_equal(restored, values)

    @pytest.mark.parametrize("count", [0, 1, 8, 9])
    def test_any_count_and_negative_numbers(self, count):
        values = np.arange(count, dtype=np.int8) - 4
        packed, restored = pack_and_unpack(jnp.asarray(values), 5)
        assert packed.size == math.ceil(count * 5 / 8)
        np.testing.assert_array_equal(restored, values & 31)
        assert jax.eval_shape(pack_trits, values).size == math.ceil(count / 5)

    def test_every_byte_of_trits(self):
        digits = np.stack(np.unravel_index(np.arange(243), (3,) * 5), axis=1)[:, ::-1]
        packed = jax.jit(pack_trits)(jnp.asarray(digits, jnp.int32))
        np.testing.assert_array_equal(packed, np.arange(243))
        restored = jax.jit(unpack_trits, static_argnums=1)(packed, 1215)
        np.testing.assert_array_equal(restored, digits.reshape(-1))

    def test_memory_of_a_large_array_is_its_codes_and_its_bytes(self):
        codes = jax.ShapeDtypeStruct((2**20,), jnp.int8)
        compiled = jax.jit(pack_bits, static_argnums=1).lower(codes, 7).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 2**20


class TestCodes:
    @pytest.mark.parametrize("name", FORMATS)
    def test_largest_codes_fit_and_leave_the_code_of_nan(self, name):
        fmt = parse_format(name)
        low, high = map(int, extreme_codes(fmt.grid()))
        width = math.ceil(fmt.bits)
        if fmt.levels is not None or fmt.lowest == 0:
            assert low == 0
            assert high < 2**width
        elif not fmt.scaled:
            assert max(-low, high) < 2 ** (width - 1) - 1
        elif name not in ("binary", "int1"):
            assert high < 2 ** (width - 1)
            assert -low <= 2 ** (width - 1) - (not fmt.is_integer)

    @pytest.mark.parametrize(
        "name",
        [
            *("binary", "ternary", "nf4", "int2", "int3", "int3full", "int8full", "int13", "uint1"),
            *("uint7", "uint16", "e1m0", "e1m1", "e2m1", "e3m2", "e4m3", "e5m2ieee", "e7m10"),
            *("bf16", "fp16", "e8m0", "e8m3", "e8m10", "none"),
        ],
    )
    def test_every_code_comes_back(self, name):
        """All of them up to 8 bits; beyond, the ends, zero and some between; and NaN."""
        fmt = parse_format(name)
        low, high = map(int, extreme_codes(fmt.grid()))
        codes = any_codes(np.random.default_rng(0), fmt, 801)
        first = np.arange(max(low, -128), min(high, 255) + 1)
        codes[: first.size] = np.where(first == 0, 1, first) if fmt.min_magnitude else first
        codes[-1] = code_dtype(fmt).type(0) if fmt.scaled else np.iinfo(code_dtype(fmt)).min
        codes[-1] = 1 if fmt.min_magnitude else codes[-1]
        qtensor = with_codes(codes, fmt)
        packed = pack(qtensor)
        assert packed.codes.size == math.ceil(801 / 5 if name == "ternary" else 801 * fmt.bits / 8)
        assert_same(packed.unpack(), qtensor)

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            ("e4m3", ml_dtypes.float8_e4m3fn),
            ("e5m2", ml_dtypes.float8_e5m2),
            ("e4m3fnuz", ml_dtypes.float8_e4m3fnuz),
            ("e2m3", ml_dtypes.float6_e2m3fn),
            ("e2m1", ml_dtypes.float4_e2m1fn),
            ("fp16", np.float16),
            ("bf16", ml_dtypes.bfloat16),
        ],
    )
    def test_bits_are_those_of_the_standards(self, name, dtype):
        fmt = parse_format(name)
        values = np.random.default_rng(0).choice(fmt.values, 64) + np.float32(0)  # -0 has no code
        packed = pack(with_codes(codes_of(jnp.asarray(values), fmt.grid()), fmt))
        patterns = bits(values.astype(dtype)).reshape(64, -1)
        each = np.unpackbits(patterns, axis=1, bitorder="little")[:, : int(fmt.bits)]
        np.testing.assert_array_equal(packed.codes, np.packbits(each, bitorder="little"))


class TestPackedTensor:
    @settings(max_examples=30)
    @given(
        st.sampled_from(list(QUANTIZERS)),
        st.sampled_from(SHAPES),
        st.sampled_from(["float32", "bfloat16"]),
        st.integers(0, 2**32 - 1),
        st.sampled_from(PATHS),
    )
    def test_comes_back_bit_for_bit_from_memory_and_files(
        self, tmp_path_factory, text, shape_and_axis, dtype, seed, name
    ):
        shape, axis = shape_and_axis
        if "x" in text.partition(":")[2] and len(shape) == 1:
            shape = (64, 24)
        qtensor = any_tensor(np.random.default_rng(seed), text, shape, axis, dtype)
        packed = pack(qtensor)
        assert_same(packed.unpack(), qtensor)
        path = tmp_path_factory.mktemp("files") / name
        save(path, {"w": qtensor})
        assert_same(load(path), {"w": packed})

    @pytest.mark.parametrize("text", QUANTIZERS)
    def test_size_is_the_bits_of_the_format_and_its_scales(self, text):
        qtensor = any_tensor(np.random.default_rng(0), text, (64, 24), 0)
        packed, scale = pack(qtensor), qtensor.scale
        expected = math.ceil(64 * 24 * QUANTIZERS[text] / 8)
        expected += scale.scale.size * (4 if qtensor.scale_format is None else 1)
        expected += 4 if scale.tensor_scale is not None else 0
        if scale.zero_point is not None:
            expected += math.ceil(scale.zero_point.size * QUANTIZERS[text] / 8)
        assert packed.nbytes == expected
        assert packed.nbytes <= qtensor.nbytes

    @pytest.mark.parametrize("text", ["int4/block:32", "binary/token", "nvfp4", "bf16"])
    def test_of_a_stack_with_what_is_not_a_number(self, text):
        quantizer = Quantizer.parse(text)
        x = normal((3, 64, 5)).at[1, 3, 1].set(jnp.nan).at[2, 40, 2].set(jnp.inf)
        stack = jax.jit(jax.vmap(lambda x: quantize(x, quantizer, 0)))(x)
        packed = pack(stack)
        assert packed.shape == (3, 64, 5)
        values = packed.dequantize()
        assert_same(values, stack.dequantize())
        assert np.isnan(values[1, 3, 1])
        assert np.isfinite(values[0]).all()
        assert_same(packed.unpack().scale, stack.scale)

    def test_compiled_and_as_a_pytree(self):
        qtensor = any_tensor(np.random.default_rng(0), "nvfp4", (64, 24), 0)
        packed = pack(qtensor)
        assert_same(qtensor.pack(), packed)
        assert_same(jax.jit(pack)(qtensor), packed)
        assert_same(jax.jit(PackedTensor.unpack)(packed), qtensor)
        assert jax.eval_shape(pack, qtensor).codes.shape == packed.codes.shape

    def test_zero_points_are_known_to_be_codes_or_stay_floats(self):
        qtensor = any_tensor(np.random.default_rng(0), "uint4/channel/zero_point", (64, 24), 0)
        assert pack(qtensor).zero_point.dtype == jnp.uint8
        compiled = jax.jit(pack)(qtensor)
        assert compiled.zero_point.dtype == jnp.float32
        assert_same(compiled.unpack(), qtensor)
        outside = dataclasses.replace(qtensor.scale, zero_point=qtensor.scale.zero_point - 8)
        shifted = dataclasses.replace(qtensor, scale=outside)
        assert pack(shifted).zero_point.dtype == jnp.float32
        assert_same(pack(shifted).unpack(), shifted)

    @pytest.mark.parametrize("text", ["mxfp4", "nvfp4"])
    def test_scales_that_their_format_does_not_have_stay_floats(self, text):
        qtensor = any_tensor(np.random.default_rng(0), text, (64, 24), 0)
        odd = dataclasses.replace(qtensor.scale, scale=qtensor.scale.scale * 1.0625)
        other = dataclasses.replace(qtensor, scale=odd)
        assert pack(other).scale.dtype == jnp.float32
        assert_same(pack(other).unpack(), other)

    def test_of_nothing_and_of_one(self):
        for shape in [(0, 3), ()]:
            qtensor = with_codes(np.zeros(shape, np.int8), parse_format("int3"))
            assert_same(pack(qtensor).unpack(), qtensor)


@pytest.mark.parametrize(
    "spelling", ["int3/channel", "ternary/channel", "uint4/channel/zero_point"]
)
@pytest.mark.parametrize("axis", [0, 1])
def test_arrays_in_parts_on_a_mesh_with_explicit_axes_are_packed(spelling, axis):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    parts = jax.sharding.PartitionSpec(*["x" if a == axis else None for a in range(2)])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 8)), jnp.float32)
    on_mesh = jax.device_put(x, jax.sharding.NamedSharding(mesh, parts))
    packed = quantize(on_mesh, spelling, axis=0).pack()
    assert_same(jax.device_get(packed), jax.device_get(quantize(x, spelling, axis=0).pack()))
