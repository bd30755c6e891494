"""A sweep from its file to its table: undisturbed, killed, damaged, failed, and refused."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

from launch import runner
from launch.lab import Lab
from launch.sweeps import driving, gathering, rounding, working
from launch.sweeps.following import Following, unit_of
from launch.sweeps.plan import Plan
from launch.sweeps.working import Worker
from launch.timing import counting_compiles
from qat.sweep.table import collect
from qat.training.results import write_rows

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


@pytest.mark.slow
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
    lab = Lab(data_dir, devices=jax.devices()[:1])
    worker = worker_of(sweep_file(), lab, tmp_path)
    with counting_compiles() as compiled:
        for run_id in worker.runs:
            worker.work([run_id])
    assert compiled["train_step"] == 1
    assert compiled["eval_step"] == 1


@pytest.fixture(scope="module")
def lab(data_dir):
    """What the workers of all tests have compiled."""
    return Lab(data_dir, devices=jax.devices()[:1])


def worker_of(path, lab, workdir):
    """A worker in this process, on one device, with a list of its runs."""
    plan = Plan.of(driving.load(path), lab)
    plan.write(workdir)
    worker = Worker(workdir, Path(), 0)
    worker._lab, worker.runs = lab, list(plan.runs)
    return worker


def test_a_run_that_raises_is_a_failed_row_and_tried_again_when_asked(
    sweep_file, lab, data_dir, tmp_path, monkeypatch, capsys
):
    worker = worker_of(sweep_file(("none",)), lab, tmp_path)
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
        (
            "def get_sweep",
            "1 / 0\n\n\ndef get_sweep",
            "bad.py:6: ZeroDivisionError: division by zero",
        ),
        ("from configs", "from confgs", "bad.py:2: ModuleNotFoundError: No module named 'confgs'"),
        ("def get_sweep", "def get sweep", "bad.py:6: SyntaxError: expected"),
        ("config = ", "exit(3)\n    config = ", "expected a sweep, but it exits: 3"),
        ("int3/channel", "int3/block:9", "int3/block:9 does not fit the weights of layer blocks/"),
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


def test_a_missing_sweep_file_is_named_with_the_nearest(tmp_path):
    (tmp_path / "demo.py").touch()
    with pytest.raises(ValueError, match=r"dmo\.py does not exist: .*nearest is '.*/demo\.py'"):
        driving.load(tmp_path / "dmo.py")


def collected(path, workdir, data_dir, **options):
    """What the command that only collects returns, and the commands and words it prints."""
    options = driving.Options(workdir, data_dir, executor="emit", **options)
    return driving.run(path, options)


def test_a_rounding_that_raises_is_a_failed_row_beside_the_others(
    sweep_file, lab, data_dir, tmp_path, monkeypatch, capsys
):
    path = sweep_file(("none",))
    worker = worker_of(path, lab, tmp_path)
    measured = rounding.Rounding._measured

    def broken(self, row, variant, *arguments):
        if str(variant.weights) == "int3/channel":
            raise RuntimeError("no room\nfor it")
        return measured(self, row, variant, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(rounding.Rounding, "_measured", broken)
        worker.work([worker.runs[0]])
    assert '"status": "failed"' in capsys.readouterr().out
    worker.work([worker.runs[1]])
    assert collected(path, tmp_path, data_dir) == 3
    told = capsys.readouterr().err
    assert "2 of 2 runs are done already" in told
    assert f"run {worker.runs[0]} (tokens=1280, policy=none): failed: rtn int3/channel" in told
    assert (
        f"RuntimeError: no room for it; see {tmp_path / 'runs' / worker.runs[0]}/error.txt" in told
    )
    assert "2 ok of 2 runs; 2 roundings failed; 12 rows" in told
    table = table_of(tmp_path)
    table = table[table.run_id == worker.runs[0]]
    assert set(table[table.ptq_quantizer == "int3/channel"].status) == {"failed"}
    assert table[table.status == "failed"][["loss", "ptq_delta"]].isna().all(axis=None)
    assert set(table[table.ptq_quantizer == "int2/channel"].status) == {"ok", "unfinished"}

    collected(path, tmp_path, data_dir, retry=frozenset({"failed"}))
    assert "1 of 2 runs are done already" in capsys.readouterr().err
    worker.work([worker.runs[0]])
    assert collected(path, tmp_path, data_dir) == 0


def test_runs_whose_roundings_an_earlier_table_lacks_are_not_finished(
    undisturbed, sweep_file, data_dir, tmp_path, capsys
):
    table = pd.read_parquet(undisturbed / "rows.parquet")
    table[table.ptq_method == "none"].to_csv(tmp_path / "plain.csv", index=False)
    collected(sweep_file(), tmp_path / "new", data_dir, have=(tmp_path / "plain.csv",))
    told = capsys.readouterr().err
    assert "2 of 6 runs are done already" in told  # 2 bits are rounded to no fewer
    assert "--have: 4 runs lack roundings there and are trained again" in told


def test_a_result_of_an_earlier_table_stands_before_a_failure_here(
    undisturbed, sweep_file, lab, data_dir, tmp_path
):
    worker = worker_of(sweep_file(), lab, tmp_path)
    working.fail(worker._lab, worker._plan, tmp_path, worker.runs[0], "it broke")
    table = undisturbed / "rows.parquet"
    assert collected(sweep_file(), tmp_path, data_dir, have=(table,)) == 0
    pd.testing.assert_frame_equal(table_of(tmp_path), table_of(undisturbed))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.py", b"", "unknown kind of file '.py': expected .jsonl, .csv or .parquet"),
        ("rows.csv", b"", "field 'run_id' and 21 others missing"),
        ("rows.csv", b"run_id,params\na,1\n", "field 'tokens' and 19 others missing"),
        ("rows.jsonl", b"", "no row in it"),
        ("rows.csv", b"\xff\xfe\0", "decode"),
        ("rows.parquet", b"PAR1 and no end", "arquet"),
    ],
)
def test_an_earlier_table_that_is_none_is_refused(
    sweep_file, data_dir, tmp_path, name, content, message
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"--have: .*{re.escape(message)}"):
        collected(sweep_file(), tmp_path / "run", data_dir, have=(tmp_path / name,))
    assert not (tmp_path / "run").exists()


def test_bad_rows_of_an_earlier_table_are_one_line(undisturbed, tmp_path):
    table = pd.read_parquet(undisturbed / "rows.parquet").astype({"loss": object})
    table.loc[2:5, "loss"] = "much"
    table.assign(note="mine").to_csv(tmp_path / "rows.csv", index=False)
    rows, (extra, bad) = gathering.read_earlier([tmp_path / "rows.csv"])
    assert len(rows) == len(table) - 4
    assert extra.startswith("--have: ignored")
    assert extra.endswith("'note'")
    assert re.match("left out of --have: .*row 3: loss: expected a number.* and 3 others", bad)


def test_a_driver_that_died_before_its_plan_leaves_a_folder_to_go_on_in(
    sweep_file, data_dir, tmp_path
):
    (tmp_path / "lock").touch()
    (tmp_path / "plan.json.17.partial").touch()
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is in use: the sweep is going on in it"):
            collected(sweep_file(), tmp_path, data_dir)
    assert collected(sweep_file(), tmp_path, data_dir) == 0


def test_rows_of_another_run_are_set_aside(undisturbed, sweep_file, data_dir, tmp_path, capsys):
    shutil.copytree(undisturbed, tmp_path / "run")
    first, second = sorted((tmp_path / "run" / "runs").glob("*/rows.jsonl"))[:2]
    first.write_text(first.read_text() + second.read_text())
    collected(sweep_file(), tmp_path / "run", data_dir)
    told = capsys.readouterr()
    assert f"{first}: a row of another run, {second.parent.name}; renamed to " in told.err
    assert "5 of 6 runs are done already" in told.err
    assert "5 ok of 6 runs; 1 runs are left" in told.err
    assert first.parent.name in told.out


def test_a_failure_is_never_written_into_the_folder_of_another_run(
    sweep_file, lab, data_dir, tmp_path
):
    worker = worker_of(sweep_file(("none",)), lab, tmp_path)
    folder = tmp_path / "runs" / worker.runs[0]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="belongs to another run"):
        worker.work([worker.runs[0]])
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.fixture
def branching(sweep_file, lab, data_dir, tmp_path):
    """A plan of one run of two budgets, its worker, and the sweep's file."""
    path = tmp_path / "branches.py"
    text = sweep_file(("none",)).read_text().replace("(1280, 5120)", "(5120,)")
    more = 'config.batch_size = 8\n    config.schedule.name = "wsd"'
    more += "\n    config.schedule.branches = (1280,)"
    path.write_text(text.replace("config.batch_size = 8", more))
    return worker_of(path, lab, tmp_path / "run"), path


