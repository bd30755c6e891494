"""A Llama-like decoder in Flax NNX whose every projection runs under a policy.

Pre-norm blocks with SwiGLU, rotary grouped-query attention and an RMSNorm directly before each
projection: the attention output and the down projection have one of their own, as in BitNet
(arXiv 2402.17764) and Kumar et al. (arXiv 2411.04330), since a quantizer that scales by the
largest magnitude wants inputs of even size. Without these two (`sub_norms`) it is the decoder of
Llama (Touvron et al., arXiv 2302.13971), so checkpoints of that family run as they are. Embedding
and head are untied (of a checkpoint that ties them the head is a copy) and stay unquantized unless
the policy is a set of `Rules` that says otherwise.

With `experts` the gated layer of every block is a mixture of several, see `models.moe`.

The blocks are one stacked module run by `jax.lax.scan`, so compile time does not grow with depth.
Rematerialisation keeps a block's input ("full"), or that and the outputs of its matrix products
("dots", not those of heads and experts), and computes the rest again in the backward pass.

The model is used functionally: `split` it into parameters and the rest, `jax.jit` a pure function
of both. The policy's numbers are part of the rest and thus data.

Shapes: L layers, B batch, T tokens, D width, F width of the gated layer, V vocabulary.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import qat.nnx
from models.attention import Attention, Cache, Positions
from models.mlp import GatedMlp
from models.moe import Router, capacity, mixture, stacked
from models.norm import RMSNorm
from models.rotated import rotate_residual
from qat.policy import Policy, Rules
from qat.spelling import expected_one_of
from qat.training.sharding import constrain

_DTYPES = ("float32", "bfloat16", "float16")
_REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of a decoder.

    Attributes:
        vocabulary: number of token ids.
        width: residual width D; a multiple of `heads` unless `head_width` is given.
        layers: number of blocks.
        heads: query heads; a multiple of `kv_heads`.
        kv_heads: key-value heads.
        mlp_width: width F of the gated layer; 0 means 8/3 of `width`, rounded up to 8.
        rope_base: base of the rotary frequencies.
        dtype: compute dtype; parameters are float32.
        unroll: layers that are compiled as a run without a loop, at most `layers`; the compiler
            then sees them together, and takes longer.
        remat: what the backward pass computes again: "none", "full" or "dots".
        attention_scale: factor of the attention scores; 0 means one over the root of the channels
            of a head.
        residual_scale: factor of every block's updates of the residual stream.
        head_width: channels C of a head; 0 means `width / heads`.
        sub_norms: whether a norm stands before the attention output and the down projection.
        norm_epsilon: added to the mean squares of all norms.
        experts: gated layers that a block has in place of one; 0 is one that all tokens share, and
            what follows then means nothing.
        experts_per_token: of them, that each token passes through.
        capacity_factor: tokens that an expert has slots for, relative to an even share of them.
        balance: factor of the load-balancing loss in what training lessens.
    """

    vocabulary: int = 256
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 0
    rope_base: float = 10_000.0
    dtype: str = "float32"
    unroll: int = 1
    remat: str = "none"
    attention_scale: float = 0.0
    residual_scale: float = 1.0
    head_width: int = 0
    sub_norms: bool = True
    norm_epsilon: float = 1e-6
    experts: int = 0
    experts_per_token: int = 1
    capacity_factor: float = 1.25
    balance: float = 0.01

    def __post_init__(self) -> None:
        for size in ("vocabulary", "width", "layers", "heads", "kv_heads", "unroll"):
            if getattr(self, size) < 1:
                raise ValueError(f"{size} = {getattr(self, size)}: expected at least 1")
        for size in ("mlp_width", "head_width", "norm_epsilon", "experts"):
            if getattr(self, size) < 0:
                raise ValueError(f"{size} = {getattr(self, size)}: expected at least 0")
        for name, options in (("dtype", _DTYPES), ("remat", tuple(_REMAT))):
            if getattr(self, name) not in options:
                raise ValueError(expected_one_of(name, getattr(self, name), options))
        if not self.head_width:
            _check_multiple("width", self.width, "heads", self.heads, 2)
        elif self.head_width % 2:
            raise ValueError(
                f"head_width = {self.head_width}: rotary positions need an even number; "
                f"nearest is {self.head_width + 1}"
            )
        _check_multiple("heads", self.heads, "kv_heads", self.kv_heads)
        if self.experts:
            self._check_experts()

    @property
    def channels(self) -> int:
        """C, the width of a head."""
        return self.head_width or self.width // self.heads

    @property
    def attention_width(self) -> int:
        """Channels of all query heads."""
        return self.heads * self.channels

    @property
    def score_scale(self) -> float:
        """Factor of the attention scores."""
        return self.attention_scale or self.channels**-0.5

    @property
    def gated_width(self) -> int:
        """F, the width of the gated layer."""
        return self.mlp_width or -(-self.width * 8 // 24) * 8

    @property
    def kernel_params(self) -> int:
        """Parameters of the blocks' projections, of all experts and routers."""
        attention = 2 * self.width * self.channels * (self.heads + self.kv_heads)
        mlp = max(1, self.experts) * 3 * self.width * self.gated_width
        return self.layers * (attention + mlp + self.width * self.experts)

    @property
    def params(self) -> int:
        """Parameters N as scaling laws count them: without embedding and head, all experts."""
        gated = max(1, self.experts) * self.gated_width
        sub_norms = self.attention_width + gated if self.sub_norms else 0
        norms = self.layers * (2 * self.width + sub_norms) + self.width
        return self.kernel_params + norms

    @property
    def active_kernel_params(self) -> int:
        """Of `kernel_params` those that a token passes through."""
        return self.kernel_params - self._idle_layers * 3 * self.width * self.gated_width

    @property
    def active_params(self) -> int:
        """Of `params` those that a token passes through: all but those of the other experts."""
        norm = self.gated_width if self.sub_norms else 0
        return self.params - self._idle_layers * (3 * self.width * self.gated_width + norm)

    def gated_rows(self, tokens: int) -> int:
        """Rows that the gated layers of a block compute for a sequence of this many tokens."""
        if not self.experts:
            return tokens
        shape = (tokens, self.experts, self.experts_per_token, self.capacity_factor)
        return self.experts * capacity(*shape)

    @property
    def _idle_layers(self) -> int:
        """Gated layers of the model that a token does not pass through."""
        return self.layers * max(0, self.experts - self.experts_per_token)

    def _check_experts(self) -> None:
        """Raises ValueError for numbers that no mixture can have."""
        if not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token}: expected at least 1, at most "
                f"experts = {self.experts}"
            )
        if not 0 < self.capacity_factor < math.inf:
            raise ValueError(
                f"capacity_factor = {self.capacity_factor}: expected a finite number above 0"
            )
        if not 0 <= self.balance < math.inf:
            raise ValueError(f"balance = {self.balance}: expected a finite number, at least 0")
        if self.sub_norms and not self.norm_epsilon:
            raise ValueError(
                "norm_epsilon = 0: expected a number above 0, since experts norm empty slots, such "
                "as 1e-06"
            )


