"""A fit as many equally good parameter sets: its optimum first, then its bootstrap draws.

Whatever follows from a fit (an optimal size, a critical token count) is computed for each of them
alike, and its interval is read off the spread. Parameters that no row informed take the values at
which they have no effect, and where the law then needs them it has nothing to say.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from qat.laws.law import Group, Law, Values
from qat.laws.record import Fit
from qat.laws.table import UNQUANTIZED_BITS

# Arrays end in their axes: S parameter sets, the fit's own first.
Floats = NDArray[np.float64]
TAILS = (2.5, 97.5)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval, whose ends are NaN without draws."""

    value: float
    low: float = np.nan
    high: float = np.nan

    def __str__(self) -> str:
        interval = f" ({self.low:.4g} to {self.high:.4g})" if self.low < self.high else ""
        return f"{self.value:.4g}{interval}"


def estimate(value_S: Floats) -> Estimate:
    """The first value with the percentile interval of the others.

    The ends are draws themselves, since between a finite draw and an infinite one there is nothing
    to interpolate. NaN among the draws makes them NaN.
    """
    if len(value_S) == 1:
        return Estimate(float(value_S[0]))
    low = np.percentile(value_S[1:], TAILS[0], method="lower")
    high = np.percentile(value_S[1:], TAILS[1], method="higher")
    return Estimate(float(value_S[0]), float(low), float(high))


class Draws(NamedTuple):
    """Parameter sets of a law.

    Attributes:
        law: the law.
        values: each parameter's values, shape (S,), neutral where it was not fitted.
        unfitted: groups that were not fitted.
    """

    law: Law
    values: dict[str, Floats]
    unfitted: tuple[Group, ...]


def draws_of(fit: Fit) -> Draws:
    """The parameter sets of a fit.

    Raises:
        ValueError: if a parameter outside the law's groups is NaN or missing.
    """
    law = fit.law
    params = {name: float(fit.params.get(name, np.nan)) for name in law.names}
    unfitted = tuple(g for g in law.groups if any(np.isnan(params[name]) for name in g.parameters))
    for group in unfitted:
        params |= zip(group.parameters, group.neutral, strict=True)
    if unknown := [name for name, value in params.items() if np.isnan(value)]:
        raise ValueError(f"the fit of law {law.name!r} has no value for {', '.join(unknown)}")
    count = max((len(draws_S) for draws_S in fit.samples.values()), default=0)
    values = {
        name: np.concatenate([[value], fit.samples.get(name, np.full(count, value))])
        for name, value in params.items()
    }
    return Draws(law, values, unfitted)


def known_loss(law: Law, unfitted: tuple[Group, ...], params: Values, columns: Values) -> Array:
    """The law's loss, elementwise; inf outside its domain and where it needs an unfitted group."""
    loss = law.loss(params, columns)
    known = jnp.isfinite(loss)
    if law.domain is not None:
        known &= law.domain(params, columns)
    for group in unfitted:
        informs = [columns[name] < UNQUANTIZED_BITS for name in group.columns]
        known &= ~jnp.all(jnp.stack(jnp.broadcast_arrays(*informs)), axis=0)
    return jnp.where(known, loss, jnp.inf)
