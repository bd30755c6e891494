"""What `launch.plan` does: plan every budget, name critical tokens and next runs, tell."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from launch.laws import workdir
from qat import laws
from qat.laws import Fit, Plan, Table
from qat.laws.table import BITS_COLUMNS, UNQUANTIZED_BITS
from qat.report import law_pages
from qat.training.files import write_whole
from qat.training.results import hash_of

_PUBLISHED = "published:"
_BEYOND = 4.0  # times the largest size and the most tokens that candidates go


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of `launch.plan`."""

    fit: str
    workdir: Path | None
    flops: tuple[float, ...]
    params: float | None
    bits: float | None
    ptq_bits: float | None
    inference_tokens: float
    cost: str
    columns: dict[str, float]
    tolerance: float
    critical: tuple[float, ...]
    shrink: str | None
    next: int

    @property
    def rounding(self) -> dict[str, float]:
        """The bits after training as a column, if they are given."""
        return {} if self.ptq_bits is None else {"ptq_bits": self.ptq_bits}


def run(options: Options, table: Table | None) -> None:
    """Plans what is asked for.

    Raises:
        ValueError: bad input, before anything is written.
        OSError: a file cannot be read or written.
    """
    jax.config.update("jax_platforms", "cpu")
    if not (options.flops or options.critical or options.shrink):
        raise ValueError("nothing to plan: give --flops, --critical or --shrink with --table")
    fit = open_fit(options.fit)
    if options.workdir:
        if not options.flops:
            raise ValueError("--workdir is for plans of budgets: give --flops as well")
        workdir.check(options.workdir, _identity(options, fit))
    plans = [_plan(fit, flops, options) for flops in options.flops]
    said = [line for each in plans for line in (*each.lines(), "")]
    said += list(_critical(fit, options))
    if options.shrink:
        said += _next(fit, table, options)
    print("\n".join(said))
    if options.workdir:
        _write(options, options.workdir, fit, plans, said)
        print(f"report: {options.workdir / 'report.html'}")


def open_fit(name: str) -> Fit:
    """A fit of a file, or of a paper.

    Raises:
        ValueError: it is neither.
        OSError: the file cannot be read.
    """
    if name.startswith(_PUBLISHED):
        return laws.published(name.removeprefix(_PUBLISHED))
    return laws.load(name)


def _plan(fit: Fit, flops: float, options: Options) -> Plan:
    columns: dict[str, Any] = options.columns
    return laws.plan(
        fit,
        flops,
        params=options.params,
        bits=options.bits,
        ptq_bits=options.ptq_bits,
        inference_tokens=options.inference_tokens,
        cost=options.cost,
        tolerance=options.tolerance,
        **columns,
    )


def _critical(fit: Fit, options: Options) -> Iterator[str]:
    for params in options.critical:
        columns = options.columns | options.rounding
        tokens = laws.critical_tokens(fit, params=params, **columns)
        each = f"{tokens.value / params:.4g} a parameter"
        yield f"critical tokens of {params:.4g} parameters: {tokens}, {each}"


def _next(fit: Fit, table: Table | None, options: Options) -> list[str]:
    """Next runs among all combinations of the table's sizes, tokens and settings of bits."""
    if table is None:
        raise ValueError("--shrink needs --table, the runs there are")
    frame = table.frame
    sizes = [*np.unique(frame.params), _BEYOND * frame.params.max()]
    data = [*np.unique(frame.tokens), _BEYOND * frame.tokens.max()]
    bits = [name for name in BITS_COLUMNS if name in fit.law.columns]
    rest = [n for n in fit.law.columns if n not in ("params", "tokens")]
    settings = frame[rest].drop_duplicates().to_numpy().tolist() if rest else [[]]
    grid = [(n, d, *s) for n, d, s in itertools.product(sizes, data, settings)]
    candidates = pd.DataFrame(grid, columns=["params", "tokens", *rest])
    candidates = candidates.assign(**{b: UNQUANTIZED_BITS for b in BITS_COLUMNS if b not in bits})
    cost = laws.get_cost(options.cost)
    found = laws.next_runs(fit, table, candidates, str(options.shrink), options.next, cost)
    shown = found.to_string(index=False, float_format="{:.4g}".format)
    return [f"next runs for {options.shrink}, the most narrowing per FLOP first:", shown]


def _write(options: Options, folder: Path, fit: Fit, plans: list[Plan], said: list[str]) -> None:
    """The numbers of all budgets, and the page."""
    rows = pd.DataFrame([_row(each) for each in plans])
    last = plans[-1]
    bits = {} if last.bits is None else dict.fromkeys(last.operands, last.bits.value)
    columns = dict.fromkeys(BITS_COLUMNS, UNQUANTIZED_BITS)
    columns |= options.columns | options.rounding | bits
    with workdir.writing(folder, _identity(options, fit)):
        write_whole(folder / "plan.csv", rows.to_csv(index=False))
        law_pages.write_plan(folder / "report.html", fit, rows, columns, said)


def _identity(options: Options, fit: Fit) -> dict[str, Any]:
    asked = {n: x for n, x in dataclasses.asdict(options).items() if n not in ("fit", "workdir")}
    asked = {n: list(x) if isinstance(x, tuple) else x for n, x in asked.items()}
    return {"program": "launch.plan", "fit": hash_of(fit.params), **asked}


def _row(plan: Plan) -> dict[str, float]:
    """A plan as one row: each quantity with its interval."""
    row = {"flops": plan.flops}
    for name, value, low, high in plan.frame()[["value", "low", "high"]].itertuples():
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return row
