"""What a run costs, in FLOPs of bfloat16: on paper, or on a chip that runs some widths faster.

Two questions, one protocol. In research a bit is priced as a bit (`Linear`): a hardware-free rule
under which a width that no chip has can still be compared. A chip (`Hardware`) knows a few widths
only; operands of 5 bits run as 8, and 9 as 16. That price is a staircase over bits, so its optimum
stands on a step, and a law that improves with bits never pays for a width between two.

The speedups by name are the TPU compiler's own cycle estimates of one 4096 x 4096 x 4096 product,
bfloat16 over int8 (v5e, v5p, v6e) or e4m3 (tpu7x), compiled ahead of time and not run: no memory
traffic, no rounding of the operands. Measure your own model and say ``Hardware({8: 1.6})``.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from qat.laws.table import UNQUANTIZED_BITS
from qat.spelling import expected_instead, expected_one_of

TRAINING_BITS = ("weight_bits", "activation_bits", "kv_bits")
Bits = Mapping[str, Array]

FORWARD_SHARE = 1 / 3  # of the 6 N D FLOPs; the gradients of both operands are the other two


@runtime_checkable
class Cost(Protocol):
    """Prices runs; hashable, elementwise in `jax.numpy`.

    ``params`` counts non-embedding parameters and ``bits`` holds each of `TRAINING_BITS`, 16 for
    unquantized. What comes back is FLOPs of bfloat16, proportional to the tokens.
    """

    def training(self, params: Array, tokens: Array, bits: Bits) -> Array:
        """FLOPs of training on ``tokens`` tokens."""

    def inference(self, params: Array, tokens: Array, bits: Bits) -> Array:
        """FLOPs of serving ``tokens`` tokens, forward passes alone."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """A FLOP costs as much as its operands have bits: ``6 N D P / 16`` (arXiv 2411.04330).

    P is the mean of the bits of weights, activations and KV cache.
    """

    def training(self, params: Array, tokens: Array, bits: Bits) -> Array:
        """``6 N D P / 16``."""
        return 6 * params * tokens * _mean(bits) / UNQUANTIZED_BITS

    def inference(self, params: Array, tokens: Array, bits: Bits) -> Array:
        """``2 N T P / 16``."""
        return 2 * params * tokens * _mean(bits) / UNQUANTIZED_BITS


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A chip that multiplies operands of some widths faster than bfloat16.

    The wider operand of weights and activations decides, and takes the narrowest width of the chip
    that holds it. The cache of keys and values costs memory, not FLOPs, and is not priced.

    Attributes:
        speedups: speed over bfloat16 by width in bits, such as ``{8: 1.99}``.
        quantized_share: share of the FLOPs of training that run in few bits: a third where only
            the forward pass is quantized, 1 where gradients are as well.

    Raises:
        ValueError: for a width outside (0, 16), a speed or a share that is not sensible.
    """

    speedups: Mapping[float, float]
    quantized_share: float = FORWARD_SHARE

    def __post_init__(self) -> None:
        if not isinstance(self.speedups, Mapping):
            raise ValueError(expected_instead("speedups", "such as {8: 1.99}", self.speedups))
        for width, speed in self.speedups.items():
            if not 0 < width < UNQUANTIZED_BITS:
                raise ValueError(f"speedups are of widths in (0, 16) bits, not of {width}")
            if not 0 < speed < float("inf"):
                raise ValueError(f"the speedup at {width} bits must be positive, not {speed}")
        if not 0 <= self.quantized_share <= 1:
            raise ValueError(f"quantized_share must be in [0, 1], not {self.quantized_share}")
        frozen = types.MappingProxyType(dict(sorted(self.speedups.items(), reverse=True)))
        object.__setattr__(self, "speedups", frozen)

    def __hash__(self) -> int:
        return hash((tuple(self.speedups.items()), self.quantized_share))

    def training(self, params: Array, tokens: Array, bits: Bits) -> Array:
        """``6 N D``, of which the quantized share is divided by the speedup."""
        slow = 1 - self.quantized_share
        return 6 * params * tokens * (slow + self.quantized_share / self._speed(bits))

    def inference(self, params: Array, tokens: Array, bits: Bits) -> Array:
        """``2 N T`` divided by the speedup."""
        return 2 * params * tokens / self._speed(bits)

    def _speed(self, bits: Bits) -> Array:
        """Over bfloat16, of the narrowest width that holds the wider operand."""
        widest = jnp.maximum(bits["weight_bits"], bits["activation_bits"])
        speed = jnp.ones_like(widest)
        for width, factor in self.speedups.items():  # the widest first
            speed = jnp.where(widest <= width, factor, speed)
        return speed


COSTS: dict[str, Cost] = {
    "linear": Linear(),
    "v5e": Hardware({8: 1.99}),
    "v5p": Hardware({8: 1.97}),
    "v6e": Hardware({8: 1.28}),
    "tpu7x": Hardware({8: 2.09}),
}


def get_cost(cost: str | Cost) -> Cost:
    """Looks a cost up by name; any other `Cost` is returned as it is.

    Raises:
        ValueError: for an unknown name; the message gives the nearest known one.
    """
    if isinstance(cost, str):
        if cost not in COSTS:
            raise ValueError(expected_one_of("cost", cost, COSTS))
        return COSTS[cost]
    if not isinstance(cost, Cost):
        raise ValueError(expected_instead("cost", f"one of {', '.join(COSTS)} or a Cost", cost))
    return cost


def bits_of(columns: Mapping[str, ArrayLike]) -> dict[str, Array]:
    """The bits that a cost prices, of all columns of a run."""
    return {name: jnp.asarray(columns[name]) for name in TRAINING_BITS}


def _mean(bits: Bits) -> Array:
    total = bits["weight_bits"] + bits["activation_bits"] + bits["kv_bits"]
    return total / len(TRAINING_BITS)