def test_branches_are_one_run(branching, data_dir, tmp_path, capsys):
    worker, path = branching
    (run_id,) = worker.runs
    experiment, folder = worker._plan.runs[run_id], tmp_path / "run" / "runs" / run_id
    losses = np.array([1.0, 2.0])
    branch = worker._lab.row(experiment, "ok", 1.0, losses, experiment.branches[0])
    write_rows(folder / "rows.jsonl", [branch])
    collected(path, tmp_path / "run", data_dir)
    assert "0 done of 1 runs; 1 runs are left; 1 rows" in capsys.readouterr().err
    write_rows(folder / "rows.jsonl", [branch, worker._lab.row(experiment, "ok", 1.0, losses)])
    collected(path, tmp_path / "run", data_dir)
    assert "1 ok of 1 runs; 1 runs are left; 2 rows" in capsys.readouterr().err  # roundings


def test_progress_ends_at_all_of_it_and_never_beyond(branching, data_dir, tmp_path, capsys):
    worker, path = branching
    (run_id,), plan = worker.runs, Plan.of(driving.load(path), worker._lab)
    follow = Following(worker._lab, plan, [run_id], tmp_path / "run")
    trained = 5120 + 2 * 128  # a fifth of 10 steps is not the trunk's
    roundings = 3 * 2 + 3  # at half the trunk and at both ends, beside the plain losses
    assert follow.meter._total * follow._unit == pytest.approx(trained + roundings * 4 * 128 / 3)
    shares = []

    def tell(event, **fields):
        follow({"event": event, "run": run_id, **fields})
        shares.append(follow.meter._done / follow.meter._total)

    tell("trained", tokens=4000.0)
    tell("lost", given_up=False, reason="it hurts")
    assert shares[-1] == 0
    tell("skipped", tokens=2000.0)
    for _ in range(40):
        tell("trained", tokens=128.0)
    assert max(shares) < 0.9
    tell("done", status="ok")
    assert shares[-1] == pytest.approx(1)
    printed = capsys.readouterr().out
    assert f"run {run_id} (tokens=5120, policy=none): its worker died: it hurts" in printed
    assert printed.count("0 s left") == 1


