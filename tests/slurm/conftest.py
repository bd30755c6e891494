import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qat.sweep import slurm
from tests.slurm.cluster import Cluster, reason_to_skip, started

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def submitit():
    return pytest.importorskip("submitit", reason="not installed: make test-slurm installs it")


@pytest.fixture(scope="session")
def _started(submitit, tmp_path_factory) -> Iterator[Cluster]:
    reason = reason_to_skip()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        with started(folder) as cluster:
            yield cluster


@pytest.fixture
def cluster(_started) -> Iterator[Cluster]:
    """A Slurm of two nodes with three processors each, without jobs, that Slurm's programs find."""
    yield _started
    _started.clear()


@pytest.fixture
def python(tmp_path):
    """Makes a command of a Python program; it finds this project and a folder for its traces."""

    def command(program, *words):
        lines = ["import os, signal, sys, time", "from pathlib import Path"]
        lines += [f"sys.path.insert(0, {str(ROOT)!r})", f"os.chdir({str(tmp_path)!r})", program]
        return [sys.executable, "-c", "\n".join(lines), *map(str, words)]

    return command


@pytest.fixture
def submit(cluster, tmp_path):
    """Submits commands from a folder of this test."""

    def submitted(*commands, folder="jobs", environment=None, **resources):
        asked = slurm.Resources(**{"minutes": 5, **resources})
        return slurm.submit(commands, tmp_path / folder, asked, environment)

    return submitted
