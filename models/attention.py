"""Causal grouped-query attention with rotary positions, and the cache that decoding fills.

Keys and values pass through the policy before they are used or stored, so training, evaluation
and decoding see the same quantized cache. They are quantized after the rotation, as a cache
stores them; queries and probabilities are quantized too where the policy names them. Queries,
keys and values come out of one projection, ordered by key-value head, so that sharding the heads
over devices keeps each group together.

Shapes: B batch, T new tokens, S tokens attended to, D width, K key-value heads, G queries per
key-value head, C channels of a head.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import qat.nnx
from models.norm import RMSNorm
from qat.policy import Policy, Rules
from qat.training.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far; leading axis L, layers, in a whole model's.

    Attributes:
        k_BSKC: keys after rotation and quantization; S is the longest sequence it can hold.
        v_BSKC: values after quantization.
    """

    k_BSKC: Float[Array, "*L B S K C"]
    v_BSKC: Float[Array, "*L B S K C"]


class Attention(nnx.Module):
    """Projections, rotation, quantized cache, attention, normed output projection."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        rope_base: float,
        scale: float,
        dtype: jnp.dtype,
        rules: Rules,
        path: str,
        rngs: nnx.Rngs,
    ):
        self.group = heads // kv_heads
        self.rope_base = rope_base
        self.scale = scale
        cache_policy = rules.policy_for(f"{path}/cache")
        self.qkv = qat.nnx.LinearGeneral(
            width,
            (kv_heads, self.group + 2, width // heads),
            use_bias=False,
            dtype=dtype,
            policy=rules.policy_for(f"{path}/qkv"),
            rngs=rngs,
        )
        self.cache = nnx.data(_fake_quant(cache_policy, "kv_cache"))
        self.queries = nnx.data(_fake_quant(cache_policy, "queries"))
        self.probabilities = nnx.data(_fake_quant(cache_policy, "probabilities"))
        self.norm = RMSNorm(width, dtype=dtype, rngs=rngs)
        self.out = qat.nnx.Linear(
            width,
            width,
            use_bias=False,
            dtype=dtype,
            policy=rules.policy_for(f"{path}/out"),
            rngs=rngs,
        )

    def __call__(
        self, x_BTD: Float[Array, "B T D"], position: Int[Array, ""], cache: Cache | None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Attends from T new tokens at `position` onwards to themselves and the cache.

        Args:
            x_BTD: normed inputs.
            position: how many tokens came before.
            cache: None to attend within the T tokens alone.

        Returns:
            The block's update, and the cache with the new tokens written at `position`.
        """
        qkv_BTKNC = constrain(self.qkv(x_BTD), "batch", None, "heads", None, None)
        q_BTKGC = qkv_BTKNC[..., : self.group, :]
        k_BTKC, v_BTKC = qkv_BTKNC[..., self.group, :], qkv_BTKNC[..., self.group + 1, :]
        positions_T = position + jnp.arange(x_BTD.shape[1])
        q_BTKGC = rotate(q_BTKGC, positions_T, self.rope_base)
        k_BTKC = rotate(k_BTKC, positions_T, self.rope_base)
        if self.queries is not None:
            q_BTKGC = self.queries(q_BTKGC)
        if self.cache is not None:
            k_BTKC, v_BTKC = self.cache(k_BTKC), self.cache(v_BTKC)
        if cache is None:
            k_BSKC, v_BSKC, positions_S = k_BTKC, v_BTKC, positions_T
        else:
            start = (0, position, 0, 0)
            k_BSKC = jax.lax.dynamic_update_slice(cache.k_BSKC, k_BTKC, start)
            v_BSKC = jax.lax.dynamic_update_slice(cache.v_BSKC, v_BTKC, start)
            cache = Cache(k_BSKC, v_BSKC)
            positions_S = jnp.arange(k_BSKC.shape[1])
        visible_TS = positions_T[:, None] >= positions_S[None, :]
        mixed_BTKGC = attend(q_BTKGC * self.scale, k_BSKC, v_BSKC, visible_TS, self.probabilities)
        return self.out(self.norm(mixed_BTKGC.reshape(x_BTD.shape))), cache


def attend(
    q_BTKGC: Float[Array, "B T K G C"],
    k_BSKC: Float[Array, "B S K C"],
    v_BSKC: Float[Array, "B S K C"],
    visible_TS: Array,
    quantize: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T K G C"]:
    """Softmax attention of scaled queries, scores and probabilities in float32.

    `quantize` rounds the probabilities.
    """
    scores_BKGTS = jnp.einsum(
        "btkgc,bskc->bkgts", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32
    )
    lowest = jnp.finfo(jnp.float32).min
    scores_BKGTS = jnp.where(visible_TS[None, None, None], scores_BKGTS, lowest)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKC.dtype)
    if quantize is not None:
        weights_BKGTS = quantize(weights_BKGTS)
    return jnp.einsum("bkgts,bskc->btkgc", weights_BKGTS, v_BSKC)


def _fake_quant(policy: Policy | None, operand: str) -> qat.nnx.FakeQuant | None:
    """What quantizes an operand of attention, where the policy names it."""
    named = policy is not None and getattr(policy, operand) is not None
    return qat.nnx.FakeQuant(policy, operand) if policy is not None and named else None


def rotate(
    x: Float[Array, "B T *heads C"], positions_T: Int[Array, " T"], base: float
) -> Float[Array, "B T *heads C"]:
    """Rotary position embedding (Su et al., arXiv 2104.09864), channels paired by halves."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_TC = positions_T[:, None].astype(jnp.float32) * frequency[None, :]
    shape = (1, x.shape[1], *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angle_TC).reshape(shape), jnp.sin(angle_TC).reshape(shape)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
