"""The gated layer of a block, on its own or one of the experts of `models.moe`.

Shapes: B batch, T tokens, D width, F width of the gated layer.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

import qat.nnx
from models.norm import RMSNorm
from qat.policy import Rules
from qat.training.sharding import constrain


class GatedMlp(nnx.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202), with or without a norm before the down projection.

    Args:
        width: D.
        gated_width: F.
        sub_norm: whether there is that norm.
        norm_epsilon: of it.
        dtype: to compute in.
        rules: policies by layer path.
        path: of this module.
        rngs: for the initial parameters.
    """

    def __init__(
        self,
        width: int,
        gated_width: int,
        sub_norm: bool,
        norm_epsilon: float,
        dtype: jnp.dtype,
        rules: Rules,
        path: str,
        rngs: nnx.Rngs,
    ):
        self.gate_up = qat.nnx.LinearGeneral(
            width,
            (2, gated_width),
            use_bias=False,
            dtype=dtype,
            policy=rules.policy_for(f"{path}/gate_up"),
            rngs=rngs,
        )
        norm = functools.partial(RMSNorm, dtype=dtype, rngs=rngs, epsilon=norm_epsilon)
        self.norm = norm(gated_width) if sub_norm else None
        self.down = qat.nnx.Linear(
            gated_width,
            width,
            use_bias=False,
            dtype=dtype,
            policy=rules.policy_for(f"{path}/down"),
            rngs=rngs,
        )

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The block's update from normed inputs."""
        gate_up_BT2F = constrain(self.gate_up(x_BTD), "batch", None, None, "mlp")
        gate_BT1F, up_BT1F = jnp.split(gate_up_BT2F, 2, axis=2)
        hidden_BTF = (jax.nn.silu(gate_BT1F) * up_BT1F)[..., 0, :]
        return self.down(hidden_BTF if self.norm is None else self.norm(hidden_BTF))
