"""The name of a format that a model holds as data.

A model's state has the numbers of a format and not its name, so that any format runs in the same
program. Reports want the name back: the first of the known formats, narrowest family first, whose
numbers are these. Formats with the same numbers are the same grid; "ternary" reads as "int2".
"""

import functools

import numpy as np

from qat.formats import Format, parse_format
from qat.grid import AnyGrid, Codebook


def format_name(grid: AnyGrid | Format) -> str:
    """The name that `qat.parse_format` reads; "custom" for a user's own format.

    Args:
        grid: of one format, its arrays on the host.
    """
    if isinstance(grid, Format):
        return grid.name
    if isinstance(grid, Codebook):
        nf4 = parse_format("nf4").values
        same = grid.levels.shape == nf4.shape and bool((np.asarray(grid.levels) == nf4).all())
        return "nf4" if same else "custom"
    return _names().get(tuple(np.asarray(grid.numbers, np.float32).tolist()), "custom")


@functools.lru_cache
def _names() -> dict[tuple[float, ...], str]:
    """Known formats by their numbers, in the order of `qat.grid.Grid.numbers`."""
    formats = [parse_format(name) for name in reversed(_spellings())]
    return {_numbers(fmt): fmt.name for fmt in formats}


def _numbers(fmt: Format) -> tuple[float, ...]:
    numbers = (
        fmt.mantissa_bits,
        fmt.min_exponent,
        fmt.min_magnitude,
        fmt.max_value,
        fmt.lowest,
        fmt.scaled,
    )
    return tuple(np.asarray(numbers, np.float32).tolist())


def _spellings() -> list[str]:
    """Every name that `parse_format` reads, but codebooks'; of equal ones the first counts."""
    floats = [(x, y) for x in range(1, 9) for y in range(11)]
    return [
        "none",
        "bf16",
        "fp16",
        "binary",
        *(f"int{bits}" for bits in range(2, 17)),
        *(f"uint{bits}" for bits in range(1, 17)),
        *(f"int{bits}full" for bits in range(2, 17)),
        *(f"e{x}m{y}" for x, y in floats),
        *(f"e{x}m{y}ieee" for x, y in floats if x > 1),
        "e4m3fnuz",
        "e4m3b11fnuz",
        "e5m2fnuz",
    ]
