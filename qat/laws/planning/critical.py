"""From how many tokens on more data makes a quantized model worse.

Training on more tokens lowers one term of the loss and, once the weights are rounded or every
product is, raises another. Where the two slopes cancel is the critical number of tokens. It is the
root of the loss's slope over log D, found by bisection: of the loss itself a minimum is lost in
rounding error long before 1e20 tokens, because there both terms are a speck on the irreducible one.

The terms are powers of D in every law here, so the loss is convex in log D and has one minimum. Of
a law with several, one of them is found.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qat.laws.law import Group, Law, Values, float64_on_cpu
from qat.laws.planning.draws import Estimate, draws_of, estimate, known_loss
from qat.laws.planning.setting import check_number, settled
from qat.laws.record import Fit

FEWEST_TOKENS, MOST_TOKENS = 1e3, 1e40
BISECTIONS = 55  # of 85 nats: to float64's last digits


def critical_tokens(fit: Fit, params: float, **columns: float) -> Estimate:
    """The training tokens beyond which a law's loss rises with more of them.

    Args:
        fit: of a law that reads tokens; see also `qat.laws.published`.
        params: non-embedding parameters.
        **columns: values of what else the law reads, such as ``ptq_bits=4``, or ``exponent_bits=4,
            mantissa_bits=3, scale_group=128``. Bits that are not given are 16.

    Returns:
        Tokens, with the interval of the fit's draws: inf if more data always helps (up to 1e40
        tokens), 0 if it hurts from the first thousand on. The ends are NaN without draws, or if
        some draw's law means nothing there.

    Raises:
        ValueError: for a law without tokens, a column that is missing, unknown, or of which the fit
            has no data, or a model outside the law's domain.
    """
    draws = draws_of(fit)
    law = draws.law
    if "tokens" not in law.columns:
        raise ValueError(f"law {law.name!r} reads no tokens, only {', '.join(law.columns)}")
    check_number("params", params, above=0)
    size = {"params": float(params)}
    values = settled(draws, columns, searched=("params", "tokens"), priced=()) | size
    with float64_on_cpu():
        arguments = jax.tree.map(jnp.asarray, (draws.values, values))
        tokens_S = np.asarray(_turning_points(law, draws.unfitted, *arguments))
    if np.isnan(tokens_S[0]):
        text = ", ".join(f"{name} = {value:g}" for name, value in values.items())
        raise ValueError(f"the fitted law {law.name!r} means nothing at {text}")
    return estimate(tokens_S)


@functools.partial(jax.jit, static_argnames=("law", "unfitted"))
def _turning_points(
    law: Law, unfitted: tuple[Group, ...], params_S: Values, columns: Values
) -> Array:
    """The root of the slope for each parameter set, shape (S,)."""

    def loss(log_tokens: Array, params: Values) -> Array:
        return law.loss(params, {**columns, "tokens": jnp.exp(log_tokens)})

    def root(params: Values) -> Array:
        slope = functools.partial(jax.grad(loss), params=params)
        low, high = jnp.log(FEWEST_TOKENS), jnp.log(MOST_TOKENS)

        def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            middle = (ends[0] + ends[1]) / 2
            rises = slope(middle) > 0
            return jnp.where(rises, ends[0], middle), jnp.where(rises, middle, ends[1])

        turn = jnp.exp(jax.lax.fori_loop(0, BISECTIONS, halve, (low, high))[0])
        turn = jnp.where(slope(low) >= 0, 0.0, jnp.where(slope(high) <= 0, jnp.inf, turn))
        at = {**columns, "tokens": jnp.clip(turn, FEWEST_TOKENS, MOST_TOKENS)}
        return jnp.where(jnp.isfinite(known_loss(law, unfitted, params, at)), turn, jnp.nan)

    return jax.vmap(root)(params_S)
