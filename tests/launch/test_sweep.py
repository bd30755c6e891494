"""A sweep from its file to its table: undisturbed, killed, damaged, failed, and refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pandas as pd
import pytest

from launch import runner
from launch.lab import Lab
from launch.sweeps import driving
from launch.sweeps.plan import Plan
from launch.sweeps.working import Worker
from launch.timing import counting_compiles
from qat.sweep.table import collect

ROOT = Path(__file__).parents[2]
SWEEP = """
from configs import experiment
from qat.sweep import Sweep, axis, product


def get_sweep():
    config = experiment.get_config()
    config.data.source = "folder:{corpus}"
    config.data.sequence_length = 16
    config.data.validation_fraction = 0.2
    config.batch_size = 8
    config.model.width = 8
    config.model.layers = 1
    config.evaluation_batches = 4
    grid = product(axis("tokens", (1280, 5120)), axis("policy", {policies}))
    return Sweep(config.to_dict(), grid, ("rtn",), ("int2/channel", "int3/channel"), (0.5, 1.0))
"""
KEY = ["run_id", "tokens", "ptq_method", "ptq_quantizer"]
POLICIES = ("none", "w2", "kv3")


@pytest.fixture(scope="module")
def sweep_file(corpus, tmp_path_factory):
    def sweep_file(policies=POLICIES):
        path = tmp_path_factory.mktemp("sweep") / "sweep.py"
        path.write_text(SWEEP.format(corpus=corpus, policies=repr(policies)))
        return path

    return sweep_file


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def undisturbed(sweep_file, data_dir, tmp_path_factory):
    """A finished sweep of six runs by the program itself."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = sweep(sweep_file(), workdir, data_dir)
    assert done.returncode == 0, done.stderr
    return workdir


def command(path, workdir, data_dir, *flags):
    program = [sys.executable, "-m", "launch.sweep", f"--sweep={path}", f"--workdir={workdir}"]
    return [*program, f"--data_dir={data_dir}", *flags]


