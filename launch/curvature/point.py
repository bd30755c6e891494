"""A model as a point of its loss surface: its loss as a function of the weights that are rounded.

A rotated model computes what the original does, with other weights: the same surface in other
coordinates. A rotation alone keeps trace and eigenvalues; but the scales of norms go into the
weights first, and these change them. What is the same in all coordinates is ΔᵀHΔ. Methods that
scale weights by what each format or text needs would have coordinates of their own for each, so
they are none of these.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Int32

from launch.rounding.evaluation import Parts
from launch.rounding.fitting import SKIP
from models.transformer import Transformer
from qat.analysis import sharpness
from qat.ptq import Method
from qat.training.step import cross_entropy

PLAIN, ROTATED = "none", "quarot"  # bases
_TOKENS_OF_A_BATCH = 4096
_FEWEST_BATCHES = 8  # for standard errors


def basis_of(method: str) -> str:
    """The coordinates in which a method rounds.

    Raises:
        ValueError: they are others for every format or text.
    """
    transformations = Method.parse(method).transformations
    if transformations == ():
        return PLAIN
    if transformations == (ROTATED,):
        return ROTATED
    raise ValueError(
        f"method {method!r} scales weights as each format or text needs, so there is not one "
        "Hessian of them: expected rtn, gptq or hqq, or quarot+ before one of these"
    )


@dataclasses.dataclass(frozen=True)
class Point:
    """A model's loss in the weights that methods round.

    Attributes:
        loss: (weights, token ids (B, S)) → mean loss, nats per token.
        weights: by path.
    """

    loss: sharpness.Loss
    weights: dict[str, Array]

    @classmethod
    def of(cls, model: Transformer) -> "Point":
        """That of a model without quantizers."""
        graph, params, rest = Parts.of(model)
        return cls(*sharpness.restrict(_Loss(rest, graph), params, _is_rounded))

    @property
    def size(self) -> int:
        """How many weights."""
        return sum(leaf.size for leaf in self.weights.values())

    def change_to(self, model: Transformer) -> dict[str, Array]:
        """What a model of the same function has in these weights, less what is here."""
        there = Point.of(model).weights
        return {name: there[name] - here for name, here in self.weights.items()}


def batches_of(tokens_NS: Int32[np.ndarray, "N S"]) -> Sequence[Int32[np.ndarray, "B S"]]:
    """All windows, in batches of one size: eight at least if there are as many windows."""
    count, window = tokens_NS.shape
    most = max(1, min(_TOKENS_OF_A_BATCH // (window - 1), count // _FEWEST_BATCHES))
    size = next(each for each in range(most, 0, -1) if count % each == 0)
    return list(tokens_NS.reshape(-1, size, window))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Loss:
    """Of a model in all its parameters; models of one shape share compiled programs.

    Attributes:
        rest: what else the model holds, such as rotations.
        graph: of the model.
    """

    rest: Any
    graph: Any = dataclasses.field(metadata={"static": True})

    def __call__(self, params: Any, tokens_BS: Array) -> Array:
        model: Transformer = nnx.merge(self.graph, params, self.rest)
        return jnp.mean(cross_entropy(model(tokens_BS[:, :-1]), tokens_BS))


def _is_rounded(path: str) -> bool:
    """As `qat.ptq` does it: kernels of the layers that are not left out."""
    layer, _, name = path.rpartition("/")
    return name == "kernel" and re.fullmatch(SKIP, layer) is None
