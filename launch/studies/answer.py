"""The answer to one question: tables, figures and fits, and how they stand in a README.

A README is written by hand, but for what lies between a pair of comments that name a question:

    <!-- noise -->
    <!-- /noise -->

There stand the tables and figures of its answer, written anew from the rows each time. So what is
said of them can be read beside them, and cannot outlive them unseen.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qat.laws import Fit
from qat.spelling import nearest
from qat.training.files import write_whole


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the rows say to a question.

    Attributes:
        tables: by caption.
        figures: SVG by name of its file; underscores of it are blanks of its caption.
        fits: by name of its file.
    """

    tables: Mapping[str, pd.DataFrame] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fits: Mapping[str, Fit] = dataclasses.field(default_factory=dict)

    def write(self, folder: Path, question: str) -> None:
        """Writes figures, fits, and the place of the question in the README.

        Raises:
            ValueError: the README has no such place.
            OSError: a file cannot be read or written.
        """
        text = placed((folder / "README.md").read_text(), question, self.markdown())
        for name, svg in self.figures.items():
            write_whole(folder / "figures" / f"{name}.svg", svg + "\n")
        for name, fit in self.fits.items():
            (folder / "fits").mkdir(exist_ok=True)
            fit.save(folder / "fits" / f"{name}.json")
        write_whole(folder / "README.md", text)

    def markdown(self) -> str:
        """Tables and figures."""
        parts = [f"{caption}:\n\n{markdown_of(table)}" for caption, table in self.tables.items()]
        if not self.tables:
            return "No rows yet."
        parts += [f"![{name.replace('_', ' ')}](figures/{name}.svg)" for name in self.figures]
        return "\n\n".join(parts)


NOTHING = Answer()


def placed(text: str, question: str, content: str) -> str:
    """A README with other content in a question's place.

    Raises:
        ValueError: it has no such place, or several.
    """
    start, end = f"<!-- {question} -->", f"<!-- /{question} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(end) < text.index(start):
        named = re.findall("<!-- ([^/].*?) -->", text)
        near = f"; nearest is {nearest(question, named)!r}" if named else ""
        raise ValueError(f"README.md: expected one place {start} … {end} for {question!r}{near}")
    head, _, rest = text.partition(start)
    return f"{head}{start}\n\n{content}\n\n{end}{rest.partition(end)[2]}"


def markdown_of(table: pd.DataFrame) -> str:
    """A table without its index; floats to four digits."""
    rows: list[Sequence[str]] = [list(map(str, table.columns)), ["---"] * len(table.columns)]
    rows += [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def between(value: float, low: float, high: float) -> str:
    """A number with its interval."""
    return f"{_cell(value)} [{_cell(low)}, {_cell(high)}]"


def _cell(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if not isinstance(value, float | np.floating):
        return str(value)
    number = float(value)
    if np.isnan(number):
        return "–"
    return f"{number:,.0f}" if 1e4 <= abs(number) < 1e7 else f"{number:.4g}"
