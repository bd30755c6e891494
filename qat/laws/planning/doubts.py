"""What to know before believing a plan, and why there is none.

A search always returns a best point. It is an optimum only if it lies inside of what was searched;
and a law that says more data hurts is saying something about the budget, not about its best use.
"""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qat.laws.law import float64_on_cpu
from qat.laws.planning.allocation import FEWEST_TOKENS, Allocations, Budget, Space, served_bits
from qat.laws.planning.cost import TRAINING_BITS
from qat.laws.planning.draws import Estimate, estimate, known_loss
from qat.laws.planning.setting import without_data
from qat.laws.record import Fit
from qat.laws.table import UNQUANTIZED_BITS

FAR = 3.0  # times the ends of what was fitted
EDGE = 1e-3  # relative: nearer than this to an end of the search, an optimum stands at the end


def doubts(
    fit: Fit, budget: Budget, space: Space, best: Allocations, given: Mapping[str, float]
) -> Iterator[str]:
    """A line for each reason to doubt that ``best`` is an optimum.

    Args:
        fit: behind it.
        budget: what was allocated.
        space: what was searched.
        best: the optimum of each parameter set, the fit's own first.
        given: columns whose values the user fixed.
    """
    yield from _held_for_want_of_data(budget, given)
    if space.params[0] < space.params[1]:
        yield from _edge("params", estimate(best.params), *space.params)
        yield from _edge("tokens", estimate(best.tokens), FEWEST_TOKENS, np.inf)
    if space.bits[0] < space.bits[1]:
        yield from _edge("bits", estimate(best.bits), *space.bits)
    yield from _too_many_tokens(budget, best)
    yield from _extrapolations(fit, best)
    if fit.diagnostics.unidentified:
        names = ", ".join(fit.diagnostics.unidentified)
        yield f"the rows of the fit do not identify {names}"


def why_nothing(budget: Budget, space: Space) -> str:
    """Why there is no plan, in one line."""
    law, (least, most), (low, high) = budget.draws.law, space.params, space.bits
    with float64_on_cpu():
        bits = served_bits({**budget.columns, **dict.fromkeys(budget.operands, low)})
        size, served = jnp.asarray(least), jnp.asarray(budget.inference_tokens)
        price = float(budget.cost.inference(size, served, bits))
    if price >= budget.flops:
        return (
            f"serving inference_tokens = {budget.inference_tokens:g} costs at least {price:.3g} "
            f"FLOPs, the whole budget is flops = {budget.flops:g}"
        )
    return (
        f"flops = {budget.flops:g} pays for no run that law {law.name!r} has a loss for, among "
        f"{least:g} to {most:g} params, {low:g} to {high:g} bits, {FEWEST_TOKENS:g} tokens or more"
    )


def _held_for_want_of_data(budget: Budget, given: Mapping[str, float]) -> Iterator[str]:
    """A line for each operand that stays at 16 bits only for want of data."""
    for name in (b for b in TRAINING_BITS if b not in (*budget.operands, *given)):
        if name in without_data(budget.draws, {**given, name: 1.0}):
            yield f"{name} stays at {UNQUANTIZED_BITS:g}: the fit has no rows with fewer"


def _edge(name: str, found: Estimate, low: float, high: float) -> Iterator[str]:
    """A line for each end of the search at which an optimum lies, or else its interval."""
    values = np.array([found.value, found.low, found.high])
    for end, at_end in ((low, values <= low * (1 + EDGE)), (high, values >= high * (1 - EDGE))):
        if at_end[0]:
            yield f"{name} = {end:g} is where the search ended: no optimum was found inside"
        elif at_end.any():
            yield f"the interval of {name} reaches {end:g}, where the search ended"


def _extrapolations(fit: Fit, best: Allocations) -> Iterator[str]:
    """A line for size or data far from what was fitted."""
    for name, value in (("params", best.params[0]), ("tokens", best.tokens[0])):
        low, high = fit.ranges.get(name, (0.0, np.inf))
        if value > FAR * high:
            yield f"{name} = {value:.3g} is {value / high:.3g} times the most that was fitted"
        if value < low / FAR:
            yield f"{name} = {value:.3g} is {value / low:.3g} times the least that was fitted"


def _too_many_tokens(budget: Budget, best: Allocations) -> Iterator[str]:
    """A line if fewer tokens than the budget pays for would do better, as rounding may have it."""
    draws = budget.draws
    run = {**budget.columns, **dict.fromkeys(budget.operands, best.bits[0])}
    run |= {"params": best.params[0], "tokens": best.tokens[0] * np.array([1.0, 0.99])}
    values = {name: each_S[0] for name, each_S in draws.values.items()}
    with float64_on_cpu():
        arrays = jax.tree.map(jnp.asarray, (values, run))
        all_of_them, fewer = known_loss(draws.law, draws.unfitted, *arrays)
    if fewer < all_of_them:
        yield "fewer tokens than the budget pays for would lower the loss: see critical_tokens"
