"""Runs of a sweep as lanes: what is in their folders is what each alone would have left there."""

import contextlib
import dataclasses
import itertools
import json
import sys
import textwrap

import jax
import numpy as np
import pytest

from configs import experiment
from launch.experiment import Experiment
from launch.lab import Lab
from launch.sweeps import lanes, local, working
from launch.sweeps.plan import Plan
from launch.sweeps.working import Worker
from qat.sweep import Sweep, axis, chain, product, zipped
from qat.training import curve
from qat.training.processes import PreemptedError
from qat.training.results import rows_of

TOKENS = 128  # a step


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    """Runs alone have one device; lanes are spread over four."""
    data = tmp_path_factory.mktemp("data")
    return {count: Lab(data, devices=jax.devices()[:count]) for count in (1, 4)}


@pytest.fixture(scope="module")
def sweep(corpus):
    config = experiment.get_config()
    config.data.source = f"folder:{corpus}"
    config.data.sequence_length = 16
    config.data.validation_fraction = 0.2
    config.batch_size = 8
    config.tokens = 12 * TOKENS
    config.model.width = 8
    config.model.layers = 1
    config.evaluation_batches = 4
    grid = zipped(axis("seed", (0, 0, 1)), axis("learning_rate", (1e-2, 3e-3, 1e-2)))
    return Sweep(config.to_dict(), grid, ("rtn",), ("int2", "int4"), (0.5, 1.0))


@pytest.fixture
def work(labs, sweep, tmp_path, monkeypatch, capsys):
    """Works on runs of a sweep, named by their numbers, in a folder of its own."""

    def work(name, *jobs, devices=4, sweep=sweep):
        monkeypatch.setattr(working, "Lab", lambda data_dir, _: labs[devices])
        plan = Plan.of(sweep, labs[devices])
        plan.write(tmp_path / name)
        worker, ids = Worker(tmp_path / name, tmp_path, 0), list(plan.runs)
        for job in jobs:
            worker.work([ids[number] for number in job])
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return [plan.folder(tmp_path / name, run_id) for run_id in ids], events

    return work


def rows(folder):
    """Those of the run and of what was rounded, but for their seconds."""
    found = [*rows_of(folder), *(rows_of(folder / "ptq") if (folder / "ptq").exists() else [])]
    return [dataclasses.asdict(dataclasses.replace(row, wall_s=0.0)) for row in found]


def assert_alike(one, other):
    """Curves and rows of two folders, whose numbers may differ in their last digits."""
    ours, theirs = curve.read(one / "curve.csv"), curve.read(other / "curve.csv")
    assert list(ours) == list(theirs)
    np.testing.assert_allclose(
        [list(each) for each in ours.values()], [list(each) for each in theirs.values()], rtol=1e-4
    )
    assert len(rows(one)) == len(rows(other))
    for row, expected in zip(rows(one), rows(other), strict=True):
        for key, value in expected.items():
            if key.startswith(("loss", "ptq_delta")):
                np.testing.assert_allclose(row[key], value, rtol=1e-3, atol=2e-4, err_msg=key)
            else:
                assert row[key] == value, key


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_lanes_leave_what_runs_alone_leave(work, labs):
    alone, _ = work("alone", [0], [1], [2], devices=1)
    together, events = work("together", [0, 1, 2])
    assert 4 in {run for _, run in labs[4]._programs}
    for one, other in zip(together, alone, strict=True):
        assert len(rows(one)) == 1 + 3 + 2
        assert_alike(one, other)
        assert {path.relative_to(one) for path in _steps(one)} == {
            path.relative_to(other) for path in _steps(other)
        }
    ends = {event["run"]: event["status"] for event in events if event["event"] == "done"}
    assert list(ends.values()) == ["ok"] * 3
    told = [event["tokens"] for event in events if event["event"] == "trained"]
    assert sum(told) == 3 * 12 * TOKENS
    before = {folder: content(folder) for folder in together}
    _, events = work("together", [0, 1, 2])
    assert [event["event"] for event in events] == ["done"] * 3
    assert {folder: content(folder) for folder in together} == before


def test_what_lanes_saved_is_read_back_as_a_run_alone(work):
    folders, _ = work("saved", [0, 1, 2])
    expected = rows(folders[1])
    (folders[1] / "rows.jsonl").unlink()
    again, events = work("saved", [1], devices=1)
    assert [event["event"] for event in events] == ["skipped", "done"]
    np.testing.assert_allclose(rows(again[1])[0]["loss"], expected[0]["loss"], rtol=1e-6)


def _steps(folder):
    return sorted(path for path in (folder / "checkpoints").iterdir() if path.is_dir())


