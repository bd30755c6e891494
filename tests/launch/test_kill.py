"""A training program that is killed again and again ends like one that never was, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from launch.experiment import Experiment
from launch.lab import Lab
from qat.training.checkpoint import Checkpoints
from qat.training.results import read_rows

ROOT = Path(__file__).parents[2]
STEPS = 200
SMALL = (
    "--config=configs/tiny.py",
    "--config.data.sequence_length=16",
    "--config.data.validation_fraction=0.2",
    "--config.batch_size=8",
    f"--config.tokens={STEPS * 128}",
    "--config.model.width=8",
    "--config.model.layers=1",
    "--config.policy=w4a8kv4",
)
BRANCHES = (
    "--config.schedule.name=wsd",
    f"--config.schedule.branches=({100 * 128},{150 * 128})",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus and prepared text, for all runs."""
    folder = tmp_path_factory.mktemp("kill")
    (folder / "corpus").mkdir()
    for index in range(60):
        words = " ".join(f"{index} times {k} is {index * k}." for k in range(40))
        (folder / "corpus" / f"{index}.txt").write_text(words)
    return folder


def start(place, name, *more):
    """A training process in the workdir of that name."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }
    command = [
        *(sys.executable, "-m", "launch.train", *SMALL),
        f"--config.data.source=folder:{place / 'corpus'}",
        f"--data_dir={place / 'data'}",
        f"--workdir={place / name}",
        "--checkpoint_every=5",
        *more,
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def finish(place, name, *more, code=0):
    """Runs to the end; returns what it printed."""
    process = start(place, name, *more)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return out, errors


def steps_done(workdir):
    """Lines of all curves of a run."""
    curves = [*workdir.glob("curve.csv"), *workdir.glob("branches/*/curve.csv")]
    return sum(path.read_bytes().count(b"\n") for path in curves)


def kill_after(place, name, steps, seconds, *more, signal_number=signal.SIGKILL):
    """Ends a run some seconds after it has taken some steps more; whether it was still running."""
    before = steps_done(place / name)
    process = start(place, name, *more)
    while steps_done(place / name) < before + steps and process.poll() is None:
        time.sleep(0.002)
    time.sleep(seconds)
    running = process.poll() is None
    process.send_signal(signal_number)
    out, errors = process.communicate(timeout=300)
    return running, process.returncode, out + errors


@pytest.fixture(scope="module")
def whole(place):
    """A run that nothing interrupts."""
    finish(place, "whole")
    return place / "whole"


def state_of(place, workdir, folder="."):
    """The arrays of the newest checkpoint, as the program itself reads them."""
    config = json.loads((workdir / "config.json").read_text())
    del config["data_fingerprint"]
    experiment = Experiment.from_config(config)
    lab = Lab(place / "data", devices=jax.devices()[:1])
    (seal,) = {path.read_text() for path in last_seals(workdir / folder)}
    identity = json.loads(seal.splitlines()[0])["words"]["identity"]
    with Checkpoints(workdir / folder / "checkpoints", identity) as checkpoints:
        return lab.restored(experiment, checkpoints)


def last_seals(folder):
    return sorted(
        (folder / "checkpoints").glob("[0-9]*/seal.json"), key=lambda path: int(path.parent.name)
    )[-1:]


def assert_same_run(place, name, whole, folders=(".",)):
    """Curves, states and rows are the same but for seconds."""
    for folder in folders:
        curves = [(run / folder / "curve.csv").read_bytes() for run in (place / name, whole)]
        assert curves[0] == curves[1]
        states = [state_of(place, run, folder) for run in (place / name, whole)]
        for mine, theirs in zip(*map(jax.tree.leaves, states), strict=True):
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    rows = [read_rows(run).drop(columns="wall_s") for run in (place / name, whole)]
    assert rows[0].equals(rows[1])
    assert not list((place / name).rglob("*.damaged*"))


@pytest.mark.slow
def test_killed_and_preempted_and_killed_it_ends_the_same(place, whole):
    assert steps_done(whole) == STEPS + 1
    running, code, _ = kill_after(place, "killed", 20, 0)
    assert running
    assert code == -signal.SIGKILL

    _, code, said = kill_after(
        place, "killed", 20, 0, "--checkpoint_every=0", signal_number=signal.SIGTERM
    )
    assert code == 75
    assert "preempted, stopped after" in said
    newest = max(int(path.name) for path in (place / "killed" / "checkpoints").iterdir())
    assert steps_done(place / "killed") == newest + 1 < STEPS + 1

    running, *_ = kill_after(place, "killed", 20, 0)
    assert running
    finish(place, "killed")
    assert_same_run(place, "killed", whole)


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_the_same(place, whole):
    moments = random.Random(0)
    kills = saving = 0
    while kills < 10:
        steps, seconds = moments.choice([0, 1, 5, 10, 15]), moments.uniform(0, 0.2)
        seconds += moments.uniform(0, 2) if steps == 0 else 0
        running, code, _ = kill_after(place, "often", steps, seconds)
        if not running:
            assert code == 0
            break
        kills += 1
        saving += bool(list((place / "often").glob("checkpoints/*-tmp")))
    finish(place, "often")
    print(f"{kills} kills, {saving} of them while a checkpoint was written")
    assert kills >= 5
    assert_same_run(place, "often", whole)


@pytest.mark.slow
def test_branches_killed_at_random_moments_end_the_same_and_like_runs_alone(place):
    finish(place, "trunk", *BRANCHES)
    moments = random.Random(1)
    for _ in range(8):
        running, _, _ = kill_after(
            place, "branches", moments.randrange(1, 40), moments.uniform(0, 0.1), *BRANCHES
        )
        if not running:
            break
    finish(place, "branches", *BRANCHES)
    folders = (".", "branches/100", "branches/150")
    assert_same_run(place, "branches", place / "trunk", folders)
    rows = read_rows(place / "trunk")
    assert list(rows["tokens"]) == [100 * 128, 150 * 128, STEPS * 128]
    assert len(set(rows["run_id"])) == 3

    alone = ("--config.schedule.name=wsd", f"--config.tokens={100 * 128}")
    finish(place, "alone", *alone)
    (row,) = read_rows(place / "alone").itertuples()
    assert row.loss == rows["loss"][0]
    mine, theirs = (
        state_of(place, place / "trunk", "branches/100"),
        state_of(place, place / "alone"),
    )
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
