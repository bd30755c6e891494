"""Sizes of blocks that fit every weight of a model.

A size that divides the inputs of one layer need not divide those of the next, so what is suggested
in its place was tried on all of them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qat.contractions import naming_layer
from qat.groups import groups_of
from qat.ptq.weights import Weight
from qat.quantizer import Quantizer


def check_blocks(quantizer: Quantizer, weights: Mapping[str, Weight]) -> None:
    """Looks for a weight that a quantizer's blocks do not fit.

    Args:
        quantizer: of all weights.
        weights: by path of their parameter.

    Raises:
        ValueError: there is one; the message has the nearest quantizer that fits all.
    """

    def fits(other: Quantizer) -> bool:
        return all(_objection(other, weight) is None for weight in weights.values())

    for path, weight in weights.items():
        if (objection := _objection(quantizer, weight)) is None:
            continue
        nearest = nearest_fitting(quantizer, weight.shape, fits)
        with naming_layer(path.rpartition("/")[0]):
            if nearest is None:
                raise objection
            raise ValueError(
                f"block size {quantizer.block_size} does not divide its weight of shape "
                f"{weight.shape[weight.stacked :]}; nearest for all layers is {str(nearest)!r}"
            )


def nearest_fitting(
    quantizer: Quantizer, lengths: Iterable[int], fits: Callable[[Quantizer], bool]
) -> Quantizer | None:
    """The quantizer with the nearest other size of blocks that fits.

    Args:
        quantizer: that does not; None is returned if it has no blocks.
        lengths: of axes, whose divisors are tried.
        fits: whether a quantizer does.
    """
    if quantizer.block_size is None:
        return None
    sizes = {d for n in lengths for d in range(1, n + 1) if n % d == 0}
    wanted = np.atleast_1d(quantizer.block_size)
    tried: list[Any] = sorted(
        itertools.product(sizes, repeat=wanted.size),
        key=lambda size: (np.abs(np.subtract(size, wanted)).sum(), size),
    )
    blocks = (size if len(size) > 1 else size[0] for size in tried)
    resized = (dataclasses.replace(quantizer, block_size=block) for block in blocks)
    return next(filter(fits, resized), None)


def _objection(quantizer: Quantizer, weight: Weight) -> ValueError | None:
    """Why a quantizer has no groups in a weight, if so."""
    one = jax.ShapeDtypeStruct(weight.shape[weight.stacked :], jnp.float32)
    try:
        groups_of(one, quantizer, weight.matrix_axes)
    except ValueError as error:
        return error
    return None
