"""A fit as a record: what was fitted, how, and how far to trust it; saved as JSON, whole."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qat.laws import uncertainty
from qat.laws.diagnostics import Diagnostics
from qat.laws.forms import get_law
from qat.laws.law import Law
from qat.laws.table import UNITS, Table, unknown_name

# Arrays end in their axes: S bootstrap resamples, R rows.
Floats = NDArray[np.float64]
Quantity = str | Callable[[Mapping[str, Any]], Any]

LOSSES = ("huber", "lad", "l2")
WEIGHTS = ("equal", "loss_se")
LAD_DELTA = 1e-7


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a fit was made; `qat.laws.fit` gives the meaning of each."""

    loss: str
    delta: float
    weights: str
    resampling: str
    bootstrap: int
    starts: int
    seed: int
    fixed: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in (
            ("loss", LOSSES),
            ("weights", WEIGHTS),
            ("resampling", uncertainty.RESAMPLINGS),
        ):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        if not 0 < self.delta < np.inf:
            raise ValueError(f"delta must be positive and finite, not {self.delta}")
        for name, least in (("bootstrap", 0), ("starts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")

    @property
    def threshold(self) -> float:
        """The δ of Huber's function that stands for the loss: inf for l2, tiny for lad."""
        return {"huber": self.delta, "lad": LAD_DELTA, "l2": np.inf}[self.loss]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Fit:
    """A fitted law. Two fits are equal when what they save is equal, NaN included.

    Attributes:
        law: the law.
        params: value by name, in the units of the law's parameters; NaN without data.
        samples: the bootstrap draws by name, shape (S,), for intervals of derived quantities.
        diagnostics: what to look at before believing the numbers.
        settings: how the fit was made.
        checklist: what a reader needs to judge it, by topic; None where nobody said.
        ranges: lowest and highest value of every column the law reads, over the fitted rows.
    """

    law: Law
    params: dict[str, float]
    samples: dict[str, Floats]
    diagnostics: Diagnostics
    settings: Settings
    checklist: dict[str, str | None] = dataclasses.field(default_factory=dict)
    ranges: uncertainty.Intervals = dataclasses.field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fit) and self._text() == other._text()

    def __hash__(self) -> int:
        return hash(self._text())

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value:.5g}" for name, value in self.params.items())
        return f"Fit({self.law.name}: {values}; {self.diagnostics.rows} rows)"

    @property
    def intervals(self) -> uncertainty.Intervals:
        """(low, high) by name: 95%, t-corrected; NaN without data or without bootstrap."""
        return {name: self.interval(name) for name in self.law.names}

    def interval(
        self, quantity: Quantity, level: float = 0.95, kind: str = "t"
    ) -> tuple[float, float]:
        """An interval of a parameter or of what is derived from parameters.

        Args:
            quantity: a parameter's name, or a function of the parameters by name, elementwise.
            level: of confidence.
            kind: "t" for the t-corrected bootstrap interval, "percentile" for the plain one.

        Returns:
            (low, high); NaN where a parameter it needs was not fitted, or without bootstrap.

        Raises:
            ValueError: for an unknown name or kind, or a level outside (0, 1).
        """
        if kind not in uncertainty.INTERVALS:
            raise unknown_name("kind of interval", kind, uncertainty.INTERVALS)
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, not {level}")
        runs, parameters = self.diagnostics.runs, self.diagnostics.parameters
        return uncertainty.interval(self.draws(quantity), level, kind, runs, parameters)

    def draws(self, quantity: Quantity) -> Floats | None:
        """Bootstrap draws of a parameter or of a function of them, (S,); None if there are none."""
        if isinstance(quantity, str):
            if quantity not in self.law.names:
                raise unknown_name("parameter", quantity, self.law.names)
            return self.samples.get(quantity)
        if not self.samples:
            return None
        count = len(next(iter(self.samples.values())))
        known = {name: np.full(count, value) for name, value in self.params.items()}
        return np.asarray(quantity(known | self.samples), np.float64)

    def predict(self, table: Table | pd.DataFrame) -> Floats:
        """Predicted loss in nats per token of each row, shape (R,), as `Law.predict` does."""
        return self.law.predict(self.params, table)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the fit as JSON, NaN as null, for `load`."""
        pathlib.Path(path).write_text(self._text())

    def _text(self) -> str:
        content = {
            "law": self.law.name,
            "formula": self.law.formula,
            "params": self.params,
            "intervals": self.intervals,
            "settings": dataclasses.asdict(self.settings),
            "diagnostics": dataclasses.asdict(self.diagnostics),
            "flags": self.diagnostics.flags,
            "checklist": self.checklist,
            "ranges": self.ranges,
            "units": {name: UNITS.get(name, "") for name in (*self.law.columns, "loss")}
            | {parameter.name: parameter.meaning for parameter in self.law.parameters},
            "samples": {name: draws_S.tolist() for name, draws_S in self.samples.items()},
        }
        content = _map_leaves(lambda leaf: None if leaf != leaf else leaf, content)  # NaN != NaN
        return json.dumps(content, indent=1, allow_nan=False)


def load(path: str | pathlib.Path, law: Law | None = None) -> Fit:
    """Reads a fit that `Fit.save` wrote, equal to the one that was saved.

    Args:
        path: the JSON file.
        law: the law, if it is not one that `get_law` knows.

    Raises:
        ValueError: if the file is of another law, of one that is not known, or no fit at all.
    """
    try:
        saved = json.loads(pathlib.Path(path).read_text())
        checklist = dict(saved.pop("checklist"))
        saved = _map_leaves(lambda leaf: np.nan if leaf is None else leaf, saved)
        name = saved["law"]
        findings: dict[str, Any] = {
            key: tuple(x) if isinstance(x, list) else x for key, x in saved["diagnostics"].items()
        }
        diagnostics, settings = Diagnostics(**findings), Settings(**saved["settings"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a fit that qat.laws saved: {error!r}") from None
    law = law or get_law(name)
    if law.name != name:
        raise ValueError(f"{path} holds a fit of law {name!r}, not of {law.name!r}")
    if (law.formula, [*law.names]) != (saved["formula"], [*saved["params"]]):
        raise ValueError(f"{path} holds a fit of another law {name!r}, {saved['formula']}: give it")
    return Fit(
        law=law,
        params=saved["params"],
        samples={name: np.asarray(draws) for name, draws in saved["samples"].items()},
        diagnostics=diagnostics,
        settings=settings,
        checklist=checklist,
        ranges={name: (low, high) for name, (low, high) in saved["ranges"].items()},
    )


def _map_leaves(change: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _map_leaves(change, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_map_leaves(change, value) for value in tree]
    return change(tree)
