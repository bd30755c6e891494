"""A scaling law as data: a row-wise function of (parameters, table) and its declaration.

A law is one pure function from columns and parameters to the loss, plus what a fitter cannot
guess: bounds, where starts are drawn, which parameters multiply a power of N or D, which are
informed only by quantized rows. Fitting, intervals and prediction read this declaration and know
no law by name, so a law of one's own is one function:

    @law("A N^-alpha + E")
    def size_alone(
        params: Array,
        *,
        A: Annotated[Array, amplitude("nats · params^alpha", per={"params": "alpha"})],
        alpha: Annotated[Array, exponent("of the model term")],
        E: Annotated[Array, irreducible()],
    ) -> Array:
        return A * params**-alpha + E

    fit(size_alone, table)

Fitted coordinates. Positive parameters are fitted as logarithms. An amplitude such as A in
``A N^-α`` is barely identified by itself, since log A and α all but trade off, so its coordinate
is the logarithm of its term at the table's geometric mean N and D. That removes most of the
correlation and makes one pair of bounds, in nats, fit every exponent.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array
from numpy.typing import NDArray

from qat.laws.table import UNQUANTIZED_BITS, Table, as_table
from qat.spelling import expected_one_of

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
        powers: for an amplitude, the powers it multiplies, as (column, exponent, sign), the
            exponent a parameter's name or a number. Bounds and starts are then those of the
            product at the columns' geometric mean.
    """

    name: str
    meaning: str
    bounds: tuple[float, float]
    starts: tuple[float, float]
    signed: bool = False
    powers: tuple[tuple[str, str | float, int], ...] = ()

    def __post_init__(self) -> None:
        (low, high), (first, last) = self.bounds, self.starts
        if not (low < high and low <= first <= last <= high and (self.signed or low > 0)):
            positive = "" if self.signed else "0 < "
            raise ValueError(
                f"parameter {self.name or self.meaning!r}: expected {positive}bounds[0] <= starts "
                f"<= bounds[1], got bounds {self.bounds} and starts {self.starts}"
            )

    @property
    def exponents(self) -> tuple[tuple[str, str], ...]:
        """Columns that it multiplies with the parameters that are their exponents."""
        return tuple((column, e) for column, e, _ in self.powers if isinstance(e, str))

    def coordinate(self, value: float) -> float:
        """The fitted coordinate of a value, before centring."""
        if self.signed:
            return value
        return float(np.log(value)) if value > 0 else -np.inf


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that only quantized rows inform.

    Attributes:
        columns: of bits; a row informs the group if it has fewer than 16 in all of them.
        parameters: their names.
        neutral: values, in the same order, at which the group has no effect on the loss. They
            stand in when a table has no such row.
        widths: distinct values of each column that tell the parameters and test them.
    """

    columns: tuple[str, ...]
    parameters: tuple[str, ...]
    neutral: tuple[float, ...]
    widths: int = 3

    def informed_by(self, columns: Mapping[str, Floats]) -> NDArray[np.bool_]:
        """Which rows inform the group, shape (R,)."""
        informed_R: NDArray[np.bool_] = np.all(
            [columns[name] < UNQUANTIZED_BITS for name in self.columns], axis=0
        )
        return informed_R


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
        whole: whether it is a loss, or a term that others add to one.
    """

    name: str
    formula: str
    loss: RowFunction
    parameters: tuple[Parameter, ...]
    columns: tuple[str, ...]
    groups: tuple[Group, ...] = ()
    domain: RowFunction | None = None
    whole: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names, in the order of the P axis."""
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def centred(self) -> tuple[str, ...]:
        """Columns at whose geometric means amplitudes are fitted."""
        return tuple(dict.fromkeys(column for p in self.parameters for column, _, _ in p.powers))

    @property
    def neutral(self) -> dict[str, float]:
        """Values at which the parameters of groups have no effect, by name."""
        return {n: v for g in self.groups for n, v in zip(g.parameters, g.neutral, strict=True)}

    def coordinates(self, which: str) -> tuple[Floats, Floats]:
        """Ends of the parameters' "bounds" or "starts" in fitted coordinates, shape (P,) each."""
        ends = [[p.coordinate(end) for end in getattr(p, which)] for p in self.parameters]
        low_P, high_P = np.array(ends).T
        return low_P, high_P

    def decode(self, u_P: Array, mean_log: Values, held_P: Array) -> dict[str, Array]:
        """Natural parameters from fitted coordinates.

        Args:
            u_P: fitted coordinates, float64, shape (..., P).
            mean_log: mean logarithm of each centred column.
            held_P: the value of a parameter that is not fitted, NaN of one that is, shape (P,).

        Returns:
            Each parameter's value by name, shape (...).
        """
        raw = {p.name: u_P[..., i] for i, p in enumerate(self.parameters)}
        plain = {p.name: raw[p.name] if p.signed else jnp.exp(raw[p.name]) for p in self.parameters}
        plain = {
            name: jnp.where(jnp.isnan(held_P[i]), plain[name], held_P[i])
            for i, name in enumerate(self.names)
        }
        for i, p in enumerate(self.parameters):
            if p.powers:
                amplitude = jnp.exp(raw[p.name] - self._shift(p, plain, mean_log))
                plain[p.name] = jnp.where(jnp.isnan(held_P[i]), amplitude, held_P[i])
        return plain

    def encode(self, params: Mapping[str, float], mean_log: Mapping[str, float]) -> Floats:
        """Fitted coordinates of natural parameters, shape (P,): the inverse of `decode`."""
        return np.array(
            [
                p.coordinate(params[p.name]) + self._shift(p, params, mean_log)
                for p in self.parameters
            ]
        )

    def _shift(self, parameter: Parameter, values: Mapping[str, Any], mean_log: Any) -> Any:
        """Logarithm of the powers that an amplitude multiplies, at the columns' means."""
        return sum(
            sign * (values[power] if isinstance(power, str) else power) * mean_log[column]
            for column, power, sign in parameter.powers
        )

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