def test_a_failed_run_is_told_with_its_overrides_and_the_reason(
    sweep_file, lab, data_dir, tmp_path, capsys
):
    path = sweep_file(("none",))
    worker = worker_of(path, lab, tmp_path)
    plan, (run_id, _) = Plan.of(driving.load(path), worker._lab), worker.runs
    follow = Following(worker._lab, plan, worker.runs, tmp_path)
    follow({"event": "lost", "run": run_id, "given_up": True, "reason": "it hurts"})
    expected = f"run {run_id} (tokens=1280, policy=none): failed: training: a worker died: it hurts"
    assert f"{expected}; see {tmp_path / 'runs' / run_id / 'error.txt'}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"run .* \(tokens=1280.*batch_size = 8 is not"):
        follow({"event": "ready", "devices": 3})


@pytest.mark.parametrize(
    ("tokens", "unit"),
    [
        (3e3, "tokens"),
        (6e5, "thousand tokens"),
        (6.1e7, "million tokens"),
        (4e12, "billion tokens"),
    ],
)
def test_progress_has_a_unit_that_fits(tokens, unit):
    size, name = unit_of(tokens)
    assert name == unit
    assert 10 <= tokens / size < 1e4


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_saves_and_the_next_visit_goes_on(sweep_file, data_dir, tmp_path, number, code):
    path, workdir = tmp_path / "long.py", tmp_path / "run"
    text = sweep_file(("none",)).read_text()
    path.write_text(text.replace("(1280, 5120)", "(1280000,)").replace("0.5, 1.0", "1.0,"))
    program = subprocess.Popen(
        command(path, workdir, data_dir),
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not any(path.stat().st_size > 500 for path in workdir.glob("runs/*/curve.csv")):
        assert program.poll() is None
        time.sleep(0.01)
    os.killpg(program.pid, number)  # as a terminal does
    assert program.communicate(timeout=120)[1].endswith("; the same command goes on from here\n")
    assert program.returncode == code
    assert (workdir / "rows.csv").exists()
    (saved,) = (int(step.name) for step in workdir.glob("runs/*/checkpoints/[0-9]*"))
    assert 0 < saved < 10_000
    done = sweep(path, workdir, data_dir)
    assert done.returncode == 0, done.stderr
    (curve,) = workdir.glob("runs/*/curve.csv")
    assert len(curve.read_text().splitlines()) == 10_001


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
