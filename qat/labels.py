"""Contractions by labels: every axis has a name, and axes of one name belong together.

Einsum subscripts are labels already; for a `dot_general` they are made up. Its gradients are then
contractions of the same labels in another order, with no case distinctions.
"""

from collections.abc import Sequence
from typing import Any

Labels = Sequence[Any]
DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def numbers_of(lhs: Labels, rhs: Labels, out: Labels) -> tuple[DimensionNumbers, tuple[int, ...]]:
    """Dimension numbers of the contraction of two operands, and how to transpose its result."""
    shared = [label for label in lhs if label in rhs]
    batch = [label for label in shared if label in out]
    contracted = [label for label in shared if label not in out]
    alone = [label for label in [*lhs, *rhs] if label not in shared]
    order = tuple([*batch, *alone].index(label) for label in out)
    return (_axes(contracted, lhs, rhs), _axes(batch, lhs, rhs)), order


def labels_of(
    numbers: DimensionNumbers, lhs_rank: int, rhs_rank: int
) -> tuple[Labels, Labels, Labels]:
    """Labels of both operands and of the result of a `dot_general`."""
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = numbers
    lhs = list(range(lhs_rank))
    partner = dict(zip([*rhs_contracted, *rhs_batch], [*lhs_contracted, *lhs_batch], strict=True))
    rhs = [partner.get(axis, lhs_rank + axis) for axis in range(rhs_rank)]
    lhs_alone = [axis for axis in lhs if axis not in (*lhs_contracted, *lhs_batch)]
    rhs_alone = [label for label in rhs if label >= lhs_rank]
    return lhs, rhs, [*lhs_batch, *lhs_alone, *rhs_alone]


def _axes(labels: Labels, lhs: Labels, rhs: Labels) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where labels stand in both operands."""
    first = tuple(list(lhs).index(label) for label in labels)
    return first, tuple(list(rhs).index(label) for label in labels)
