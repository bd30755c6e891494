"""What `launch.compare` does: compare laws, test independence where the rows can, tell."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax

from launch.training import hold
from qat.analysis.independence import Independence, independence, is_testable
from qat.laws import Table
from qat.laws.compare import Comparison, compare
from qat.report import law_pages
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
    print(f"Comparing {len(options.laws)} laws on {len(table)} rows …", flush=True)
    comparison = compare(table=table, **options.arguments)
    tested = None
    if is_testable(table):
        print("Testing whether weights, activations and cache are independent …", flush=True)
        tested = independence(table, seed=options.seed)
    data = next(iter(comparison.fits.values())).checklist["data"]
    words = {name: list(x) if isinstance(x, tuple) else x for name, x in options.arguments.items()}
    identity = {"program": "launch.compare", "settings": words, "data": data}
    with contextlib.ExitStack() as stack:
        hold(options.workdir, identity, stack)
        _write(options.workdir, comparison, tested, table)
    print("\n".join(_lines(comparison, tested)))
    print(f"report: {options.workdir / 'report.html'}")


def _write(
    workdir: Path, comparison: Comparison, tested: Independence | None, table: Table
) -> None:
    for name, fitted in comparison.fits.items():
        fitted.save(workdir / f"{name}.json")
    write_whole(workdir / "comparison.csv", comparison.table.to_csv(index=False))
    if tested is not None:
        write_whole(workdir / "independence.csv", tested.settings.to_csv(index=False))
    law_pages.write_comparison(workdir / "report.html", comparison, table, tested)


def _lines(comparison: Comparison, tested: Independence | None) -> list[str]:
    """A comparison for people."""
    found = [comparison.table.to_string(index=False, float_format="{:.5g}".format)]
    found += comparison.not_held_out.values()
    for name, fitted in comparison.fits.items():
        found += [f"warning: {name}: {flag}" for flag in fitted.diagnostics.flags]
    if len(comparison.remaining) != 1:
        found.append(comparison.intervals().to_string(index=False, float_format="{:.5g}".format))
    found.append(f"verdict: {comparison.verdict}")
    if tested is None:
        return [*found, "no run is quantized in several operands: independence was not tested"]
    broken = tested.settings[tested.settings.breaks]
    found.append(tested.settings.to_string(index=False, float_format="{:.4g}".format))
    return [
        *found,
        f"independence of weights, activations and cache: p = {tested.p_value:.3g}; "
        f"the product misses in {len(broken)} of {len(tested.settings)} joint settings",
        *(f"left out, as no run has one of its widths alone: {x}" for x in tested.without_marginal),
    ]
