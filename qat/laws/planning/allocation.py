"""The lowest loss that a budget buys, for many parameter sets of a law at once.

A budget leaves two choices, the size of the model and its bits; what remains after serving pays for
tokens. Where nothing remains, or the law means nothing, the loss is infinite, so such points lose.
A lane is one parameter set with a box to search. Lanes are searched in chunks of one static size,
so that plans of any number of draws and budgets share compiled programs.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray

from qat.laws.law import Group, Law, Values, float64_on_cpu
from qat.laws.planning.cost import Cost, bits_of
from qat.laws.planning.draws import Draws, Floats, known_loss
from qat.laws.planning.search import minimise

# Arrays end in their axes: L lanes, K = 2 coordinates (the logarithm of the parameters, the bits).
FEWEST_TOKENS = 1e3
LANES = 128


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a compiled search is made of.

    Attributes:
        law: the law.
        unfitted: its groups that were not fitted.
        cost: what a run costs.
        operands: columns that share the bits that are searched.
    """

    law: Law
    unfitted: tuple[Group, ...]
    cost: Cost
    operands: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Budget:
    """A budget, and everything that is decided before it is allocated.

    Attributes:
        draws: parameter sets of a law.
        cost: what a run costs.
        operands: columns that share the bits that are searched.
        flops: the budget.
        inference_tokens: tokens to be served out of it.
        columns: values of all other columns that the law or the cost reads.
    """

    draws: Draws
    cost: Cost
    operands: tuple[str, ...]
    flops: float
    inference_tokens: float
    columns: Mapping[str, float]


class Space(NamedTuple):
    """What is searched: the ends of N and of P, equal where held, and the widths compared."""

    params: tuple[float, float]
    bits: tuple[float, float]
    widths: tuple[float, ...]


class Allocations(NamedTuple):
    """Where the loss is lowest, one each lane, shape (L,); NaN with infinite loss if nowhere."""

    params: Floats
    tokens: Floats
    bits: Floats
    loss: Floats


def allocate(
    budget: Budget,
    set_L: NDArray[np.int64],
    params: tuple[ArrayLike, ArrayLike],
    bits: tuple[ArrayLike, ArrayLike],
) -> Allocations:
    """The best allocation of a budget within a box, each lane for itself.

    Args:
        budget: the problem.
        set_L: index of each lane's parameter set.
        params: lowest and highest number of parameters, scalars or shape (L,); the same number
            twice holds it.
        bits: lowest and highest bits of the operands, likewise.

    Returns:
        The allocations, in the order of the lanes.
    """
    ends = np.array([[np.broadcast_to(end, len(set_L)) for end in pair] for pair in (params, bits)])
    low_LK, high_LK = np.stack([np.log(ends[0]), ends[1]]).transpose(1, 2, 0)
    dimensions = 2 if (low_LK < high_LK).any(axis=0).all() else 1
    terms = Terms(budget.draws.law, budget.draws.unfitted, budget.cost, budget.operands)
    numbers = {**budget.columns, "flops": budget.flops, "served": budget.inference_tokens}
    chunks = []
    with float64_on_cpu():
        for first in range(0, len(set_L), LANES):
            # Short of lanes, some are repeated.
            index_L = np.resize(np.arange(first, min(first + LANES, len(set_L))), LANES)
            values_L = {name: each[set_L[index_L]] for name, each in budget.draws.values.items()}
            arrays = (values_L, numbers, low_LK[index_L], high_LK[index_L])
            chunks.append(_search(terms, dimensions, *jax.tree.map(jnp.asarray, arrays)))
    return Allocations(
        *(np.concatenate(parts)[: len(set_L)] for parts in zip(*chunks, strict=True))
    )


def served_bits(columns: Mapping[str, ArrayLike]) -> dict[str, Array]:
    """The bits a model is served with: those of training, its weights rounded after it."""
    bits = bits_of(columns)
    if "ptq_bits" in columns:
        bits["weight_bits"] = jnp.minimum(bits["weight_bits"], jnp.asarray(columns["ptq_bits"]))
    return bits


@functools.partial(jax.jit, static_argnames=("terms", "dimensions"))
def _search(
    terms: Terms,
    dimensions: int,
    values_L: Values,
    numbers: Values,
    low_LK: Array,
    high_LK: Array,
) -> tuple[Array, Array, Array, Array]:
    """Params, tokens, bits and loss of the best point of each lane, shape (L,) each.

    Two dimensions search the whole box, one its diagonal, which is all of it if a side is empty.
    """

    def search(values: Values, low_K: Array, high_K: Array) -> tuple[Array, Array, Array, Array]:
        def place(unit: Array) -> Array:
            return low_K + unit * (high_K - low_K)

        def loss(unit: Array) -> Array:
            return _loss(terms, values, _run(terms, numbers, place(unit)))

        best, lowest = minimise(loss, dimensions)
        best_K = jnp.where(jnp.isinf(lowest), jnp.nan, place(best))
        run = _run(terms, numbers, best_K)
        return run["params"], run["tokens"], best_K[1], lowest

    return jax.vmap(search)(values_L, low_LK, high_LK)


def _run(terms: Terms, numbers: Values, x_K: Array) -> dict[str, Array]:
    """The columns of the run that the coordinates choose and the budget pays for."""
    columns = {**numbers, "params": jnp.exp(x_K[0]), **dict.fromkeys(terms.operands, x_K[1])}
    trained, served = bits_of(columns), served_bits(columns)
    left = numbers["flops"] - terms.cost.inference(columns["params"], numbers["served"], served)
    a_token = terms.cost.training(columns["params"], jnp.ones_like(left), trained)
    return {**columns, "tokens": left / a_token}


def _loss(terms: Terms, values: Values, run: Values) -> Array:
    """The law's loss of a run; inf if the budget does not pay for it."""
    affordable = run["tokens"] >= FEWEST_TOKENS
    run = {**run, "tokens": jnp.maximum(run["tokens"], FEWEST_TOKENS)}
    return jnp.where(affordable, known_loss(terms.law, terms.unfitted, values, run), jnp.inf)