def _check_multiple(whole: str, size: int, part: str, count: int, each: int = 1) -> None:
    """Raises ValueError unless `size` is `count` times a multiple of `each`."""
    if size % (count * each) == 0:
        return
    reason = f"{whole} = {size} is not a multiple of {part} = {count}"
    if size % count == 0:
        reason = f"{whole} / {part} = {size // count}: rotary positions need an even number"
    step = count * each
    near = [f"{whole} = {step * max(1, round(size / step))}"]
    if divisors := [n for n in range(1, size + 1) if size % (n * each) == 0]:
        near.append(f"{part} = {min(divisors, key=lambda n: abs(n - count))}")
    raise ValueError(f"{reason}; nearest is {' or '.join(near)}")


def _router(config: TransformerConfig, rngs: nnx.Rngs) -> Router:
    return Router(
        config.width, config.experts, config.experts_per_token, config.capacity_factor, rngs
    )


def _norm(features: int, config: TransformerConfig, rngs: nnx.Rngs) -> RMSNorm:
    dtype = jnp.dtype(config.dtype)
    return RMSNorm(features, dtype=dtype, rngs=rngs, epsilon=config.norm_epsilon)


class Block(nnx.Module):
    """Attention and gated layer, or a mixture of those, each on the normed residual stream."""

    def __init__(self, config: TransformerConfig, rules: Rules, path: str, rngs: nnx.Rngs):
        shared = (config.sub_norms, config.norm_epsilon, jnp.dtype(config.dtype), rules)

        def mlp(rngs: nnx.Rngs) -> GatedMlp:
            return GatedMlp(config.width, config.gated_width, *shared, f"{path}/mlp", rngs)

        self.attention_norm = _norm(config.width, config, rngs)
        self.attention = Attention(
            config.width,
            config.heads,
            config.kv_heads,
            config.channels,
            config.score_scale,
            *shared,
            f"{path}/attention",
            rngs,
        )
        self.mlp_norm = _norm(config.width, config, rngs)
        self.mlp = stacked(config.experts, mlp, rngs) if config.experts else mlp(rngs)
        self.router = _router(config, rngs) if config.experts else None
        self.scale = config.residual_scale

    def __call__(
        self, x_BTD: Float[Array, "B T D"], positions: Positions, cache: Cache | None
    ) -> tuple[Float[Array, "B T D"], Cache | None, Float[Array, ""] | None]:
        """One layer; see `Attention` for the arguments.

        Returns:
            The residual stream, the cache, and how well the experts are balanced, if there are any.
        """
        update_BTD, cache = self.attention(self.attention_norm(x_BTD), positions, cache)
        x_BTD = constrain(x_BTD + self.scale * update_BTD, "batch", None, None)
        update_BTD, balance = self._gated(self.mlp_norm(x_BTD))
        return constrain(x_BTD + self.scale * update_BTD, "batch", None, None), cache, balance

    def _gated(self, x_BTD: Array) -> tuple[Array, Array | None]:
        """The update by the gated layer, or by those that the router chooses, and its balance."""
        if self.router is None:
            return self.mlp(x_BTD), None
        routing = self.router(x_BTD)
        return mixture(self.mlp, routing, x_BTD), routing.balance