def law(formula: str) -> Callable[[Callable[..., Array]], Law]:
    """Makes a law of one function, for use as a decorator.

    Args:
        formula: the law in one line, for reports.

    The function's positional arguments are columns of the table, its keyword-only arguments
    parameters, annotated with what `amplitude`, `exponent`, `positive`, `signed` or `irreducible`
    returns. It gives the loss in nats per token, elementwise, in `jax.numpy`. Its name becomes the
    law's.

    Raises:
        ValueError: a keyword argument has no such annotation, or an amplitude names a column or an
            exponent that the function does not take.
    """
    if not isinstance(formula, str):
        raise ValueError("@law takes the formula first: @law('A N^-alpha + E')")

    def declared(function: Callable[..., Array]) -> Law:
        arguments = inspect.signature(function, eval_str=True).parameters.values()
        columns = tuple(each.name for each in arguments if each.kind is not each.KEYWORD_ONLY)
        rest = [each for each in arguments if each.kind is each.KEYWORD_ONLY]
        parameters = tuple(_declaration(function.__name__, each) for each in rest)
        if not columns:
            raise ValueError(f"law {function.__name__!r} reads no column: expected such as params")
        _check_powers(function.__name__, columns, parameters)

        def loss(values: Values, table: Values) -> Array:
            own = {p.name: values[p.name] for p in parameters}
            return function(*(table[name] for name in columns), **own)

        return Law(function.__name__, formula, loss, parameters, columns)

    return declared


def _declaration(law_name: str, argument: inspect.Parameter) -> Parameter:
    """What an argument is annotated with, under its name."""
    for each in getattr(argument.annotation, "__metadata__", ()):
        if isinstance(each, Parameter):
            return dataclasses.replace(each, name=argument.name)
    raise ValueError(
        f"law {law_name!r}: parameter {argument.name} is annotated with {argument.annotation}, "
        f"expected such as Annotated[Array, exponent('of the model term')]"
    )


def _check_powers(law_name: str, columns: Collection[str], parameters: Sequence[Parameter]) -> None:
    """Raises ValueError for an amplitude of a column or an exponent that there is not."""
    names = [p.name for p in parameters]
    for p in parameters:
        for column, exponent, _ in p.powers:
            if column not in columns:
                raise ValueError(f"law {law_name!r}: {expected_one_of('column', column, columns)}")
            if isinstance(exponent, str) and exponent not in names:
                raise ValueError(
                    f"law {law_name!r}: {expected_one_of('exponent', exponent, names)}"
                )


def amplitude(
    meaning: str,
    *,
    per: Mapping[str, str | float] | None = None,
    times: Mapping[str, str | float] | None = None,
) -> Parameter:
    """An amplitude A of a term such as ``A N^-α`` or ``C D^γ``.

    Args:
        meaning: what it is, with its unit.
        per: columns whose power divides it, with the exponent: a parameter's name or a number.
        times: columns whose power multiplies it, likewise.
    """
    powers = [(column, power, -1) for column, power in (per or {}).items()]
    powers += [(column, power, 1) for column, power in (times or {}).items()]
    return Parameter("", meaning, (1e-8, 1e8), (0.03, 3.0), powers=tuple(powers))


def exponent(
    meaning: str,
    bounds: tuple[float, float] = (1e-2, 5.0),
    starts: tuple[float, float] = (0.1, 1.0),
) -> Parameter:
    """A positive exponent."""
    return Parameter("", f"exponent {meaning}, no unit", bounds, starts)


def irreducible() -> Parameter:
    """The loss that no size and no data reduce."""
    return Parameter("", "irreducible loss, nats per token", (1e-4, 100.0), (0.3, 4.0))


def positive(meaning: str, bounds: tuple[float, float], starts: tuple[float, float]) -> Parameter:
    """A parameter above zero, fitted as its logarithm."""
    return Parameter("", meaning, bounds, starts)


def signed(meaning: str, bounds: tuple[float, float], starts: tuple[float, float]) -> Parameter:
    """A parameter of any sign."""
    return Parameter("", meaning, bounds, starts, signed=True)


def power(base: Array, exponent: Array) -> Array:
    """``base ** exponent`` of a positive base, whose gradient is cheaper."""
    return jnp.exp(exponent * jnp.log(base))


@contextlib.contextmanager
def float64_on_cpu() -> Iterator[None]:
    """Runs JAX in float64 on the CPU; training code in the same process keeps its settings."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield
