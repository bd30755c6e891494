"""What `launch.compare` does: compare laws, test independence where the rows can, tell."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from launch.laws import workdir
from launch.progress import Meter
from qat.analysis.independence import Independence, independence, is_testable
from qat.laws import Table, get_law
from qat.laws.checklist import fingerprint
from qat.laws.compare import Comparison, compare
from qat.laws.holdout import folds
from qat.report import law_pages
from qat.report.law_pages import independence_verdict
from qat.training.files import write_whole


@dataclasses.dataclass(frozen=True)
class Options:
    """Where to write, and the arguments of `qat.laws.compare`."""

    workdir: Path
    laws: tuple[str, ...]
    holdout: tuple[str, ...]
    loss: str
    delta: float
    bootstrap: int
    starts: int
    seed: int

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `qat.laws.compare`, beside the table."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if name != "workdir"}


def run(table: Table, options: Options) -> None:
    """Compares on a table and writes what is found.

    Raises:
        ValueError: bad input, before anything is written.
        OSError: a file cannot be read or written.
    """
    jax.config.update("jax_platforms", "cpu")
    known = [get_law(name) for name in options.laws]
    words = {name: list(x) if isinstance(x, tuple) else x for name, x in options.arguments.items()}
    identity = {"program": "launch.compare", "data": [fingerprint(each, table) for each in known]}
    identity |= words
    workdir.check(options.workdir, identity)
    with Meter("Comparing", len(known) * (1 + _folds(options.holdout, table)), "fits") as meter:
        done = functools.partial(meter.advance, 1)
        comparison = compare(table=table, on_fit=done, **options.arguments)
    tested, why_not = _test(table, options.seed)
    with workdir.writing(options.workdir, identity):
        _write(options.workdir, comparison, tested, table)
    print("\n".join([*_lines(comparison), *(_lines_of(tested) if tested else [why_not])]))
    print(f"report: {options.workdir / 'report.html'}")


def _test(table: Table, seed: int) -> tuple[Independence | None, str]:
    """The test of independence, or why there is none."""
    if not is_testable(table):
        return None, "no run is quantized in several operands: independence was not tested"
    print("Testing whether weights, activations and cache are independent …", flush=True)
    try:
        return independence(table, seed=seed), ""
    except ValueError as error:
        return None, f"independence was not tested: {error}"


def _folds(holdout: tuple[str, ...], table: Table) -> int:
    """How many fits of a law leave rows out."""
    count = 0
    for name in holdout:
        with contextlib.suppress(ValueError):  # the comparison says why
            count += len(folds(name, table))
    return count


def _write(folder: Path, comparison: Comparison, tested: Independence | None, table: Table) -> None:
    for name, fitted in comparison.fits.items():
        fitted.save(folder / f"{name}.json")
    write_whole(folder / "comparison.csv", comparison.table.to_csv(index=False))
    if tested is not None:
        write_whole(folder / "independence.csv", tested.settings.to_csv(index=False))
    law_pages.write_comparison(folder / "report.html", comparison, table, tested)


def _lines(comparison: Comparison) -> list[str]:
    """A comparison for people."""
    found = [comparison.table.to_string(index=False, float_format="{:.5g}".format)]
    found += comparison.not_held_out.values()
    for name, fitted in comparison.fits.items():
        found += [f"warning: {name}: {flag}" for flag in fitted.diagnostics.flags]
    if len(comparison.remaining) != 1:
        found.append(comparison.intervals().to_string(index=False, float_format="{:.5g}".format))
    return [*found, f"verdict: {comparison.verdict}"]


def _lines_of(tested: Independence) -> list[str]:
    """A test of independence for people."""
    return [
        tested.settings.to_string(index=False, float_format="{:.4g}".format),
        f"independence of weights, activations and cache: {independence_verdict(tested)}",
        *(f"left out, as no run has one of its widths alone: {x}" for x in tested.without_marginal),
    ]
