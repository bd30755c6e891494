"""The decoder with its residual stream and value heads rotated: the same function.

QuaRot (Ashkboos et al., arXiv 2404.00456). An RMSNorm without a scale commutes with a rotation, so
scales go into the projections that read the norm; then everything that writes to the residual
stream is rotated, and everything that reads it rotated back, in the weights, at no cost when the
model runs. The same is done between the values of each head and the output projection.

Shapes: L layers, V vocabulary, D width, K key-value heads, G queries of each, C channels.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from qat.rotation import Rotation

if TYPE_CHECKING:
    from models.transformer import Transformer


def rotate_residual(model: "Transformer", seed: int) -> frozenset[str]:
    """Rotates a decoder in place.

    Args:
        model: with unquantized weights, embedding included.
        seed: of the rotations.

    Returns:
        Paths of the weights whose inputs are now rotated.
    """
    attention, mlp = model.blocks.attention, model.blocks.mlp
    _fold(model.blocks.attention_norm, attention.qkv)
    _fold(model.blocks.mlp_norm, mlp.gate_up)
    _fold(model.norm, model.head)
    if attention.norm is not None:
        _fold(attention.norm, attention.out)
    _rotate_values(attention, seed)
    stream = Rotation.of(model.config.width, seed)
    _change(model.embed.embedding, lambda table_VD: stream.apply(table_VD, -1))
    for writer in (attention.out, mlp.down):
        _change(writer.kernel, lambda kernel: stream.apply(kernel, -1))
    for reader, axis in ((attention.qkv, 1), (mlp.gate_up, 1), (model.head, 0)):
        _change(reader.kernel, lambda kernel, axis=axis: stream.apply(kernel, axis))
    return frozenset({"blocks/attention/qkv/kernel", "blocks/mlp/gate_up/kernel", "head/kernel"})


def _rotate_values(attention: Any, seed: int) -> None:
    """Values within each head, and the rows of the output projection that read them."""
    channels = attention.qkv.kernel.shape[-1]
    heads = Rotation.of(channels, seed)

    def in_values(kernel_LDKNC: jax.Array) -> jax.Array:
        values_LDKC = kernel_LDKNC[..., -1, :]
        return kernel_LDKNC.at[..., -1, :].set(heads.apply(values_LDKC, -1))

    def in_out(kernel_LDD: jax.Array) -> jax.Array:
        layers, width, out = kernel_LDD.shape
        by_head = kernel_LDD.reshape(layers, width // channels, channels, out)
        return heads.apply(by_head, 2).reshape(kernel_LDD.shape)

    _change(attention.qkv.kernel, in_values)
    _change(attention.out.kernel, in_out)


def _fold(norm: Any, reader: Any) -> None:
    """Moves a norm's scale (*stack, D) into the projection that reads it."""
    scale = norm.scale[...]
    kernel = reader.kernel[...]
    beside = scale.reshape(*scale.shape, *(1,) * (kernel.ndim - scale.ndim))
    reader.kernel.set_value((kernel * beside).astype(kernel.dtype))
    norm.scale.set_value(jnp.ones_like(scale))


def _change(parameter: Any, change: Any) -> None:
    parameter.set_value(change(parameter[...]))