def sweep(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def table_of(workdir):
    table = pd.read_parquet(workdir / "rows.parquet").drop(columns=["wall_s"])
    return table.sort_values(KEY).reset_index(drop=True)


def test_every_run_has_its_rows_at_its_end_and_on_its_way(undisturbed):
    table = table_of(undisturbed)
    ends = table[(table.ptq_method == "none") & (table.status == "ok")]
    assert sorted(zip(ends.policy, ends.tokens, strict=True)) == sorted(
        (policy, tokens) for policy in POLICIES for tokens in (1280, 5120)
    )
    ways = table[(table.ptq_method == "none") & (table.status == "unfinished")]
    assert sorted(ways.tokens) == [640] * 2 + [2560] * 2
    rounded = (
        table[table.ptq_method == "rtn"].groupby(["policy", "tokens"]).ptq_quantizer.apply(set)
    )
    assert rounded["none", 640] == {"int2/channel", "int3/channel"}
    assert rounded["kv3", 5120] == {"int2/channel", "int3/channel"}
    assert "w2" not in rounded  # nothing has fewer bits
    assert not table.duplicated(KEY).any()
    assert (
        collect([undisturbed / "rows.csv"])
        .table.drop(columns="wall_s")
        .equals(collect([undisturbed / "rows.parquet"]).table.drop(columns="wall_s"))
    )


def test_what_is_finished_is_not_touched(undisturbed, sweep_file, data_dir):
    files = [path for path in (undisturbed / "runs").rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    done = sweep(sweep_file(), undisturbed, data_dir)
    assert "6 of 6 runs are done already" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_driver_and_workers_are_killed_and_files_damaged_and_the_table_is_the_same(
    undisturbed, sweep_file, data_dir, tmp_path
):
    path, workdir = sweep_file(), tmp_path / "run"
    disturb(path, workdir, data_dir, kills=1)
    damaged = sorted((workdir / "runs").glob("*/rows.jsonl"))
    for rows in damaged[:1]:
        rows.write_text(rows.read_text()[:-40])
    done = sweep(path, workdir, data_dir)
    assert done.returncode == 0, done.stderr
    assert ("renamed to rows.jsonl.damaged" in done.stderr) == bool(damaged)
    pd.testing.assert_frame_equal(table_of(workdir), table_of(undisturbed))


@pytest.mark.slow
def test_twenty_kills_leave_the_same_table(undisturbed, sweep_file, data_dir, tmp_path):
    path, workdir = sweep_file(), tmp_path / "run"
    disturb(path, workdir, data_dir, kills=20)
    assert sweep(path, workdir, data_dir).returncode == 0
    pd.testing.assert_frame_equal(table_of(workdir), table_of(undisturbed))


def disturb(path, workdir, data_dir, kills):
    """Kills the driver, or a worker and then the driver, later and later."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    for kill in range(kills):
        driver = subprocess.Popen(
            command(path, workdir, data_dir),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(6 + 14 * kill / kills)
        if kill % 2 == 0:
            for worker in children(driver.pid):
                os.kill(worker, signal.SIGKILL)
                break
            time.sleep(2)
        driver.kill()
        driver.wait()


def children(parent):
    listed = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(pid) for pid in listed.read_text().split()] if listed.exists() else []


def test_a_worker_compiles_once_for_all_precisions_of_a_shape(sweep_file, data_dir, tmp_path):
    worker = worker_of(sweep_file(), data_dir, tmp_path)
    with counting_compiles() as compiled:
        for run_id in worker.runs:
            worker.work([run_id])
    assert compiled["train_step"] == 1
    assert compiled["eval_step"] == 1


def worker_of(path, data_dir, workdir):
    """A worker in this process, on one device, with a list of its runs."""
    plan = Plan.of(driving.load(path), Lab(data_dir))
    plan.write(workdir)
    worker = Worker(workdir, data_dir, 0, devices=jax.devices()[:1])
    worker.runs = list(plan.runs)
    return worker


def test_a_run_that_raises_is_a_failed_row_and_tried_again_when_asked(
    sweep_file, data_dir, tmp_path, monkeypatch, capsys
):
    worker = worker_of(sweep_file(("none",)), data_dir, tmp_path)
    train = runner.Runner._trunk
    monkeypatch.setattr(runner.Runner, "_trunk", lambda run, stop: 1 // 0)
    worker.work([worker.runs[0]])
    monkeypatch.setattr(runner.Runner, "_trunk", train)
    worker.work([worker.runs[1]])
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ends = [event["status"] for event in events if event["event"] == "done"]
    assert ends == ["failed", "ok"]
    assert "ZeroDivisionError" in (tmp_path / "runs" / worker.runs[0] / "error.txt").read_text()
    options = driving.Options(tmp_path, data_dir, executor="emit")
    path = sweep_file(("none",))
    assert driving.run(path, options) == 3
    assert "2 of 2 runs are done already" in capsys.readouterr().err
    retried = driving.Options(tmp_path, data_dir, executor="emit", retry=frozenset({"failed"}))
    driving.run(path, retried)
    printed = capsys.readouterr()
    assert "1 of 2 runs are done already" in printed.err
    assert printed.out.endswith(f"--runs={worker.runs[0]}\n")


def test_shares_asked_for_too_late_are_said(undisturbed, sweep_file, data_dir, tmp_path, capsys):
    path = tmp_path / "more.py"
    path.write_text(sweep_file().read_text().replace("(0.5, 1.0)", "(0.25, 0.5, 1.0)"))
    assert driving.run(path, driving.Options(undisturbed, data_dir)) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 runs are done already" in printed
    assert "ptq_at: 4 runs are beyond shares asked for later" in printed


def test_runs_of_an_earlier_table_are_not_run_again(undisturbed, sweep_file, data_dir, tmp_path):
    done = sweep(sweep_file(), tmp_path / "new", data_dir, f"--have={undisturbed / 'rows.csv'}")
    assert "6 of 6 runs are done already" in done.stdout
    pd.testing.assert_frame_equal(table_of(tmp_path / "new"), table_of(undisturbed))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("'kv3'", "'w9x'", "run tokens=1280, policy=w9x: unknown policy 'w9x'"),
        ("def get_sweep", "def get_swept", "expected a function get_sweep() -> qat.sweep.Sweep"),
        ("'kv3'", "'w2'", "of the grid are the same"),
        ('"tokens"', '"tokns"', "no key 'tokns'; nearest is 'tokens'"),
        ("(1280, 5120)", "()", "axis 'tokens' has no values"),
    ],
)
def test_bad_sweeps_are_refused(sweep_file, data_dir, old, new, message, tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(sweep_file().read_text().replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)):
        driving.run(path, driving.Options(tmp_path / "run", data_dir))
    assert not (tmp_path / "run").exists()


def test_the_folder_of_another_sweep_is_refused(undisturbed, sweep_file, data_dir, tmp_path):
    with pytest.raises(ValueError, match="belongs to another sweep: this one lacks 4 of its runs"):
        driving.run(sweep_file(("none",)), driving.Options(undisturbed, data_dir))
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not empty and no sweep made it"):
        driving.run(sweep_file(), driving.Options(tmp_path, data_dir))


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_stops_the_sweep_and_the_rerun_goes_on(
    sweep_file, data_dir, tmp_path
):
    path = sweep_file(("none",))
    for run_id in Plan.of(driving.load(path), Lab(data_dir)).runs:
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "plan.json").unlink(missing_ok=True)
        (tmp_path / "runs" / run_id).write_text("in the way")
    (tmp_path / "plan.json").write_text(json.dumps({"sweep": {}, "runs": {}}))
    done = sweep(path, tmp_path, data_dir)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    for file in (tmp_path / "runs").iterdir():
        file.unlink()
    assert sweep(path, tmp_path, data_dir).returncode == 0
