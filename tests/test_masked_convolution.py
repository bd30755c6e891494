"""A masked kernel keeps its gaps in every format, with the same gradients as without a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qat.linen
import qat.nnx
from qat.formats import codebook
from qat.policy import Policy
from qat.quantization import fake_quant
from qat.quantizer import Quantizer

RANDOM = np.random.default_rng(0)
X_BTI = jnp.asarray(RANDOM.standard_normal((2, 6, 3)), jnp.float32)
KERNEL_KIO = jnp.asarray(RANDOM.standard_normal((3, 3, 4)), jnp.float32)
MASK_KIO = jnp.asarray(RANDOM.integers(0, 2, KERNEL_KIO.shape), jnp.float32)
NO_ZERO = Quantizer(codebook("no zero", (-1.0, -0.3, 0.3, 1.0)), "channel")
POLICIES = {
    "binary": Policy("binary/channel", "int8"),
    "codebook": Policy(NO_ZERO, "int8"),
    "int4": Policy("int4/channel", "int8", gradients="int8/token"),
}


def of_nnx(policy, mask):
    layer = nnx.Conv(3, 4, (3,), use_bias=False, mask=mask, rngs=nnx.Rngs(0))
    layer.kernel.set_value(KERNEL_KIO)
    converted, _ = qat.nnx.quantize_model(layer, policy)
    return nnx.jit(lambda layer, x: layer(x))(converted, X_BTI)


def of_linen(policy, mask):
    converted, _ = qat.linen.quantize_model(nn.Conv(4, (3,), use_bias=False, mask=mask), policy)
    return converted.apply({"params": {"kernel": KERNEL_KIO}}, X_BTI)


def of_linen_layer(policy, mask):
    layer = qat.linen.Conv(4, (3,), use_bias=False, mask=mask, policy=policy)
    return layer.apply({"params": {"kernel": KERNEL_KIO}}, X_BTI)


def expected(policy):
    """In float64: a kernel that was masked, quantized and masked again."""
    kernel = fake_quant(KERNEL_KIO * MASK_KIO, policy.weights, (0, 1)) * MASK_KIO
    x = np.pad(
        np.asarray(fake_quant(X_BTI, policy.activations, (1, 2)), np.float64),
        [(0, 0), (1, 1), (0, 0)],
    )
    windows = np.stack([x[:, i : i + 6] for i in range(3)], axis=2)
    return np.einsum("btki,kio->bto", windows, np.asarray(kernel, np.float64))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("door", [of_nnx, of_linen, of_linen_layer])
def test_gaps_of_a_kernel_stay(door, policy):
    np.testing.assert_allclose(door(policy, MASK_KIO), expected(policy), rtol=1e-5, atol=1e-5)


def test_a_full_mask_changes_nothing():
    full = jnp.ones_like(MASK_KIO)
    for policy in POLICIES.values():
        np.testing.assert_array_equal(of_nnx(policy, full), of_nnx(policy, None))


def test_gradients_reach_the_unmasked_part_alone():
    layer = nnx.Conv(3, 4, (3,), use_bias=False, mask=MASK_KIO, rngs=nnx.Rngs(0))
    converted, _ = qat.nnx.quantize_model(layer, Policy("binary/channel", gradients="int8/token"))

    graph, state = nnx.split(converted)

    def loss_of(state):
        return jax.checkpoint(lambda x: nnx.merge(graph, state)(x))(X_BTI).sum()

    gradient = jax.grad(jax.jit(loss_of), allow_int=True)(state)["kernel"].get_value()
    assert jnp.array_equal(gradient != 0, MASK_KIO != 0)