class Transformer(nnx.Module):
    """The decoder: token ids in, logits out.

    Args:
        config: shape.
        policy: one for all projections and the cache of every block, `Rules` by layer path
            (embed, blocks/attention/qkv, blocks/attention/cache, blocks/attention/out,
            blocks/mlp/gate_up, blocks/mlp/down, head; those of the mlp are of all experts), or None
            for no quantization code at all.
        rngs: for the initial parameters.
    """

    def __init__(self, config: TransformerConfig, policy: Policy | Rules | None, *, rngs: nnx.Rngs):
        rules = policy if isinstance(policy, Rules) else inner_rules(policy)
        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.embed = qat.nnx.Embed(
            config.vocabulary,
            config.width,
            dtype=dtype,
            policy=rules.policy_for("embed"),
            rngs=rngs,
        )

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rules, "blocks", rngs)

        self.blocks = stacked_blocks(rngs)
        self.norm = _norm(config.width, config, rngs)
        self.head = qat.nnx.Linear(
            config.width,
            config.vocabulary,
            use_bias=False,
            dtype=dtype,
            policy=rules.policy_for("head"),
            rngs=rngs,
        )

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of the next token at every position, float32."""
        return self.logits(self.states(tokens_BT))

    def states(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the head reads at every position, in the compute dtype."""
        return self._run(tokens_BT, jnp.int32(0), None)[0]

    def states_and_balance(
        self, tokens_BT: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """`states`, and the mean over layers of `Routing.balance`, of a model with experts."""
        states_BTD, _, balance_L = self._run(tokens_BT, jnp.int32(0), None)
        assert balance_L is not None
        return states_BTD, balance_L.mean()

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """What the head makes of `states`, float32."""
        logits_BTV = constrain(self.head(x_BTD), "batch", None, "vocabulary")
        return logits_BTV.astype(jnp.float32)

    def decode(
        self, tokens_BT: Int[Array, "B T"], position: Int[Array, ""], cache: Cache
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Logits of T further tokens after the `position` tokens that the cache holds.

        T is the prompt's length once, then 1. The caller keeps ``position + T`` within the
        cache's length.
        """
        x_BTD, cache_after, _ = self._run(tokens_BT, position, cache)
        assert cache_after is not None
        return self.logits(x_BTD), cache_after

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `batch` sequences of at most `length` tokens."""
        config = self.config
        shape = (config.layers, batch, length, config.kv_heads, config.channels)
        zeros = jnp.zeros(shape, jnp.dtype(config.dtype))
        return Cache(zeros, zeros)

    def rotate_residual(self, seed: int) -> frozenset[str]:
        """Rotates the residual stream in place; see `models.rotated`."""
        return rotate_residual(self, seed)

    def positions(self, start: Int[Array, ""], tokens: int, longest: int) -> Positions:
        """Those of `tokens` from `start` on, in sequences of at most `longest`."""
        return Positions.of(start, tokens, longest, self.config.channels, self.config.rope_base)

    def _run(
        self, tokens_BT: Array, position: Array, cache: Cache | None
    ) -> tuple[Array, Cache | None, Array | None]:
        """Embedding, the scanned blocks, and the norm before the head; caches and balances."""
        config, tokens = self.config, tokens_BT.shape[1]
        longest = tokens if cache is None else cache.k_BSKC.shape[2]
        positions = self.positions(position, tokens, longest)
        graph, layers = nnx.split(self.blocks)

        def body(x_BTD: Array, scanned: tuple[Any, Cache | None]) -> tuple[Array, tuple[Any, ...]]:
            state, layer_cache = scanned
            layer = nnx.merge(graph, state)
            x_BTD, *made = layer(x_BTD, positions, layer_cache)
            return x_BTD, (*made, nnx.state(layer, qat.nnx.Observation))

        if config.remat != "none":
            policy = _REMAT[config.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        x_BTD = constrain(self.embed(tokens_BT), "batch", None, None)
        unroll = min(config.unroll, config.layers)
        x_BTD, (cache, balance_L, seen) = jax.lax.scan(body, x_BTD, (layers, cache), unroll=unroll)
        nnx.update(self.blocks, seen)
        return self.norm(x_BTD), cache, balance_L


def inner_rules(policy: Policy | None) -> Rules:
    """Rules that quantize the blocks but neither embedding nor head."""
    return Rules([("embed|head", None), (".*", policy)])


def split(model: Transformer) -> tuple[nnx.GraphDef[Transformer], Any, Any]:
    """A model as (graph, parameters, rest): pure nested dicts of arrays for compiled functions.

    The rest holds the policies' numbers. `flax.nnx.merge` is the inverse.
    """
    graph, state = nnx.split(model)
    params, rest = nnx.split_state(state, nnx.Param, ...)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
