"""How much of a model a bit width leaves: shapes of saturation, from a first bit to sixteen.

Every shape is ``f(P) = 1 - e^n t(P)`` with a tail t that falls from one to zero over γ bits:

    exponential   t = exp(-P/γ)             Kumar et al. 2024, arXiv 2411.04330
    weibull       t = exp(-(P/γ)^k)         the exponential at k = 1
    power         t = (1 + P/γ)^-k
    logistic      f = 1/(1 + exp(n - P/γ))  the exponential far from its zero, and none itself

The offset n moves the curve along the bits. All but the logistic reach zero at some width where n
is positive, and mean nothing below. A fitter must be able to stand there and find its way back, so
below `MIN_EFFICIENCY` f continues as a positive hyperbola with the same value and slope: the
objective stays finite and worsens the further out it goes. A prediction there is NaN, since the
continuation is a device of the fit and no claim about a model.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qat.laws.law import Parameter

MIN_EFFICIENCY = 1e-3
SHAPES = ("exponential", "weibull", "power", "logistic")
_WITH_POWER = ("weibull", "power")


def efficiency(shape: str, bits: Array, gamma: Array, n: Array, k: Array) -> Array:
    """F of the module's table, continued below `MIN_EFFICIENCY`."""
    if shape == "logistic":
        return jax.nn.sigmoid(bits / gamma - n)
    plain = 1 - jnp.exp(n) * tail(shape, bits, gamma, k)
    beyond = jnp.minimum(plain, MIN_EFFICIENCY)
    continued = MIN_EFFICIENCY**2 / (2 * MIN_EFFICIENCY - beyond)
    return jnp.where(plain < MIN_EFFICIENCY, continued, plain)


def tail(shape: str, bits: Array, gamma: Array, k: Array) -> Array:
    """T of the module's table; of the logistic 1 - f without offset."""
    if shape == "exponential":
        return jnp.exp(-bits / gamma)
    if shape == "weibull":
        return jnp.exp(-((bits / gamma) ** k))
    if shape == "power":
        return (1 + bits / gamma) ** -k
    return jax.nn.sigmoid(-bits / gamma)


def shape_parameters(shape: str, operand: str, what: str) -> tuple[Parameter, ...]:
    """Width and, where the shape has one, power of a tail.

    Args:
        shape: one of `SHAPES`.
        operand: suffix of the names.
        what: is quantized, for the meanings.
    """
    width = Parameter(
        f"gamma_{operand}",
        f"bits over which the cost of few bits of {what} falls",
        (0.1, 30.0),
        (0.3, 4.0),
    )
    power = Parameter(f"k_{operand}", f"power of that fall of {what}", (0.2, 20.0), (0.7, 3.0))
    return (width, power) if shape in _WITH_POWER else (width,)


def offset_parameter(operand: str, what: str) -> Parameter:
    """The offset n, which moves an efficiency along the bits."""
    meaning = f"offset in the exponent of the efficiency of {what}"
    return Parameter(f"n_{operand}", meaning, (-5.0, 10.0), (-1.0, 1.5), signed=True)


def without_effect(parameter: str, offset: bool) -> float:
    """The value of a curve's parameter at which all widths have efficiency one.

    Args:
        parameter: its name.
        offset: whether the curve has one.
    """
    if offset:
        return {"gamma": 1.0, "n": -np.inf, "k": 1.0}[parameter.partition("_")[0]]
    return {"gamma": 1e-9, "k": 100.0}[parameter.partition("_")[0]]
