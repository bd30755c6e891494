"""Measures what quantization costs on this machine, and how fast it trains.

    python -m launch.benchmark --suite=layers --json=runs/layers.json
    python -m launch.benchmark --suite=training --model=small --model=large
    python -m launch.benchmark --suite=training --model=micro --one_core
    python -m launch.benchmark --suite=sweep
    python -m launch.benchmark --suite=laws --rounds=200 --json=runs/laws.json

The suite "layers" trains two small models at several precisions with our layers, with Qwix and
with AQT, side by side, and prints times as ratios to plain Flax. Qwix and AQT are measured where
they are installed: `pip install '.[bench]'`. It takes about ten minutes on two cores.

The suite "training" compares train steps of our transformer with the machine's own matrix product,
all cores together or one alone, as sweeps of small models run.

The suite "sweep" runs a grid of 48 small models by `launch.sweep` and compares the runs an hour
with those of a loop that starts a process for each; about three minutes.

The suite "laws" times fits, and asks on made-up tables, --rounds for each law, how often intervals
hold the truth and a comparison prefers the shape that made the rows; some seconds a table.

The machine should have nothing else to do.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import metadata
from pathlib import Path

from absl import flags

from launch import cpu
from launch.benchmarks import laws as laws_suite
from launch.benchmarks import layers, sweep, training
from launch.benchmarks.contenders import SCHEMES
from launch.benchmarks.models import WORKLOADS
from launch.main import run
from qat.spelling import expected_one_of
from qat.training.results import package_versions


def _layers() -> list[layers.Row]:
    return layers.run(_models(WORKLOADS), _SCHEME.value or list(SCHEMES), _ROUNDS.value)


def _training() -> list[layers.Row]:
    return training.run(_models(training.SHAPES), _ROUNDS.value)


def _laws() -> list[layers.Row]:
    return laws_suite.run(_ROUNDS.value)


def _models(known: Iterable[str]) -> list[str]:
    """Those asked for, or all of the suite.

    Raises:
        ValueError: the suite has no such model.
    """
    for name in _MODEL.value or []:
        if name not in known:
            raise ValueError(expected_one_of("model", name, known))
    return list(_MODEL.value or known)


SUITES: dict[str, Callable[[], list[layers.Row]]] = {
    "layers": _layers,
    "training": _training,
    "sweep": sweep.run,
    "laws": _laws,
}

_SUITE = flags.DEFINE_enum("suite", "layers", list(SUITES), "What to measure.")
_JSON = flags.DEFINE_string("json", None, "File for the rows; it must not exist.")
_ROUNDS = flags.DEFINE_integer("rounds", 30, "How often each program is timed.", lower_bound=1)
_MODEL = flags.DEFINE_multi_string("model", None, "Only this model of the suite; repeatable.")
_SCHEME = flags.DEFINE_multi_enum("scheme", None, list(SCHEMES), "Only this scheme; repeatable.")
# Which flags a suite heeds.
_HEEDED: Mapping[str, Collection[str]] = {
    "layers": ("rounds", "model", "scheme"),
    "training": ("rounds", "model"),
    "sweep": (),
    "laws": ("rounds",),
}
_ONE_CORE = flags.DEFINE_bool("one_core", False, "Run every program on one core.")


def main(argv: list[str]) -> None:
    """Measures, prints, writes rows."""
    del argv
    _check_heeded(_SUITE.value)
    path = None if _JSON.value is None else Path(_JSON.value)
    if path is not None:
        if path.exists():
            raise ValueError(f"--json={path}: it exists already; name a new file")
        path.parent.mkdir(parents=True, exist_ok=True)
    if _ONE_CORE.value:
        cpu.stay_on(cpu.cores()[:1])
    rows = SUITES[_SUITE.value]()
    if path is not None:
        cores = len(cpu.cores())
        common = {"suite": _SUITE.value, "cores": cores, "versions": _versions()}
        path.write_text(json.dumps([{**common, **row} for row in rows], indent=1) + "\n")
        print(f"\n{len(rows)} rows in {path}")


def _check_heeded(suite: str) -> None:
    """Raises ValueError for a flag that the suite would ignore."""
    for flag in (_ROUNDS, _MODEL, _SCHEME):
        if flag.present and flag.name not in _HEEDED[suite]:
            suites = " or ".join(name for name, heeded in _HEEDED.items() if flag.name in heeded)
            raise ValueError(f"--{flag.name} says nothing to --suite={suite}: expected {suites}")


def _versions() -> str:
    """Versions of all packages that take part."""
    versions = [package_versions()]
    for name in ("qwix", "aqtp"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return ", ".join(versions)


if __name__ == "__main__":
    run(main)
