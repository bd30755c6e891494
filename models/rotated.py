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
    attention, mlp, router = model.blocks.attention, model.blocks.mlp, model.blocks.router
    into_mlp = {"blocks/mlp/gate_up/kernel": (mlp.gate_up.kernel, -3)}
    if router is not None:
        into_mlp["blocks/router/kernel"] = (router.kernel, -2)
    into_attention = {"blocks/attention/qkv/kernel": (attention.qkv.kernel, -4)}
    into_head = {"head/kernel": (model.head.kernel, -2)}
    _fold(model.blocks.attention_norm, *into_attention.values())
    _fold(model.blocks.mlp_norm, *into_mlp.values())
    _fold(model.norm, *into_head.values())
    if attention.norm is not None:
        _fold(attention.norm, (attention.out.kernel, -2))
    _rotate_values(attention, seed)
    stream = Rotation.of(model.config.width, seed)
    _change(model.embed.embedding, lambda table_VD: stream.apply(table_VD, -1))
    for writer in (attention.out, mlp.down):
        _change(writer.kernel, lambda kernel: stream.apply(kernel, -1))
    readers = {**into_attention, **into_mlp, **into_head}
    for kernel, axis in readers.values():
        _change(kernel, lambda kernel, axis=axis: stream.apply(kernel, axis))
    return frozenset(readers)


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


def _fold(norm: Any, *readers: tuple[Any, int]) -> None:
    """Moves a norm's scale (*stack, D) into the kernels that read it, along an axis of each."""
    scale = norm.scale[...]
    for kernel, axis in readers:
        beside = [1] * kernel.ndim
        for place, size in zip((*range(scale.ndim - 1), axis), scale.shape, strict=True):
            beside[place] = size
        _change(kernel, lambda old, beside=beside: (old * scale.reshape(beside)).astype(old.dtype))
    norm.scale.set_value(jnp.ones_like(scale))


def _change(parameter: Any, change: Any) -> None:
    parameter.set_value(change(parameter[...]))
