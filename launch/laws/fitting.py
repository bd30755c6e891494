"""What `launch.fit` does: fit, predict held-out rows, ask how it answers to other choices, tell."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from launch.laws import workdir
from qat import laws
from qat.laws import Fit, Table
from qat.laws.checklist import fingerprint
from qat.laws.holdout import ORDERED, predicted_apart
from qat.laws.profile import profile
from qat.laws.sensitivity import sensitivity
from qat.report import law_pages
from qat.training.files import write_whole

_HOLD_OUT_STARTS = 128
_MOST_INFLUENTIAL = 20


@dataclasses.dataclass(frozen=True)
class Options:
    """Where to write, and the arguments of `qat.laws.fit`."""

    workdir: Path
    law: str
    loss: str
    delta: float
    weights: str
    fixed: dict[str, float]
    bootstrap: int
    resampling: str
    starts: int
    seed: int

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `qat.laws.fit`, without the law."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if name not in ("workdir", "law")}


def run(table: Table, left_out: str | None, options: Options, profiles: bool) -> None:
    """Fits a table and writes all there is to say of it.

    Raises:
        ValueError: bad input, before anything is written.
        OSError: a file cannot be read or written.
    """
    jax.config.update("jax_platforms", "cpu")
    data = fingerprint(laws.get_law(options.law), table)
    identity = {"program": "launch.fit", "law": options.law, "profile": profiles, "data": data}
    identity |= options.arguments
    workdir.check(options.workdir, identity)
    print(f"Fitting {options.law} to {len(table)} rows …", flush=True)
    fitted = laws.fit(options.law, table, **options.arguments)
    fitted = _described(fitted, table, left_out, options)
    answers = sensitivity(fitted, table)
    shown = {
        "With other losses": answers.by_loss,
        "Without one run": answers.by_dropped.head(_MOST_INFLUENTIAL),
    }
    if profiles:
        shown["Profile likelihood, 95%"] = _profiles(fitted, table)
    with workdir.writing(options.workdir, identity):
        fitted.save(options.workdir / "fit.json")
        for heading, each in shown.items():
            name = heading.split(",")[0].lower().replace(" ", "_")
            write_whole(options.workdir / f"{name}.csv", each.to_csv(index=False))
        law_pages.write_fit(options.workdir / "report.html", fitted, table, shown)
    print("\n".join([*lines(fitted), f"report: {options.workdir / 'report.html'}"]))


def lines(fitted: Fit) -> list[str]:
    """A fit for people: parameters, warnings, checklist."""
    width = max(map(len, fitted.law.names))
    doubtful = {*fitted.diagnostics.unidentified, *fitted.diagnostics.few_values}
    found = [fitted.law.formula]
    for parameter in fitted.law.parameters:
        name, (low, high) = parameter.name, fitted.interval(parameter.name)
        doubt = "not identified; " if name in doubtful else ""
        value = f"{fitted.params[name]:<10.5g} [{low:.4g}, {high:.4g}]"
        found.append(f"  {name:{width}} {value:34} {doubt}{parameter.meaning}")
    found.append(law_pages.quality(fitted))
    found += [f"warning: {flag}" for flag in fitted.diagnostics.flags]
    checklist = law_pages.checklist(fitted)
    return found + [f"{topic}: {said}" for topic, said in checklist.itertuples(index=False)]


def _described(fitted: Fit, table: Table, left_out: str | None, options: Options) -> Fit:
    """The fit with what only a caller knows in its checklist: rows left out, hold-outs."""
    arguments = options.arguments | {"bootstrap": 0, "starts": _HOLD_OUT_STARTS}
    again = functools.partial(laws.fit, options.law, **arguments)
    held, impossible = predicted_apart(ORDERED, table, [again])
    found = list(impossible.values())
    for name, (error_R,) in held.items():
        size_R = np.abs(np.expm1(error_R[~np.isnan(error_R)]))
        found.append(f"{name}: median relative error {np.median(size_R):.3%} of {len(size_R)} rows")
    checklist = dict(fitted.checklist) | {"held-out validation": "; ".join(found)}
    if left_out:
        checklist["left out"] = f"{checklist['left out']}; {left_out}"
    return dataclasses.replace(fitted, checklist=checklist)


def _profiles(fitted: Fit, table: Table) -> pd.DataFrame:
    """Profile likelihood intervals of all fitted parameters."""
    held = fitted.settings.fixed
    names = [name for name, x in fitted.params.items() if np.isfinite(x) and name not in held]
    ends = [profile(fitted, table, name).interval for name in names]
    low, high = zip(*ends, strict=True)
    return pd.DataFrame({"parameter": names, "low": low, "high": high})
