"""What is decided before a law is asked: a value for every column that nobody searches.

Bits that are not mentioned are 16. A column that the law needs and nobody gave, one that nobody
reads, and bits of which the fit has no data are errors here, so that no answer rests on them.
"""

from collections.abc import Collection, Mapping, Sequence
from numbers import Real

import numpy as np

from qat.laws.planning.cost import TRAINING_BITS
from qat.laws.planning.draws import Draws
from qat.laws.table import BITS_COLUMNS, UNQUANTIZED_BITS
from qat.spelling import expected_one_of


def shared_operands(
    draws: Draws, operands: Sequence[str] | None, columns: Mapping[str, float]
) -> tuple[str, ...]:
    """The columns that share P, as asked for or all that can be."""
    read = [name for name in TRAINING_BITS if name in draws.law.columns]
    if operands is None:
        free = [name for name in read if name not in columns]
        return tuple(o for o in free if o not in without_data(draws, {**columns, o: 1.0}))
    for operand in operands:
        if operand not in TRAINING_BITS:
            raise ValueError(expected_one_of("operand", operand, TRAINING_BITS))
        if operand not in read:
            raise ValueError(
                f"law {draws.law.name!r} does not read {operand}; "
                f"the operands it reads: {', '.join(read) or 'none'}"
            )
    few = {**columns, **dict.fromkeys(operands, 1.0)}
    if unknown := [name for name in without_data(draws, few) if name in operands]:
        raise ValueError(
            f"the fit of law {draws.law.name!r} had no rows with few {' and '.join(unknown)}"
        )
    return tuple(dict.fromkeys(operands))


def settled(
    draws: Draws, given: Mapping[str, float], searched: Collection[str], priced: Collection[str]
) -> dict[str, float]:
    """A value for every column that the law or a price reads and that is not searched.

    Args:
        draws: of the fit.
        given: values by column; bits that are not given are 16.
        searched: columns whose values a search will choose.
        priced: columns that are read beside those of the law.

    Raises:
        ValueError: for a column that nobody reads or that is searched, a value that cannot be, one
            that is missing, or bits of which the fit has no data.
    """
    law = draws.law
    read = dict.fromkeys((*law.columns, *priced))
    wanted = [name for name in read if name not in searched]
    for name, value in given.items():
        if name not in read:
            raise ValueError(expected_one_of(f"column for law {law.name!r}", name, read))
        if name in searched:
            raise ValueError(f"{name} = {value} cannot be fixed here: it is what is searched")
        check_number(name, value, *((0.0, UNQUANTIZED_BITS) if name in BITS_COLUMNS else ()))
    values = {**{c: UNQUANTIZED_BITS for c in wanted if c in BITS_COLUMNS}, **given}
    if missing := [name for name in wanted if name not in values]:
        raise ValueError(f"law {law.name!r} also reads {', '.join(missing)}: give {missing[0]}=…")
    if unknown := without_data(draws, values):
        raise ValueError(
            f"the fit of law {law.name!r} had no rows with few {' and '.join(unknown)}, "
            f"so it cannot say what {unknown[0]} = {values[unknown[0]]:g} costs"
        )
    return {name: float(value) for name, value in values.items()}


def check_number(name: str, value: float, above: float = -np.inf, most: float = np.inf) -> None:
    """Raises ValueError unless ``above < value <= most``, and finite."""
    if not (isinstance(value, Real) and np.isfinite(value) and above < value <= most):
        upper = "" if most == np.inf else f" and at most {most:g}"
        lower = "" if above == -np.inf else f" above {above:g}"
        raise ValueError(f"{name} must be a finite number{lower}{upper}, not {value!r}")


def without_data(draws: Draws, columns: Mapping[str, float]) -> list[str]:
    """Those of ``columns`` below 16 bits of which no fitted row tells what they cost."""
    few = {name for name, value in columns.items() if value < UNQUANTIZED_BITS}
    silent = [group.columns for group in draws.unfitted if few.issuperset(group.columns)]
    return sorted({name for names in silent for name in names})
