"""What quantizing twice changes, by dtype; and stacks of stored tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.quantization import fake_quant, quantize
from qat.quantizer import Quantizer

SYMMETRIC = ["int4/channel", "int8/channel", "int16/channel", "e4m3/channel", "mxfp4", "nf4"]
SHIFTED = ["int4full/channel", "uint4/channel/zero_point", "int8/channel/zero_point"]


@jax.jit
def twice(x, quantizer):
    once = fake_quant(x, quantizer, 0)
    return once, fake_quant(once, quantizer, 0)


def changed(spelling, dtype):
    """How many of many numbers a second pass changes."""
    random = np.random.default_rng(0)
    x = random.standard_normal((64, 96)) * np.exp(random.standard_normal((1, 96)))
    once, again = twice(jnp.asarray(x, dtype), Quantizer.parse(spelling).traced())
    return int((once != again).sum())


@pytest.mark.parametrize("spelling", [*SYMMETRIC, *SHIFTED])
def test_every_format_is_idempotent_in_float32(spelling):
    assert changed(spelling, jnp.float32) == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("spelling", SYMMETRIC)
def test_symmetric_formats_are_idempotent_in_narrow_dtypes(spelling, dtype):
    assert changed(spelling, dtype) == 0


def test_stacks_lead():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 8)), jnp.float32)

    def stacked(out_axes):
        return jax.vmap(lambda x: quantize(x, "int4", axis=0), in_axes=1, out_axes=out_axes)(x)

    expected = jax.vmap(lambda x: fake_quant(x, "int4", axis=0))(x.T)
    np.testing.assert_array_equal(stacked(0).dequantize(), expected)
    with pytest.raises(ValueError, match="a stack's axes come first"):
        stacked(1).dequantize()
    with pytest.raises(ValueError, match="a stack's axes come first"):
        stacked(1).pack().dequantize()
