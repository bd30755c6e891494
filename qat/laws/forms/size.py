"""Laws of size and data alone: Kaplan et al. 2020 and Hoffmann et al. 2022."""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from qat.laws.law import amplitude, exponent, irreducible, law, power


@law("[(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D")
def kaplan(
    params: Array,
    tokens: Array,
    *,
    N_c: Annotated[
        Array, amplitude("parameters at which size alone costs a nat", per={"params": 1.0})
    ],
    D_c: Annotated[
        Array, amplitude("tokens at which their lack alone costs a nat", per={"tokens": 1.0})
    ],
    alpha_N: Annotated[Array, exponent("of the model term")],
    alpha_D: Annotated[Array, exponent("of the whole")],
) -> Array:
    """Kaplan et al. 2020, arXiv 2001.08361, equation 1.5, in logarithms: powers overflow."""
    size = alpha_N / alpha_D * jnp.log(N_c / params)
    return jnp.exp(alpha_D * jnp.logaddexp(size, jnp.log(D_c / tokens)))


@law("A N^-alpha + B D^-beta + E")
def chinchilla(
    params: Array,
    tokens: Array,
    *,
    A: Annotated[
        Array,
        amplitude("amplitude of the model term, nats · params^alpha", per={"params": "alpha"}),
    ],
    B: Annotated[
        Array, amplitude("amplitude of the data term, nats · tokens^beta", per={"tokens": "beta"})
    ],
    E: Annotated[Array, irreducible()],
    alpha: Annotated[Array, exponent("of the model term")],
    beta: Annotated[Array, exponent("of the data term")],
) -> Array:
    """Hoffmann et al. 2022, arXiv 2203.15556, equation 2."""
    return A * power(params, -alpha) + B * power(tokens, -beta) + E
