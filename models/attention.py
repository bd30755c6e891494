"""Causal grouped-query attention with rotary positions, and the cache that decoding fills.

Keys and values pass through the policy before they are used or stored, so training, evaluation
and decoding see the same quantized cache. They are quantized after the rotation, as a cache
stores them; queries and probabilities are quantized too where the policy names them. Queries,
keys and values come out of one projection, ordered by key-value head, so that sharding the heads
over devices keeps each group together.

Shapes: B batch, T new tokens, S tokens attended to, D width, K key-value heads, G queries per
key-value head, R = G · T rows of queries of a key-value head, C channels of a head, H = K · G · C
channels of all query heads.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import qat.nnx
from models.norm import RMSNorm, row_sums
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """Where T tokens stand, and the rotations of their queries and keys.

    Attributes:
        index_T: how many tokens came before each.
        cos_TC: cosine of the angle of each pair of channels; C counts pairs.
        sin_TC: sine of the same angles.
    """

    index_T: Int[Array, " T"]
    cos_TC: Float[Array, "T C"]
    sin_TC: Float[Array, "T C"]

    @classmethod
    def of(
        cls, start: Int[Array, ""], tokens: int, longest: int, channels: int, base: float
    ) -> "Positions":
        """Those of `tokens` from `start` on, for heads with this many channels.

        The rotations of all positions below `longest` are constants of the program: XLA on CPU
        would compute traced ones again for every sequence and head.
        """
        half = channels // 2
        frequency_C = base ** (-np.arange(half) / half)
        angle_SC = np.arange(longest)[:, None] * frequency_C[None, :]

        def window(table_SC: np.ndarray) -> Array:
            return jax.lax.dynamic_slice_in_dim(jnp.float32(table_SC), start, tokens)

        index_T = start + jnp.arange(tokens)
        return cls(index_T, window(np.cos(angle_SC)), window(np.sin(angle_SC)))


class Attention(nnx.Module):
    """Projections, rotation, quantized cache, attention, output projection.

    Args:
        width: D.
        heads: of queries.
        kv_heads: K, of keys and values.
        channels: C of a head.
        scale: factor of the scores.
        sub_norm: whether a norm stands before the output projection.
        norm_epsilon: of that norm.
        dtype: to compute in.
        rules: policies by layer path.
        path: of this module.
        rngs: for the initial parameters.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        channels: int,
        scale: float,
        sub_norm: bool,
        norm_epsilon: float,
        dtype: jnp.dtype,
        rules: Rules,
        path: str,
        rngs: nnx.Rngs,
    ):
        self.group = heads // kv_heads
        self.scale = scale
        cache_policy = rules.policy_for(f"{path}/cache")
        self.qkv = qat.nnx.LinearGeneral(
            width,
            (kv_heads, self.group + 2, channels),
            use_bias=False,
            dtype=dtype,
            policy=rules.policy_for(f"{path}/qkv"),
            rngs=rngs,
        )
        self.cache = nnx.data(_fake_quant(cache_policy, "kv_cache"))
        self.queries = nnx.data(_fake_quant(cache_policy, "queries"))
        self.probabilities = nnx.data(_fake_quant(cache_policy, "probabilities"))
        mixed = heads * channels
        norm = functools.partial(RMSNorm, dtype=dtype, rngs=rngs, epsilon=norm_epsilon)
        self.norm = norm(mixed) if sub_norm else None
        self.out = qat.nnx.Linear(
            mixed,
            width,
            use_bias=False,
            dtype=dtype,
            policy=rules.policy_for(f"{path}/out"),
            rngs=rngs,
        )

    def __call__(
        self, x_BTD: Float[Array, "B T D"], positions: Positions, cache: Cache | None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Attends from T new tokens to themselves and those of the cache before them.

        Args:
            x_BTD: normed inputs.
            positions: of the tokens.
            cache: None to attend within the T tokens alone.

        Returns:
            The block's update, and the cache with the new tokens written at their positions.
        """
        qkv_BTKNC = constrain(self.qkv(x_BTD), "batch", None, "heads", None, None)
        q_BTKGC, k_BTK1C, v_BTK1C = jnp.split(qkv_BTKNC, (self.group, self.group + 1), axis=3)
        q_BTKGC = rotate(q_BTKGC, positions)
        k_BTKC, v_BTKC = rotate(k_BTK1C, positions)[..., 0, :], v_BTK1C[..., 0, :]
        if self.queries is not None:
            q_BTKGC = self.queries(q_BTKGC)
        if self.cache is not None:
            k_BTKC, v_BTKC = self.cache(k_BTKC), self.cache(v_BTKC)
        if cache is None:
            k_BSKC, v_BSKC, positions_S = k_BTKC, v_BTKC, positions.index_T
        else:
            start = (0, positions.index_T[0], 0, 0)
            k_BSKC = jax.lax.dynamic_update_slice(cache.k_BSKC, k_BTKC, start)
            v_BSKC = jax.lax.dynamic_update_slice(cache.v_BSKC, v_BTKC, start)
            cache = Cache(k_BSKC, v_BSKC)
            positions_S = jnp.arange(k_BSKC.shape[1])
        visible_TS = positions.index_T[:, None] >= positions_S[None, :]
        mixed_BTKGC = attend(q_BTKGC * self.scale, k_BSKC, v_BSKC, visible_TS, self.probabilities)
        mixed_BTH = mixed_BTKGC.reshape(*x_BTD.shape[:2], -1)
        return self.out(mixed_BTH if self.norm is None else self.norm(mixed_BTH)), cache


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
    batch, tokens, kv_heads, group, channels = q_BTKGC.shape
    q_BKRC = q_BTKGC.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * tokens, channels)
    k_BKSC, v_BKSC = k_BSKC.transpose(0, 2, 1, 3), v_BSKC.transpose(0, 2, 1, 3)
    visible_RS = jnp.tile(visible_TS, (group, 1))
    if quantize is None:
        mixed_BKRC = _softmax_mix(q_BKRC, k_BKSC, v_BKSC, visible_RS)
    else:
        weights_BKRS, inverse_BKR1 = _exponentials(q_BKRC, k_BKSC, visible_RS)
        weights_BKRS = quantize((weights_BKRS * inverse_BKR1).astype(v_BKSC.dtype))
        mixed_BKRC = _contract(weights_BKRS, v_BKSC, 3, 2)
    mixed_BKGTC = mixed_BKRC.reshape(batch, kv_heads, group, tokens, channels)
    return mixed_BKGTC.transpose(0, 3, 1, 2, 4)


def _exponentials(q_BKRC: Array, k_BKSC: Array, visible_RS: Array) -> tuple[Array, Array]:
    """Numerators of the softmax (B, K, R, S) and one over their sums (B, K, R, 1), float32."""
    scores_BKRS = _contract(q_BKRC, k_BKSC, 3, 3, jnp.float32)
    scores_BKRS = jnp.where(visible_RS[None, None], scores_BKRS, jnp.finfo(jnp.float32).min)
    exponentials_BKRS = jnp.exp(scores_BKRS - scores_BKRS.max(axis=-1, keepdims=True))
    return exponentials_BKRS, 1 / exponentials_BKRS.sum(axis=-1, keepdims=True)


@jax.custom_vjp
def _softmax_mix(q_BKRC: Array, k_BKSC: Array, v_BKSC: Array, visible_RS: Array) -> Array:
    """Values mixed by the softmax over visible keys.

    As in FlashAttention (Dao, arXiv 2205.14135), what is divided by the softmax's sum are the mixed
    values, and the mean that the softmax's gradient subtracts is that of the results times
    their gradients: both are passes over R × C instead of R × S, which on CPU take longer than the
    products of a small model.
    """
    return _softmax_mix_fwd(q_BKRC, k_BKSC, v_BKSC, visible_RS)[0]


def _softmax_mix_fwd(
    q_BKRC: Array, k_BKSC: Array, v_BKSC: Array, visible_RS: Array
) -> tuple[Array, Any]:
    weights_BKRS, inverse_BKR1 = _exponentials(q_BKRC, k_BKSC, visible_RS)
    weights_BKRS = weights_BKRS.astype(v_BKSC.dtype)
    mixed_BKRC = _contract(weights_BKRS, v_BKSC, 3, 2, jnp.float32) * inverse_BKR1
    mixed_BKRC = mixed_BKRC.astype(v_BKSC.dtype)
    return mixed_BKRC, (q_BKRC, k_BKSC, v_BKSC, weights_BKRS, inverse_BKR1, mixed_BKRC)


def _softmax_mix_bwd(residuals: Any, g_BKRC: Array) -> tuple[Array, Array, Array, None]:
    q_BKRC, k_BKSC, v_BKSC, weights_BKRS, inverse_BKR1, mixed_BKRC = residuals
    g_BKRC = g_BKRC.astype(jnp.float32) * inverse_BKR1
    mean_BKR1 = row_sums(g_BKRC * mixed_BKRC.astype(jnp.float32))
    g_BKRC = g_BKRC.astype(v_BKSC.dtype)
    dweights_BKRS = _contract(g_BKRC, v_BKSC, 3, 3, jnp.float32)
    dscores_BKRS = weights_BKRS.astype(jnp.float32) * (dweights_BKRS - mean_BKR1)
    dscores_BKRS = dscores_BKRS.astype(q_BKRC.dtype)
    dq_BKRC = _contract(dscores_BKRS, k_BKSC, 3, 2)
    # The large operand stays as it lies: XLA on CPU transposes a left-hand side.
    dk_BKSC = _contract(q_BKRC, dscores_BKRS, 2, 2).swapaxes(2, 3)
    dv_BKSC = _contract(g_BKRC, weights_BKRS, 2, 2).swapaxes(2, 3)
    return dq_BKRC, dk_BKSC, dv_BKSC, None


_softmax_mix.defvjp(_softmax_mix_fwd, _softmax_mix_bwd)


def _contract(
    lhs: Array, rhs: Array, lhs_axis: int, rhs_axis: int, dtype: DTypeLike | None = None
) -> Array:
    """Contracts one axis of each, for every sequence and head."""
    if lhs.shape[1] == 1:  # XLA on CPU copies arrays that have a batch axis of one
        product = _batched(lhs[:, 0], rhs[:, 0], lhs_axis - 1, rhs_axis - 1, 1, dtype)
        return product[:, None]
    return _batched(lhs, rhs, lhs_axis, rhs_axis, 2, dtype)


def _batched(
    lhs: Array, rhs: Array, lhs_axis: int, rhs_axis: int, batch: int, dtype: DTypeLike | None
) -> Array:
    axes = tuple(range(batch))
    numbers = (((lhs_axis,), (rhs_axis,)), (axes, axes))
    return jax.lax.dot_general(lhs, rhs, numbers, preferred_element_type=dtype)


def _fake_quant(policy: Policy | None, operand: str) -> qat.nnx.FakeQuant | None:
    """What quantizes an operand of attention, where the policy names it."""
    named = policy is not None and getattr(policy, operand) is not None
    return qat.nnx.FakeQuant(policy, operand) if policy is not None and named else None


def rotate(x: Float[Array, "B T *heads C"], positions: Positions) -> Float[Array, "B T *heads C"]:
    """Rotary position embedding (Su et al., arXiv 2104.09864), channels paired by halves."""
    shape = (1, x.shape[1], *(1,) * (x.ndim - 3), x.shape[-1] // 2)
    cos, sin = positions.cos_TC.reshape(shape), positions.sin_TC.reshape(shape)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
