"""Laws of number formats: what exponent, mantissa and scales are worth, not bits alone.

Sun et al. 2025 count the bits of exponent and mantissa; Panferov et al. 2025 compute a format's
capacity from its error on normal values. The columns they read beside those of every table:
``exponent_bits`` and ``mantissa_bits``, ``scale_group`` (elements that share a scale),
``weight_error``, ``activation_error`` and ``kv_error`` (mean squared errors of rounding standard
normal values, 0 where nothing is rounded).
"""

from typing import Annotated

import jax.numpy as jnp
from jax import Array

from qat.laws.law import (
    amplitude,
    exponent,
    irreducible,
    law,
    positive,
    power,
)

_WIDTH = ((1e-2, 20.0), (0.3, 5.0))
_MODEL, _DATA = {"params": "alpha"}, {"tokens": "beta"}


@law("n N^-alpha + d D^-beta + E + D^beta N^-alpha log2(B) / (gamma (e + 1/2)^delta (m + 1/2)^nu)")
def sun(
    params: Array,
    tokens: Array,
    exponent_bits: Array,
    mantissa_bits: Array,
    scale_group: Array,
    *,
    n: Annotated[
        Array,
        amplitude("amplitude of the model term, nats · params^alpha", per={"params": "alpha"}),
    ],
    d: Annotated[Array, amplitude("amplitude of the data term, nats · tokens^beta", per=_DATA)],
    E: Annotated[Array, irreducible()],
    alpha: Annotated[Array, exponent("of the model term")],
    beta: Annotated[Array, exponent("of the data term")],
    gamma: Annotated[
        Array,
        amplitude(
            "robustness to the format, tokens^beta / (nats · params^alpha)",
            per={"tokens": "beta"},
            times={"params": "alpha"},
        ),
    ],
    delta: Annotated[Array, exponent("of the exponent's bits", *_WIDTH)],
    nu: Annotated[Array, exponent("of the mantissa's bits", *_WIDTH)],
) -> Array:
    """Sun et al. 2025, arXiv 2501.02423; B elements share a scale."""
    model, data = power(params, -alpha), power(tokens, -beta)
    format_worth = power(exponent_bits + 0.5, delta) * power(mantissa_bits + 0.5, nu)
    harm = jnp.log2(scale_group) * model / (data * gamma * format_worth)
    return n * model + d * data + E + harm


def _capacity(error: Array, steepness: Array, curvature: Array) -> Array:
    """``tanh(F (log_4 1/error)^C)``, which is 1 where there is no error."""
    bits = -jnp.log(jnp.where(error > 0, error, 1.0)) / jnp.log(4.0)
    return jnp.where(error > 0, jnp.tanh(steepness * power(bits, curvature)), 1.0)


@law("A (N prod_x tanh(F log_4(1/error_x)^C))^-alpha + B D^-beta + E, x = weights, activations, KV")
def capacity(
    params: Array,
    tokens: Array,
    weight_error: Array,
    activation_error: Array,
    kv_error: Array,
    *,
    A: Annotated[
        Array,
        amplitude("amplitude of the model term, nats · params^alpha", per={"params": "alpha"}),
    ],
    B: Annotated[Array, amplitude("amplitude of the data term, nats · tokens^beta", per=_DATA)],
    E: Annotated[Array, irreducible()],
    alpha: Annotated[Array, exponent("of the model term")],
    beta: Annotated[Array, exponent("of the data term")],
    F: Annotated[
        Array,
        positive("growth of capacity with a format's effective bits", (1e-2, 10.0), (0.1, 1.5)),
    ],
    C: Annotated[Array, exponent("of the effective bits", (0.1, 5.0), (0.5, 2.0))],
) -> Array:
    """Panferov et al. 2025, arXiv 2506.01863, with capacity 1 for what is not rounded."""
    for error in (weight_error, activation_error, kv_error):
        params = params * _capacity(error, F, C)
    return A * power(params, -alpha) + B * power(tokens, -beta) + E
