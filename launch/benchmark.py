"""Measures what quantization costs on this machine.

    python -m launch.benchmark --suite=layers --json=runs/layers.json

The suite "layers" trains two small models at several precisions with our layers, with Qwix and
with AQT, side by side, and prints times as ratios to plain Flax. Qwix and AQT are measured where
they are installed: `pip install '.[bench]'`. It takes about ten minutes on two cores, which should
have nothing else to do.
"""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from absl import flags

from launch import cpu
from launch.benchmarks import layers
from launch.benchmarks.contenders import SCHEMES
from launch.benchmarks.models import WORKLOADS
from launch.main import run
from qat.training.results import package_versions


def _layers() -> list[layers.Row]:
    models, schemes = _MODEL.value or list(WORKLOADS), _SCHEME.value or list(SCHEMES)
    return layers.run(models, schemes, _ROUNDS.value)


SUITES: dict[str, Callable[[], list[layers.Row]]] = {"layers": _layers}

_SUITE = flags.DEFINE_enum("suite", "layers", list(SUITES), "What to measure.")
_JSON = flags.DEFINE_string("json", None, "File for the rows; it must not exist.")
_ROUNDS = flags.DEFINE_integer("rounds", 30, "How often each program is timed.", lower_bound=1)
_MODEL = flags.DEFINE_multi_enum("model", None, list(WORKLOADS), "Only this model; repeatable.")
_SCHEME = flags.DEFINE_multi_enum("scheme", None, list(SCHEMES), "Only this scheme; repeatable.")


def main(argv: list[str]) -> None:
    """Measures, prints, writes rows."""
    del argv
    path = None if _JSON.value is None else Path(_JSON.value)
    if path is not None:
        if path.exists():
            raise ValueError(f"--json={path}: it exists already; name a new file")
        path.parent.mkdir(parents=True, exist_ok=True)
    rows = SUITES[_SUITE.value]()
    if path is not None:
        common = {"suite": _SUITE.value, "cores": cpu.cores(), "versions": _versions()}
        path.write_text(json.dumps([{**common, **row} for row in rows], indent=1) + "\n")
        print(f"\n{len(rows)} rows in {path}")


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
