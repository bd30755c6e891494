"""Quantizers under every transformation of JAX, bit for bit what they are without it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qat.dot_general import dot_general
from qat.policy import Policy
from qat.quantization import fake_quant
from qat.quantizer import Quantizer
from tests.checks import assert_same_bits

DENSE = (((1,), (0,)), ((), ()))
STRUCTURES = {  # quantizer, formats that share its program
    "channel": ("int4/channel", ["int2", "int8", "e4m3", "bf16", "binary", "uint4", "int4full"]),
    "zero point": ("uint4/channel/zero_point", ["uint2", "int4", "int8full", "none"]),
    "square blocks": ("int4/block:16x4", ["int2", "e5m2", "none"]),
    "MX": ("mxfp4", ["e4m3", "int8", "e3m2", "none"]),
    "two levels": ("nvfp4", ["int4", "e2m1", "none"]),
    "codebook": ("nf4", ["nf4", "nf4"]),
    "clipped": ("int3/channel/percentile:90/clipped", ["int2", "e2m1", "ternary"]),
    "gaussian": ("int4/channel/gaussian", ["int2", "e2m1", "e4m3", "none"]),
    "searched": ("int3/channel/mse", ["int2", "e2m1", "none"]),
    "stochastic": ("int4/channel/stochastic", ["int2", "e4m3", "binary", "none"]),
}


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def quantizers(structure):
    """Traced quantizers of one structure."""
    text, names = STRUCTURES[structure]
    first = Quantizer.parse(text)
    each = (Quantizer(name).format for name in names)
    return [dataclasses.replace(first, format=fmt).traced() for fmt in each]


def stacked(structure):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *quantizers(structure))


def key_of(quantizer):
    return jax.random.key(0) if quantizer.rounding == "stochastic" else None


@jax.jit
def plain(x, quantizer):
    return fake_quant(x, quantizer, 0, key_of(quantizer))


@pytest.mark.parametrize(
    "structure", [s for s in STRUCTURES if s not in ("MX", "searched", "clipped", "codebook")]
)
def test_vmap_and_scan_over_stacked_formats(structure):
    """A sweep in one program, and layers of different formats in one scanned stack."""

    @jax.jit
    def both(x, stack):
        quantized = functools.partial(fake_quant, x, axis=0)
        swept = jax.vmap(lambda q: quantized(quantizer=q, key=key_of(q)))(stack)
        _, scanned = jax.lax.scan(
            lambda _, q: (None, quantized(quantizer=q, key=key_of(q))), None, stack
        )
        return swept, scanned

    x = normal(64, 8)
    swept, scanned = both(x, stacked(structure))
    for row, layer, quantizer in zip(swept, scanned, quantizers(structure), strict=True):
        expected = plain(x, quantizer)
        assert_same_bits(layer, expected)
        assert_same_bits(row, expected)


SHORT = ("gaussian", "MX", "zero point")


@pytest.mark.parametrize(
    ("structure", "dtype"),
    [(structure, jnp.float32) for structure in STRUCTURES if structure not in SHORT]
    + [(structure, jnp.bfloat16) for structure in ("channel", "clipped")],
)
def test_vmap_over_a_batch_and_checkpoint(structure, dtype):
    """Each of a batch as it is alone; gradients the same when recomputed."""

    @jax.jit
    def transformed(x, weights, quantizer):
        def loss(x):
            return jnp.sum(fake_quant(x, quantizer, 0, key_of(quantizer)) * weights)

        mapped = jax.vmap(lambda x: fake_quant(x, quantizer, 0, key_of(quantizer)))(x)
        remembered = jax.vmap(jax.grad(loss))(x)
        recomputed = jax.vmap(jax.grad(jax.checkpoint(loss)))(x)
        return mapped, remembered, recomputed

    x, weights = normal(3, 64, 8, dtype=dtype), normal(64, 8, seed=1, dtype=dtype)
    quantizer = quantizers(structure)[0]
    mapped, remembered, recomputed = transformed(x, weights, quantizer)
    assert mapped.dtype == dtype
    for row, alone in zip(mapped, x, strict=True):
        assert_same_bits(row, plain(alone, quantizer))
    assert_same_bits(recomputed, remembered)
    if quantizer.gradient == "identity":
        assert_same_bits(remembered, np.broadcast_to(weights, x.shape))


@pytest.mark.parametrize("structure", ["channel", "square blocks", "two levels", "stochastic"])
def test_shards_on_eight_devices(structure):
    """By hand where groups lie within a shard; by the compiler also where they cross it, noise
    included, since it is a function of the position in the whole array.
    """
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x, quantizer = normal(64, 64), quantizers(structure)[0]
    expected = plain(x, quantizer)
    for spec in (PartitionSpec(None, "d"), PartitionSpec("d", None)):
        sharded = jax.device_put(x, NamedSharding(mesh, spec))
        assert_same_bits(plain(sharded, quantizer), expected)
    if structure in ("channel", "square blocks"):
        columns = PartitionSpec(None, "d")
        by_hand = jax.shard_map(
            lambda x: fake_quant(x, quantizer, 0), mesh=mesh, in_specs=columns, out_specs=columns
        )
        assert_same_bits(jax.jit(by_hand)(x), expected)


def test_gradients_inside_shard_map():
    """A contraction whose tokens are spread out: each shard quantizes its own gradient."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    policy = Policy.parse("w4a8grade5m2")
    policy = dataclasses.replace(policy, activations=Quantizer("int8", "token")).traced()

    def dx(x, w, g):
        dot = functools.partial(dot_general(policy), dimension_numbers=DENSE)
        return jax.vjp(lambda x: dot(x, w), x)[1](g)[0]

    rows, whole = PartitionSpec("d"), PartitionSpec()
    by_hand = jax.shard_map(dx, mesh=mesh, in_specs=(rows, whole, rows), out_specs=rows)
    x, w, g = normal(16, 32), normal(32, 8, seed=1), normal(16, 8, seed=2)
    np.testing.assert_allclose(
        jax.jit(by_hand)(x, w, g), jax.jit(dx)(x, w, g), rtol=1e-5, atol=1e-6
    )