def test_a_lane_diverges_and_the_others_go_on(work, sweep):
    wild = dataclasses.replace(
        sweep, grid=chain(axis("learning_rate", (1e-2, 1e30)), axis("seed", (1,)))
    )
    alone, _ = work("alone", [0], [1], [2], devices=1, sweep=wild)
    together, events = work("together", [0, 1, 2], sweep=wild)
    assert [event["status"] for event in events if event["event"] == "done"] == [
        "ok",
        "diverged",
        "ok",
    ]
    for lane in (0, 2):
        assert_alike(together[lane], alone[lane])
    (row,) = rows(together[1])
    assert row["status"] == "diverged"
    assert np.isnan(row["loss"])
    curves = [curve.read(folders[1] / "curve.csv") for folders in (together, alone)]
    assert len(curves[0]) == len(curves[1]) < 12
    assert not _steps(together[1])


def test_stopped_lanes_start_again(work, monkeypatch):
    whole, _ = work("whole", [0, 1, 2])
    real, questions = working.Preemption, itertools.count(1)

    @contextlib.contextmanager
    def preemption():
        yield lambda: next(questions) == 9  # after the look at step 6

    monkeypatch.setattr(working, "Preemption", preemption)
    with pytest.raises(PreemptedError, match="which are lost"):
        work("parts", [0, 1, 2])
    monkeypatch.setattr(working, "Preemption", real)
    parts, _ = work("parts", [0, 1, 2])
    for one, other in zip(parts, whole, strict=True):
        assert (one / "curve.csv").read_bytes() == (other / "curve.csv").read_bytes()
        assert rows(one) == rows(other)


def test_runs_that_were_begun_go_on_alone(work, monkeypatch):
    folders, _ = work("some", [0], devices=1)
    seen = []
    monkeypatch.setattr(lanes, "_train", lambda runs: seen.append([run.workdir for run in runs]))
    folders, events = work("some", [0, 1, 2], devices=1)
    assert seen == [folders[1:]]
    assert all(len(rows(folder)) == 6 for folder in folders)
    assert len([event for event in events if event["event"] == "done"]) == 3


def test_what_fails_together_is_tried_alone(work, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nlong story")

    monkeypatch.setattr(lanes, "begin", fail)
    folders, events = work("failing", [0, 1], devices=1)
    assert [event["status"] for event in events if event["event"] == "done"] == ["ok", "ok"]
    assert all(len(rows(folder)) == 6 for folder in folders[:2])


def test_runs_that_differ_cannot_be_lanes(work, sweep):
    mixed = dataclasses.replace(sweep, grid=axis("tokens", (12 * TOKENS, 6 * TOKENS)))
    with pytest.raises(ValueError, match="2 runs cannot train together: expected one shape"):
        work("mixed", [0, 1], sweep=mixed)


def test_groups_have_one_kind_and_even_sizes(sweep):
    grid = chain(
        product(
            axis("model.width", (8, 16)),
            axis("tokens", (10 * TOKENS, 20 * TOKENS)),
            axis("seed", range(6)),
        ),
        product(
            axis("schedule.name", ("wsd",)),
            axis("schedule.branches", ((10 * TOKENS,),)),
            axis("seed", (0, 1)),
        ),
    )
    configs = dataclasses.replace(sweep, grid=grid).configs()
    runs = {str(number): Experiment.from_config(each) for number, each in enumerate(configs)}
    groups = lanes.groups(runs, 4)
    assert sorted(itertools.chain(*groups)) == sorted(runs)
    assert sorted(map(len, groups)) == [1] * 2 + [3] * 8
    for group in groups:
        lanes.check([runs[run_id] for run_id in group])
        assert len({(runs[run_id].shape, runs[run_id].tokens) for run_id in group}) == 1
    assert all(len(group) == 1 for group in lanes.groups(runs, 1))


WORKER = textwrap.dedent(
    """
    import json, os, sys
    tell = lambda **event: print(json.dumps(event), flush=True)
    tell(event="ready", platform="gpu")
    for line in sys.stdin:
        with open(sys.argv[1], "a") as asked:
            asked.write(line)
        for run in line.strip().split("+"):
            if run == "bad":
                os._exit(9)
            tell(event="done", run=run, status="ok")
    """
)


def test_a_group_that_kills_its_worker_is_tried_again_then_taken_apart(tmp_path):
    asked = tmp_path / "asked"
    command = [sys.executable, "-c", WORKER, str(asked)]
    jobs = [local.Job(("a", "bad", "c", "d"), "shape", 1.0), local.Job(("e", "f"), "shape", 1.0)]
    events = []
    local.Pool(command, jobs, tmp_path / "logs").run(events.append)
    lines = asked.read_text().split()
    assert lines[:3] == ["a+bad+c+d", "bad+c+d", "e+f"]
    assert sorted(lines[3:]) == ["bad", "c", "d"]
    done = [event["run"] for event in events if event["event"] == "done"]
    assert sorted(done) == ["a", "c", "d", "e", "f"]
    lost = [event["run"] for event in events if event["event"] == "lost" and event["given_up"]]
    assert lost == ["bad"]
