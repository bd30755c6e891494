"""Two-operand einsum on top of the one contraction.

`jnp.einsum` may swap its operands before it multiplies, and then activations would be quantized as
weights. Here the subscripts become dimension numbers directly, in the order given.
"""

import string
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qat.dot_general import DotGeneral, dot_general
from qat.labels import numbers_of
from qat.policy import Policy

Einsum = Callable[..., jax.Array]


def einsum(policy: Policy | str | None, key: jax.Array | None = None) -> Einsum:
    """A drop-in for `jnp.einsum` of two operands that quantizes them.

    The first operand is the activations, the second the weights.

    Args:
        policy: as in `qat.dot_general`.
        key: as in `qat.dot_general`.

    Returns:
        A function of (subscripts, lhs, rhs) and the keywords of `jnp.einsum`: ``precision``,
        ``preferred_element_type``, ``out_sharding``. It raises ValueError for subscripts that are
        not a contraction of two operands.
    """
    return einsum_by(dot_general(policy, key))


def contracted_axes(subscripts: str, rhs_rank: int) -> tuple[int, ...]:
    """Axes of the second operand that are summed over, in subscripts such as "btd,df->btf"."""
    inputs, _, out = subscripts.replace(" ", "").partition("->")
    rhs = inputs.rpartition(",")[2]
    hidden = rhs_rank - len(rhs.replace("...", ""))
    dims = rhs.replace("...", "." * hidden)
    return tuple(axis for axis, letter in enumerate(dims) if letter not in (*out, "."))


def einsum_by(dot: DotGeneral) -> Einsum:
    """`einsum` on top of the given contraction."""

    def contract(
        subscripts: str,
        lhs: jax.Array,
        rhs: jax.Array,
        *,
        precision: Any = None,
        preferred_element_type: DTypeLike | None = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        lhs_dims, rhs_dims, out = _parsed(subscripts, lhs.ndim, rhs.ndim)
        numbers, order = numbers_of(lhs_dims, rhs_dims, out)
        in_order = order == tuple(range(len(order)))
        product = dot(
            lhs,
            rhs,
            numbers,
            precision,
            preferred_element_type,
            out_sharding=out_sharding if in_order else None,
        )
        if in_order:
            return product
        product = jnp.transpose(product, order)
        return product if out_sharding is None else jax.sharding.reshard(product, out_sharding)

    return contract


def _parsed(subscripts: str, lhs_rank: int, rhs_rank: int) -> tuple[str, str, str]:
    """Letters of both operands and of the result, with the ellipsis spelled out."""

    def wrong(reason: str) -> ValueError:
        return ValueError(f"einsum {subscripts!r}: {reason}; expected one such as 'btd,df->btf'")

    inputs, arrow, out = subscripts.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if not arrow or len(operands) != 2:
        raise wrong("not two operands and a result")
    spare = [letter for letter in string.ascii_letters if letter not in subscripts]
    named = [len(dims.replace("...", "")) for dims in operands]
    hidden = [rank - n for rank, n in zip((lhs_rank, rhs_rank), named, strict=True)]
    ellipsis = "".join(spare[: max(0, *hidden)])
    expanded = []
    for dims, n, rank in zip(operands, hidden, (lhs_rank, rhs_rank), strict=True):
        if n < 0 or (n and "..." not in dims):
            raise wrong(f"{dims!r} does not fit an operand of {rank} axes")
        expanded.append(dims.replace("...", ellipsis[len(ellipsis) - n :]))
    out = out.replace("...", ellipsis)
    lhs, rhs = expanded
    if any(len(set(dims)) < len(dims) for dims in (lhs, rhs, out)):
        raise wrong("a letter repeats within one operand")
    if not set(out) <= {*lhs, *rhs}:
        raise wrong("the result has a letter of neither operand")
    if lone := sorted((set(lhs) ^ set(rhs)) - set(out)):
        raise wrong(f"{lone[0]!r} is summed over one operand alone")
    return lhs, rhs, out
