"""Laws in which every bit width has a number of its own: no curve over bits is assumed.

`free` is the law of size and data with N times an efficiency for each width of each operand; beside
it any curve over bits shows what it costs to be a curve. `offset` adds so many nats for each width
instead, whatever the size and the data: what a law in which bits are parameters has to be better
than. `quartet` is the law of Castro et al. 2025 (arXiv 2505.14669): forward widths make the model
smaller, the width of gradients makes the data fewer, and an exponent stands around both terms.

The widths are part of a law's name, so that `get_law` makes it again: "free_w3_w4_a8".
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
from jax import Array

from qat.laws.forms.size import chinchilla
from qat.laws.law import Law, Parameter, RowFunction, Values, exponent, power
from qat.laws.table import UNQUANTIZED_BITS, Table

FREE_COLUMNS = {"w": "weight_bits", "a": "activation_bits", "kv": "kv_bits"}
_GRADIENTS = {"g": "gradient_bits"}
_WIDTH = re.compile(r"_(w|a|kv|g)([0-9.]+)(?=_|$)")

Levels = Mapping[str, Sequence[float]]
Widths = Mapping[str, tuple[str, float]]  # column and bits, by what names spell


def free(levels: Levels) -> Law:
    """The law of size and data in which every bit width has an efficiency of its own.

    Args:
        levels: bit widths below 16 by column, such as {"weight_bits": (3, 4)}. A row of another
            width is outside the law's domain; columns without widths are not read.
    """
    return _law("free", levels, FREE_COLUMNS)


def free_of(table: Table) -> Law:
    """`free` at the widths of a table."""
    return free({column: tuple(table.frame[column].unique()) for column in FREE_COLUMNS.values()})


def quartet(levels: Levels) -> Law:
    """The law of Castro et al. 2025, with widths as in `free` and those of ``gradient_bits``."""
    columns = FREE_COLUMNS | (_GRADIENTS if levels.get("gradient_bits") else {})
    plain = _law("quartet", levels, columns)
    outer = dataclasses.replace(exponent("around both terms"), name="gamma")

    def loss(p: Values, c: Values) -> Array:
        reducible = plain.loss(p, c) - p["E"]
        return power(reducible, p["gamma"]) + p["E"]

    formula = "(A N_eff^-alpha + B D_eff^-beta)^gamma + E, efficiencies free at every width"
    parameters = (*plain.parameters, outer)
    return dataclasses.replace(plain, formula=formula, loss=loss, parameters=parameters)


def named(name: str) -> Law | None:
    """The law whose widths a name spells; None for any other name."""
    kind = {"free": free, "offset": offset, "quartet": quartet}.get(name.partition("_")[0])
    levels: dict[str, list[float]] = {}
    for operand, bits in _WIDTH.findall(name):
        levels.setdefault((FREE_COLUMNS | _GRADIENTS)[operand], []).append(float(bits))
    found = kind(levels) if kind else None
    return found if found and found.name == name else None


def offset(levels: Levels) -> Law:
    """The law of size and data, and for every bit width a number of nats that it adds.

    Args:
        levels: as of `free`.
    """
    widths = _widths(levels, FREE_COLUMNS)

    def loss(p: Values, c: Values) -> Array:
        added = sum(
            jnp.where(c[column] == bits, p[f"add_{name}"], 0.0)
            for name, (column, bits) in widths.items()
        )
        return chinchilla.loss(p, c) + added

    return _named_by("offset", widths, "A N^-alpha + B D^-beta + E + sum_x c_x(P_x)", loss, _added)


def _law(kind: str, levels: Levels, columns: Mapping[str, str]) -> Law:
    """The law with an efficiency for each width: of D for gradients, of N for all else."""
    widths = _widths(levels, columns)

    def loss(p: Values, c: Values) -> Array:
        size = {"params": c["params"], "tokens": c["tokens"]}
        for name, (column, bits) in widths.items():
            reduced = "tokens" if column in _GRADIENTS.values() else "params"
            size[reduced] = size[reduced] * jnp.where(c[column] == bits, p[f"eff_{name}"], 1.0)
        return chinchilla.loss(p, size)

    formula = "A (N prod_x eff_x(P_x))^-alpha + B D^-beta + E, eff_x free at every width"
    return _named_by(kind, widths, formula, loss, _efficiency)


def _widths(levels: Levels, columns: Mapping[str, str]) -> Widths:
    return {
        f"{operand}{bits:g}": (column, bits)
        for operand, column in columns.items()
        for bits in sorted(set(levels.get(column, ())))
        if bits < UNQUANTIZED_BITS
    }


def _named_by(
    kind: str,
    widths: Widths,
    formula: str,
    loss: RowFunction,
    declared: Callable[[str, str, float], Parameter],
) -> Law:
    """A law with a parameter for each width, which knows no other widths."""
    read = tuple(dict.fromkeys(column for column, _ in widths.values()))

    def known(p: Values, c: Values) -> Array:
        valid = jnp.ones_like(c["params"], bool)
        for column in read:
            own = [bits for each, bits in widths.values() if each == column]
            valid &= jnp.isin(c[column], jnp.asarray([*own, UNQUANTIZED_BITS]))
        return valid

    return Law(
        "_".join((kind, *widths)),
        formula,
        lambda p, c: jnp.where(known(p, c), loss(p, c), jnp.nan),
        (*chinchilla.parameters, *(declared(name, *each) for name, each in widths.items())),
        ("params", "tokens", *read),
        domain=known,
    )


def _efficiency(name: str, column: str, bits: float) -> Parameter:
    what = "tokens" if column in _GRADIENTS.values() else "parameters"
    meaning = f"share of the {what} that {column} = {bits:g} leave"
    return Parameter(f"eff_{name}", meaning, (1e-4, 10.0), (0.05, 1.0))


def _added(name: str, column: str, bits: float) -> Parameter:
    meaning = f"nats per token that {column} = {bits:g} add"
    return Parameter(f"add_{name}", meaning, (-10.0, 10.0), (0.0, 0.5), signed=True)
