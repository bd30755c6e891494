"""How initial values and learning rates follow from a model's size.

A rate tuned on a small model carries over to a large one if every layer's output keeps its size
at the start and moves by as much in every step, whatever the width and depth. For width that is
µP (Yang et al., arXiv 2203.03466, their Table 3, for Adam); for depth it is depth-µP (Yang et al.,
arXiv 2310.02244): with m = width / base width and d = depth / base depth,

    array                     initial values   rate of Adam's update
    embedding                 √m               1
    inner matrices            1                1/m
    head, routers             1/√m             1/m
    scales and biases         1                1
    anything in a block       as above         times 1/√d

relative to Flax's initial values, whose variance is one over the fan-in; attention scores are
divided by the channels of a head instead of their root, and every block's update of the residual
stream is multiplied by 1/√d. The decay of weights is not scaled, so that what a unit of learning
rate removes is the same at every size.

What an array is follows from its logical axes (see `qat.training.sharding`), not from its name.
"""

import dataclasses
import math
from typing import Any

import jax

from qat.spelling import expected_one_of
from qat.training.sharding import LogicalAxes, axes_of, path_name

RULES = ("fixed", "depth-mup", "mup")

_FINITE = ("vocabulary", "expert")  # axes that do not grow with the model
_STACK = "layer"


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Size relative to the model whose learning rate was tuned.

    Attributes:
        width: ratio m of the widths; 1 does not scale.
        depth: ratio d of the numbers of layers; 1 does not scale.
        channels: ratio of the channels of a head: m where wider models have as many heads, 1
            where they have more.
    """

    width: float = 1.0
    depth: float = 1.0
    channels: float = 1.0

    @classmethod
    def of(cls, rule: str, width: float, depth: float, channels: float) -> "Scaling":
        """The ratios that a rule takes into account.

        Args:
            rule: "fixed" scales nothing, "depth-mup" by depth, "mup" by width and depth.
            width: ratio of the widths.
            depth: ratio of the numbers of layers.
            channels: ratio of the channels of a head.

        Raises:
            ValueError: no rule has that name, or a ratio is not positive.
        """
        if rule not in RULES:
            raise ValueError(expected_one_of("scaling rule", rule, RULES))
        ratios = {"width": width, "depth": depth, "channels": channels}
        for name, ratio in ratios.items():
            if not 0 < ratio < math.inf:
                raise ValueError(f"scaling by {name} {ratio}: expected a positive ratio")
        kept = {"fixed": (), "depth-mup": ("depth",), "mup": tuple(ratios)}[rule]
        return cls(**{name: ratios[name] for name in kept})

    @property
    def residual_scale(self) -> float:
        """Factor of every block's update of the residual stream."""
        return float(self.depth**-0.5)

    def attention_scale(self, channels: int) -> float:
        """Factor of attention scores whose heads have this many channels."""
        return float((channels * self.channels) ** -0.5)

    def initial_values(self, params: Any, axes: LogicalAxes) -> Any:
        """Parameters as initialised by Flax, rescaled; same pytree."""
        return _map(lambda p, axes: p * self._initial(axes), params, axes)

    def rates(self, params: Any, axes: LogicalAxes) -> Any:
        """Factor of each parameter's update by Adam; a float for every array."""
        return _map(lambda _, axes: self._rate(axes), params, axes)

    def _initial(self, axes: tuple[str | None, ...]) -> float:
        inner = _inner(axes)
        if not set(_FINITE) & set(inner):
            return 1.0
        return float(self.width**0.5 if inner[0] in _FINITE else self.width**-0.5)

    def _rate(self, axes: tuple[str | None, ...]) -> float:
        inner = _inner(axes)
        matrix = len(inner) > 1 and inner[0] not in _FINITE
        in_block = self.residual_scale if _STACK in axes else 1.0
        return in_block / self.width if matrix else in_block


def _inner(axes: tuple[str | None, ...]) -> tuple[str, ...]:
    """The axes of one layer that have a name."""
    return tuple(axis for axis in axes if axis is not None and axis != _STACK)


def _map(function: Any, params: Any, axes: LogicalAxes) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(leaf, axes_of(path_name(path), leaf.shape, axes)), params
    )
