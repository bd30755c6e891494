"""A quantized decoder in files: packed stacks of layers come back to the same logits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat
from models.transformer import Transformer, TransformerConfig, split
from qat.storage import PackedTensor
from tests.storage_checks import PATHS

CONFIG = TransformerConfig(
    vocabulary=64, width=64, layers=3, heads=4, kv_heads=2, mlp_width=96, sub_norms=False
)
TOKENS_BT = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 8)))
GRAPH, PARAMS, REST = split(Transformer(CONFIG, None, rngs=nnx.Rngs(0)))
BITS = {  # of a weight, with its share of the scales; K = 64 or 96 is contracted
    "int4/channel": lambda size, outputs: 4 * size + 32 * outputs,
    "mxfp4": lambda size, outputs: 4 * size + 8 * size / 32,
    "nvfp4": lambda size, outputs: 4 * size + 8 * size / 16 + 32 * CONFIG.layers,
    "nf4/block:32": lambda size, outputs: 4 * size + 32 * size / 32,
}


@jax.jit
def logits(params):
    return nnx.merge(GRAPH, params, REST)(TOKENS_BT)


@functools.partial(jax.jit, static_argnums=1)
def quantized(params, spelling):
    """Kernels of the blocks as stacks of quantized tensors, one a layer; the rest as it is."""
    stack = jax.vmap(functools.partial(qat.quantize, quantizer=spelling, axis=0))

    def leaf(path, value):
        return stack(value) if path[-1].key == "kernel" else value

    return {**params, "blocks": jax.tree.map_with_path(leaf, params["blocks"])}


@jax.jit
def dequantized(tree):
    def is_quantized(leaf):
        return isinstance(leaf, (qat.QTensor, PackedTensor))

    def leaf(value):
        return value.dequantize() if is_quantized(value) else value

    return jax.tree.map(leaf, tree, is_leaf=is_quantized)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("spelling", BITS)
def test_packed_kernels_give_the_same_logits(spelling, path, tmp_path):
    tree = quantized(PARAMS, spelling)
    qat.storage.save(tmp_path / path, tree)
    loaded = qat.storage.load(tmp_path / path)
    assert isinstance(loaded["blocks"]["mlp"]["down"]["kernel"], PackedTensor)
    expected = logits(dequantized(tree))
    np.testing.assert_array_equal(logits(dequantized(loaded)), expected)
    assert np.abs(expected - logits(PARAMS)).max() > 1e-3
    for kernel, packed in kernels(PARAMS, loaded):
        outputs = kernel.size // kernel.shape[1]
        assert packed.nbytes == math.ceil(BITS[spelling](kernel.size, outputs) / 8)


def kernels(params, loaded):
    """Each kernel of the blocks, and what was stored of it."""
    is_packed = lambda leaf: isinstance(leaf, PackedTensor)  # noqa: E731
    pairs = zip(
        jax.tree.leaves(params["blocks"]),
        jax.tree.leaves(loaded["blocks"], is_leaf=is_packed),
        strict=True,
    )
    return [pair for pair in pairs if is_packed(pair[1])]


@pytest.mark.parametrize("spelling", BITS)
def test_a_file_has_the_size_of_its_bits(spelling, tmp_path):
    tree = quantized(PARAMS, spelling)["blocks"]
    qat.storage.save(tmp_path / "model.safetensors", tree)
    bits = sum(leaf.size for leaf in jax.tree.leaves(PARAMS["blocks"])) * 4
    size = 8 * (tmp_path / "model.safetensors").stat().st_size
    assert bits < size < 1.4 * bits
