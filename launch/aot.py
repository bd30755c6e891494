"""Compiles the train step of an experiment for a TPU slice, on a machine that has none.

    python -m launch.aot --config=configs/paper_1700m.py --topology=v5p:4x4x4 --config.policy=w8a8

Prints what a step needs of every device's memory, its FLOPs and the least time they can take, the
matrix products of the compiled program by dtype, and its collectives. It needs the TPU compiler,
which the extra "aot" installs, and no data. Compiling takes minutes.

The exit code is 4 if the step does not fit; the report then names the nearest mesh that does.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from launch.ahead.compilation import TooLarge, compile_step
from launch.ahead.fitting import mesh_name, mesh_of, nearest_fit
from launch.ahead.report import Report, as_json, as_text
from launch.ahead.topologies import devices_of, limits
from launch.experiment import Experiment
from launch.main import read_config, run

TOO_LARGE = 4  # exit code

config_flags.DEFINE_config_file(
    "config", None, "Experiment (required); its keys are explained in configs/experiment.py."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPU slice (required), a generation and a shape in chips, as v5p:4x4x4."
)
_FAST = flags.DEFINE_bool(
    "fast", False, "Compile with less trouble; temporaries are then not what training will need."
)
_SEARCH = flags.DEFINE_bool("search", True, "Look for a mesh that fits, if the asked one does not.")
_JSON = flags.DEFINE_string("json", None, "File for the report as JSON; it must not exist.")


def main(argv: list[str]) -> None:
    """Compiles, reports, exits with 4 if it does not fit."""
    del argv
    jax.config.update("jax_platforms", "cpu")
    path = None if _JSON.value is None else Path(_JSON.value)
    if path is not None and path.exists():
        raise ValueError(f"--json={path}: it exists already; name a new file")
    experiment = Experiment.from_config(read_config())
    report = _report(experiment, str(_TOPOLOGY.value), devices_of(str(_TOPOLOGY.value)))
    print(f"\n{as_text(report)}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(as_json(report), indent=1) + "\n")
    if isinstance(report.outcome, TooLarge):
        sys.exit(TOO_LARGE)


def _report(experiment: Experiment, topology: str, devices: Sequence[jax.Device]) -> Report:
    """Compiles, and looks for another mesh if it must."""
    mesh, fast = mesh_of(experiment, devices), _FAST.value
    _say(f"compiling for {topology} with {mesh_name(mesh)} …")
    outcome = compile_step(experiment, devices, fast=fast, say=_say)
    fit = None
    if isinstance(outcome, TooLarge) and _SEARCH.value:
        _say("it does not fit; looking for a mesh that does …")
        fit = nearest_fit(experiment, topology, outcome, fast=fast, say=_say)
    kind = devices[0].device_kind
    return Report(experiment, topology, mesh, kind, limits(devices), outcome, fast, fit)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run(main, required=("config", "topology"))
