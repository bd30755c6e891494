"""Bits counted from shapes are those that packing takes."""

import jax
import jax.numpy as jnp
import pytest

import qat
from qat.analysis import stored_bits, total_bits

WEIGHT_KN = jax.random.normal(jax.random.key(0), (64, 48))


@pytest.mark.parametrize(
    ("spelling", "bits"),
    [
        ("int3/channel", 64 * 48 * 3 + 48 * 32),
        ("int4/block:16", 64 * 48 * 4 + 4 * 48 * 32),
        ("mxfp4", 64 * 48 * 4 + 2 * 48 * 8),
        ("nvfp4", 64 * 48 * 4 + 4 * 48 * 8 + 32),
        ("uint4/channel/zero_point", 64 * 48 * 4 + 48 * 32 + 48 * 4),
        ("nf4", 64 * 48 * 4 + 48 * 32),
        ("ternary/tensor", 8 * (-(-64 * 48 // 5)) + 32),
        ("binary/tensor", 64 * 48 + 32),
    ],
)
def test_bits_are_those_of_packing(spelling, bits):
    stored = qat.quantize(WEIGHT_KN, spelling, axis=0)
    assert stored_bits(stored) == bits == 8 * stored.pack().nbytes
    abstract = jax.eval_shape(lambda weight_KN: qat.quantize(weight_KN, spelling, 0), WEIGHT_KN)
    assert stored_bits(abstract) == bits


def test_a_stack_counts_every_layer_and_the_rest_is_sixteen_bits():
    stack_LKN = jnp.stack([WEIGHT_KN] * 3)
    stored = jax.vmap(lambda weight_KN: qat.quantize(weight_KN, "int4/channel", axis=0))(stack_LKN)
    assert total_bits([stored], 100) == 3 * (64 * 48 * 4 + 48 * 32) + 1600
