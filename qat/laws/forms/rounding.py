"""What few bits cost on top of the law of size and data; Kumar's term alone, others with that law.

A power law in the bits after training (Ouyang et al. 2024), and the size of the groups of weights
that share a scale (Chen et al. 2025, quantization-aware training, one fit a pair of formats). Both
terms grow with the tokens and shrink with the size, and only quantized rows have them.
"""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
from jax import Array

from qat.laws.forms.size import chinchilla
from qat.laws.law import Group, Law, Values, amplitude, exponent, law, positive, power, signed
from qat.laws.table import UNQUANTIZED_BITS

_OF_TOKENS = signed("exponent of tokens in the cost of few bits", (-3.0, 3.0), (0.0, 1.0))
_OF_SIZE = signed("exponent of 1 / params in the cost of few bits", (-3.0, 3.0), (0.0, 1.0))


@law("C_T D^gamma_D N^-gamma_N exp(-P_post/gamma_post)")
def kumar_term(
    params: Array,
    tokens: Array,
    ptq_bits: Array,
    *,
    C_T: Annotated[
        Array,
        amplitude(
            "amplitude of the cost of rounding, nats · params^gamma_N / tokens^gamma_D",
            per={"params": "gamma_N"},
            times={"tokens": "gamma_D"},
        ),
    ],
    gamma_D: Annotated[Array, _OF_TOKENS],
    gamma_N: Annotated[Array, _OF_SIZE],
    gamma_post: Annotated[
        Array, positive("bits over which that cost falls e-fold", (0.1, 30.0), (0.3, 4.0))
    ],
) -> Array:
    """Kumar et al. 2024, arXiv 2411.04330, Eq. 2: nats that rounding to P_post bits adds."""
    return C_T * power(tokens, gamma_D) * power(params, -gamma_N) * jnp.exp(-ptq_bits / gamma_post)


@law("k D^gamma_D N^-gamma_N P_post^-gamma_P")
def ouyang_term(
    params: Array,
    tokens: Array,
    ptq_bits: Array,
    *,
    k: Annotated[
        Array,
        amplitude(
            "amplitude of the cost of rounding, nats · params^gamma_N · bits^gamma_P / "
            "tokens^gamma_D",
            per={"params": "gamma_N", "ptq_bits": "gamma_P"},
            times={"tokens": "gamma_D"},
        ),
    ],
    gamma_D: Annotated[Array, _OF_TOKENS],
    gamma_N: Annotated[Array, _OF_SIZE],
    gamma_P: Annotated[Array, exponent("of 1 / bits in it", (0.1, 20.0), (1.0, 8.0))],
) -> Array:
    """Ouyang et al. 2024, arXiv 2411.17691: nats that rounding to P_post bits adds."""
    return k * power(tokens, gamma_D) * power(params, -gamma_N) * power(ptq_bits, -gamma_P)


@law("k D^gamma_D N^-gamma_N log2(G)^gamma_G")
def chen_term(
    params: Array,
    tokens: Array,
    weight_group: Array,
    *,
    k: Annotated[
        Array,
        amplitude(
            "amplitude of the cost of few bits, nats · params^gamma_N / tokens^gamma_D",
            per={"params": "gamma_N"},
            times={"tokens": "gamma_D"},
        ),
    ],
    gamma_D: Annotated[Array, _OF_TOKENS],
    gamma_N: Annotated[Array, _OF_SIZE],
    gamma_G: Annotated[Array, exponent("of log2 of the elements that share a scale")],
) -> Array:
    """Chen et al. 2025, arXiv 2505.14302: nats that a pair of formats adds."""
    size = power(tokens, gamma_D) * power(params, -gamma_N)
    return k * size * power(jnp.log2(weight_group), gamma_G)


kumar_term, ouyang_term, chen_term = (
    dataclasses.replace(term, whole=False) for term in (kumar_term, ouyang_term, chen_term)
)


def _added_to_chinchilla(
    name: str, term: Law, column: str, lightest: tuple[float, ...], widths: int
) -> Law:
    """The law of size and data with a term of the rows that are quantized in a column."""

    def loss(p: Values, c: Values) -> Array:
        cost = jnp.where(c[column] < UNQUANTIZED_BITS, term.loss(p, c), 0.0)
        return chinchilla.loss(p, c) + cost

    return Law(
        name,
        f"{chinchilla.formula} + {term.formula}",
        loss,
        (*chinchilla.parameters, *term.parameters),
        tuple(dict.fromkeys((*term.columns, column))),
        (Group((column,), term.names, lightest, widths),),
    )


ouyang = _added_to_chinchilla("ouyang", ouyang_term, "ptq_bits", (0.0, 0.0, 0.0, 1.0), widths=3)
chen = _added_to_chinchilla("chen", chen_term, "weight_bits", (0.0, 0.0, 0.0, 1.0), widths=1)
