"""Scaling laws as data: a row-wise function of (parameters, table) and its declaration.

A law is one pure function from named parameters and named columns to the loss, plus what a fitter
cannot guess: bounds, where starts are drawn, which parameters multiply a power of N or D, which
are informed only by quantized rows. Fitting, intervals and prediction read this declaration and
know no law by name, so a new law is one function and one list of parameters.

Fitted coordinates. Positive parameters are fitted as logarithms. An amplitude such as A in
``A N^-α`` is barely identified by itself, since log A and α all but trade off, so its coordinate
is the logarithm of its term at the table's geometric mean N and D. That removes most of the
correlation and makes one pair of bounds, in nats, fit every exponent.

Edge of the domain. The efficiency ``1 - exp(-P/γ + n)`` reaches zero at ``P = γ n`` and means
nothing below. A fitter must be able to stand there and find its way back, so below
`MIN_EFFICIENCY` the function continues as a positive hyperbola with the same value and slope: the
objective stays finite and worsens the further out it goes. A prediction there is NaN, since the
continuation is a device of the fit and no claim about a model.

Sources: Hoffmann et al. 2022, arXiv 2203.15556; Kumar et al. 2024, arXiv 2411.04330.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array
from numpy.typing import NDArray

from qat.laws.table import BITS_COLUMNS, UNQUANTIZED_BITS, Table, as_table, unknown_name

MIN_EFFICIENCY = 1e-3

# Arrays end in their axes: P parameters of a law, R rows of a table.
Floats = NDArray[np.float64]
Values = Mapping[str, Array]
RowFunction = Callable[[Values, Values], Array]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One named parameter of a law.

    Attributes:
        name: as in the paper, spelled out.
        meaning: what it is, with its unit.
        bounds: lowest and highest value a fit may give it.
        starts: range from which a fit draws its starts, uniform in the fitted coordinate.
        signed: fitted as it is; otherwise it is positive and fitted as a logarithm.
        powers: for an amplitude, the powers it multiplies, as (column, name of the exponent,
            sign). Bounds and starts are then those of the product at the columns' geometric mean.
    """

    name: str
    meaning: str
    bounds: tuple[float, float]
    starts: tuple[float, float]
    signed: bool = False
    powers: tuple[tuple[str, str, int], ...] = ()

    def coordinate(self, value: float) -> float:
        """The fitted coordinate of a value, before centring."""
        return value if self.signed else float(np.log(value))


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that only rows with fewer than 16 bits in one column inform.

    Attributes:
        column: the bits column that activates the group.
        parameters: their names.
        neutral: values, in the same order, at which the group has no effect on the loss. They
            stand in when a table has no such row.
    """

    column: str
    parameters: tuple[str, ...]
    neutral: tuple[float, ...]

    def informed_by(self, columns: Mapping[str, Floats]) -> NDArray[np.bool_]:
        """Which rows inform the group, shape (R,)."""
        return np.less(columns[self.column], UNQUANTIZED_BITS)


@dataclasses.dataclass(frozen=True)
class Law:
    """A scaling law: a function of (parameters, table) and the declaration of its parameters.

    Attributes:
        name: the name `get_law` knows it by.
        formula: the law in one line, for reports.
        loss: maps parameters (scalars) and columns to the loss in nats per token, elementwise
            over rows: fits differentiate it row by row.
        parameters: their order is the order of every P axis.
        columns: the columns ``loss`` reads.
        groups: parameters that need quantized rows.
        domain: where the law means anything, as booleans; everywhere if None.
    """

    name: str
    formula: str
    loss: RowFunction
    parameters: tuple[Parameter, ...]
    columns: tuple[str, ...]
    groups: tuple[Group, ...] = ()
    domain: RowFunction | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names, in the order of the P axis."""
        return tuple(parameter.name for parameter in self.parameters)

    def decode(self, u_P: Array, mean_log: Values, free_P: Array) -> dict[str, Array]:
        """Natural parameters from fitted coordinates.

        Args:
            u_P: fitted coordinates, float64, shape (..., P).
            mean_log: mean logarithm of each column, the centre of the amplitudes.
            free_P: False where the parameter has no data and takes its neutral value.

        Returns:
            Each parameter's value by name, shape (...).
        """
        neutral = {n: v for g in self.groups for n, v in zip(g.parameters, g.neutral, strict=True)}
        raw = {p.name: u_P[..., i] for i, p in enumerate(self.parameters)}
        plain = {p.name: raw[p.name] if p.signed else jnp.exp(raw[p.name]) for p in self.parameters}
        for p in self.parameters:
            if p.powers:
                shift = sum(sign * plain[name] * mean_log[col] for col, name, sign in p.powers)
                plain[p.name] = jnp.exp(raw[p.name] - shift)
        return {
            name: jnp.where(free_P[i], plain[name], neutral.get(name, np.nan))
            for i, name in enumerate(self.names)
        }

    def predict(self, params: Mapping[str, float], table: Table | pd.DataFrame) -> Floats:
        """Predicts the loss of every row.

        Args:
            params: a value for every parameter of the law. NaN in a group's parameters means that
                the group was not fitted.
            table: runs with the columns the law reads; no loss is needed.

        Returns:
            Nats per token, float64, shape (R,), for the rows of ``as_table(table)``. NaN where a
            row lies outside the law's domain or needs a group that was not fitted.

        Raises:
            ValueError: if a parameter or a column is missing.
        """
        missing = [name for name in self.names if name not in params]
        if missing:
            raise ValueError(f"law {self.name!r} needs a value for {', '.join(missing)}")
        columns = as_table(table, required=()).columns(self.columns)
        values = {name: float(params[name]) for name in self.names}
        unknown_R = np.zeros(len(columns[self.columns[0]]), bool)
        for group in self.groups:
            if any(np.isnan(values[name]) for name in group.parameters):
                values |= zip(group.parameters, group.neutral, strict=True)
                unknown_R |= group.informed_by(columns)
        with float64_on_cpu():
            arguments = jax.tree.map(jnp.asarray, (values, columns))
            loss_R = np.asarray(self.loss(*arguments))
            if self.domain is not None:
                unknown_R |= ~np.asarray(self.domain(*arguments))
        return np.where(unknown_R, np.nan, loss_R)