def test_a_contraction_under_vmap_scan_and_checkpoint():
    """A stack of layers, scanned and recomputed, as a loop over them; and over a batch."""
    policies = [Policy.parse(text).traced() for text in ("w4a8", "none", "we2m1ae4m3")]
    policy = jax.tree.map(lambda *leaves: jnp.stack(leaves), *policies)
    x, w = normal(5, 8), normal(3, 8, 8, seed=1)

    def layer(x, w_and_policy):
        w, policy = w_and_policy
        return jnp.tanh(dot_general(policy)(x, w, DENSE)), None

    def scanned(w, x):
        return jax.lax.scan(jax.checkpoint(layer), x, (w, policy))[0].sum()

    def looped(w, x):
        for i, each in enumerate(policies):
            x, _ = layer(x, (w[i], each))
        return x.sum()

    batch = normal(2, 5, 8, seed=2)
    over_batch = (jax.jit(jax.vmap(jax.grad(f), (None, 0))) for f in (scanned, looped))
    ours, theirs = (gradient(w, batch) for gradient in over_batch)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(scanned)(w, x), jax.jit(looped)(w, x), rtol=1e-4)


def test_hessian_vector_products_pass_straight_through():
    """Forward over reverse: the estimator is linear in x, so only the loss is curved."""
    quantizer = Quantizer("int4", "channel", gradient="clipped").traced()

    @jax.jit
    def product(x, v):
        loss = jax.grad(lambda x: jnp.sum(fake_quant(x, quantizer, 0) ** 3) / 6)
        return jax.jvp(loss, (x,), (v,))[1]

    x, v = normal(64, 8), normal(64, 8, seed=1)
    expected = np.asarray(plain(x, quantizer)) * np.asarray(v)
    np.testing.assert_allclose(product(x, v), expected, rtol=1e-5)