@contextlib.contextmanager
def float64_on_cpu() -> Iterator[None]:
    """Runs JAX in float64 on the CPU; training code in the same process keeps its settings."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


def get_law(law: str | Law) -> Law:
    """Looks a law up by name; a `Law` is returned as it is.

    Raises:
        ValueError: for an unknown name; the message gives the nearest known one.
    """
    if isinstance(law, Law):
        return law
    if law not in LAWS:
        raise unknown_name("law", law, LAWS)
    return LAWS[law]


def _power(base: Array, exponent: Array) -> Array:
    return jnp.exp(exponent * jnp.log(base))


def _chinchilla_loss(p: Values, c: Values) -> Array:
    """``A N^-α + B D^-β + E`` (Hoffmann et al. 2022), in nats per token."""
    model_term = p["A"] * _power(c["params"], -p["alpha"])
    data_term = p["B"] * _power(c["tokens"], -p["beta"])
    return model_term + data_term + p["E"]


def _efficiency(bits: Array, gamma: Array, offset: Array) -> Array:
    """``1 - exp(-P/γ + n)``, continued below MIN_EFFICIENCY (see the module docstring)."""
    plain = 1 - jnp.exp(offset - bits / gamma)
    beyond = jnp.minimum(plain, MIN_EFFICIENCY)
    continued = MIN_EFFICIENCY**2 / (2 * MIN_EFFICIENCY - beyond)
    return jnp.where(plain < MIN_EFFICIENCY, continued, plain)


def _precision_efficiencies(p: Values, c: Values) -> tuple[Array, Array, Array]:
    return (
        _efficiency(c["weight_bits"], p["gamma_w"], p["n_w"]),
        _efficiency(c["activation_bits"], p["gamma_a"], p["n_a"]),
        _efficiency(c["kv_bits"], p["gamma_kv"], p["n_kv"]),
    )


def _precision_loss(p: Values, c: Values) -> Array:
    """Kumar et al. 2024 with the offsets n_x of its appendix K, in nats per token.

    α and β are untied, unlike the paper's Table 2, and 16 bits are a width like any other in the
    efficiencies. The last term is the paper's Eq. 2, for PTQ of models of (nearly) high precision;
    its factors ``[1 - exp(-C_x (P_x - P_post))]`` for the others are left to a later law.
    """
    weights, activations, kv_cache = _precision_efficiencies(p, c)
    effective_params = c["params"] * weights * activations * kv_cache
    trained = _chinchilla_loss(p, {"params": effective_params, "tokens": c["tokens"]})
    size_and_data = _power(c["tokens"], p["gamma_D"]) * _power(c["params"], -p["gamma_N"])
    degradation = p["C_T"] * size_and_data * jnp.exp(-c["ptq_bits"] / p["gamma_post"])
    return trained + jnp.where(c["ptq_bits"] < UNQUANTIZED_BITS, degradation, 0.0)


def _precision_domain(p: Values, c: Values) -> Array:
    weights, activations, kv_cache = _precision_efficiencies(p, c)
    return jnp.minimum(jnp.minimum(weights, activations), kv_cache) >= MIN_EFFICIENCY


def _amplitude(name: str, meaning: str, *powers: tuple[str, str, int]) -> Parameter:
    return Parameter(name, meaning, (1e-8, 1e8), (0.03, 3.0), powers=powers)


def _width(name: str, meaning: str) -> Parameter:
    return Parameter(name, meaning, (0.1, 30.0), (0.3, 4.0))


def _offset(name: str, meaning: str) -> Parameter:
    return Parameter(name, meaning, (-5.0, 10.0), (-1.0, 1.5), signed=True)


CHINCHILLA = Law(
    name="chinchilla",
    formula="A N^-alpha + B D^-beta + E",
    loss=_chinchilla_loss,
    parameters=(
        _amplitude(
            "A", "amplitude of the model term, nats · params^alpha", ("params", "alpha", -1)
        ),
        _amplitude("B", "amplitude of the data term, nats · tokens^beta", ("tokens", "beta", -1)),
        Parameter("E", "irreducible loss, nats per token", (1e-4, 100.0), (0.3, 4.0)),
        Parameter("alpha", "exponent of the model term, no unit", (1e-2, 5.0), (0.1, 1.0)),
        Parameter("beta", "exponent of the data term, no unit", (1e-2, 5.0), (0.1, 1.0)),
    ),
    columns=("params", "tokens"),
)
PRECISION = Law(
    name="precision",
    formula="A N_eff^-alpha + B D^-beta + E + C_T D^gamma_D N^-gamma_N exp(-P_post/gamma_post), "
    "N_eff = N prod_x (1 - exp(-P_x/gamma_x + n_x)), x = w, a, kv",
    loss=_precision_loss,
    parameters=(
        *CHINCHILLA.parameters,
        _width("gamma_w", "bits over which the weights' loss of efficiency falls e-fold"),
        _offset("n_w", "offset in the exponent of the weights' efficiency"),
        _width("gamma_a", "bits over which the activations' loss of efficiency falls e-fold"),
        _offset("n_a", "offset in the exponent of the activations' efficiency"),
        _width("gamma_kv", "bits over which the KV cache's loss of efficiency falls e-fold"),
        _offset("n_kv", "offset in the exponent of the KV cache's efficiency"),
        _amplitude(
            "C_T",
            "amplitude of the PTQ term, nats · params^gamma_N / tokens^gamma_D",
            ("tokens", "gamma_D", 1),
            ("params", "gamma_N", -1),
        ),
        Parameter("gamma_D", "exponent of tokens in the PTQ term", (-3.0, 3.0), (0.0, 1.0), True),
        Parameter("gamma_N", "exponent of 1 / params, likewise", (-3.0, 3.0), (0.0, 1.0), True),
        _width("gamma_post", "bits over which the PTQ term falls e-fold"),
    ),
    columns=("params", "tokens", *BITS_COLUMNS),
    groups=(
        Group("weight_bits", ("gamma_w", "n_w"), (1.0, -np.inf)),
        Group("activation_bits", ("gamma_a", "n_a"), (1.0, -np.inf)),
        Group("kv_bits", ("gamma_kv", "n_kv"), (1.0, -np.inf)),
        Group("ptq_bits", ("C_T", "gamma_D", "gamma_N", "gamma_post"), (0.0, 0.0, 0.0, 1.0)),
    ),
    domain=_precision_domain,
)
LAWS = {law.name: law for law in (CHINCHILLA, PRECISION)}
