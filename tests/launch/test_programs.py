"""The programs as a user calls them: bad input, a run that goes on, the demo in small."""

import errno
import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags

from configs import experiment
from launch import demo, main
from launch.experiment import Experiment
from launch.lab import Lab
from launch.sweeps import driving
from qat import laws
from qat.sweep import Sweep, axis, product
from qat.training.results import read_rows

pytestmark = pytest.mark.usefixtures("optimized")

ROOT = Path(__file__).parents[2]


def run(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def small(corpus, **changes):
    config = experiment.get_config()
    config.data.source = f"folder:{corpus}"
    config.data.sequence_length = 16
    config.data.validation_fraction = 0.2
    config.batch_size = 8
    config.tokens = 1280
    config.model.width = 8
    config.model.layers = 1
    config.evaluation_batches = 4
    config.update(changes)
    return config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.polcy=w4"], "config: there is no key 'polcy'; nearest is 'policy'"),
        (["--config.tokens=many"], "--config.tokens=many"),
        (["--config.policy=w4x"], "unknown policy 'w4x'"),
        (["--config.model.width=33"], "width = 33 is not a multiple of heads = 2"),
        (["--config.data.source=folder:/nowhere"], "/nowhere is not a folder"),
        (["--config.data.source={empty}"], "has no text"),
        (["--config.mesh.fsdp=0"], "fsdp=0"),
        (["--config.batch_size=9"], "accumulation × data × fsdp = 1 × 8 × 1"),
        (
            ["--config.schedule.name=wsd", "--config.schedule.branches=(640.0,)"],
            "expected whole numbers of tokens, such as (640,)",
        ),
        (["--config.batch_size=300000", "--config.tokens=20000000"], "batch_size 300000 exceeds"),
        (["--workdir={used}"], "not empty and no run made it"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, message, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    names = {"used": tmp_path / "used", "empty": f"folder:{tmp_path / 'empty'}"}
    result = run(
        "launch.train",
        "--config=configs/tiny.py",
        f"--workdir={tmp_path / 'new'}",
        f"--data_dir={tmp_path / 'data'}",
        *(argument.format(**names) for argument in arguments),
    )
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["mine.txt"]


def test_a_missing_config_file_is_named():
    result = run("launch.train", "--config=configs/tini.py", "--workdir=/tmp/never")
    assert result.returncode == 2
    assert result.stderr.startswith("error: config file 'configs/tini.py' cannot be read")
    assert result.stderr.endswith("nearest is 'configs/tiny.py'\n")
    overridden = run("launch.train", "--config=configs/tini.py", "--config.tokens=1")
    assert overridden.stderr == result.stderr


def test_a_missing_flag_is_named():
    result = run("launch.train", "--config=configs/tiny.py")
    assert (result.returncode, result.stderr) == (2, "error: --workdir is required\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EROFS, "Read-only file system", "x/lock"), "cannot write x/lock: Read-only"),
        (OSError(errno.EACCES, "Permission denied", "x"), "cannot use x: Permission denied"),
        (OSError(errno.EXDEV, "Invalid link", "x", None, "y"), "cannot use y: Invalid link"),
        (FileNotFoundError("x is not a folder"), "x is not a folder"),
    ],
)
def test_what_the_system_refuses_is_said_in_words(error, line):
    assert main._told(error).startswith(line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coordinator=here:1"], "expected all three or none"),
        (["--coordinator=here", "--processes=2", "--process_id=0"], "expected host:port"),
        (["--coordinator=here:1", "--processes=2", "--process_id=2"], "less than --processes=2"),
        (
            ["--coordinator=localhost:1", "--processes=2", "--process_id=1", "--start_seconds=1"],
            "did not find one another within 1 s",
        ),
    ],
)
def test_processes_that_cannot_meet_end_with_one_line(arguments, message, tmp_path):
    workdir = tmp_path / "run"
    result = run("launch.train", "--config=configs/tiny.py", f"--workdir={workdir}", *arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert message in line
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--workers=x", "--workers: expected a whole number, got 'x'"),
        ("--workers=-1", "flag --workers=-1: -1 is not a non-negative integer"),
        ("--share=much", "--share: expected a number, got 'much'"),
        ("--executor=lcal", "unknown --executor 'lcal': .*; nearest is 'local'"),
        ("--retry=failled", "unknown --retry 'failled': .*; nearest is 'failed'"),
        ("--wokers=1", "Unknown command line flag 'wokers'. Did you mean: workers"),
    ],
)
def test_a_value_that_no_flag_has_is_named_with_what_was_expected(
    argument, message, monkeypatch, capsys
):
    values = flags.FlagValues()
    flags.DEFINE_integer("workers", 0, "", 0, flag_values=values)
    flags.DEFINE_float("share", 0.0, "", flag_values=values)
    flags.DEFINE_enum("executor", "local", ["local", "slurm"], "", flag_values=values)
    flags.DEFINE_multi_enum("retry", [], ["failed"], "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    with pytest.raises(SystemExit, match="2"):
        main._parse_flags(["program", argument], ())
    assert re.match(f"error: {message}", capsys.readouterr().err)


def test_flags_of_a_sweep_that_nothing_would_heed_are_refused():
    result = run("launch.sweep", "--sweep=x.py", "--workdir=never", "--slurm=minutes=30")
    expected = "--slurm=minutes=30 with --executor=local: expected --executor=slurm beside it"
    assert (result.returncode, result.stderr) == (2, f"error: {expected}\n")


def test_help_names_the_exit_codes_and_is_quick_to_say():
    result = run("launch.train", "--help")
    assert "75 preempted by SIGTERM, run the same command again" in " ".join(result.stdout.split())
    for flag in ("--workdir", "--keep_every", "--coordinator"):
        assert flag in result.stdout
    loaded = "import sys, launch.train; print('jax' in sys.modules)"
    quick = [sys.executable, "-c", loaded]
    assert subprocess.run(quick, cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("sent", "code", "word"), [(signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 75, "preempted")]
)
def test_a_signal_amid_imports_is_one_line(sent, code, word, tmp_path):
    config = tmp_path / "slow.py"
    begun = tmp_path / "begun"
    config.write_text(f"import time\nopen({str(begun)!r}, 'w').close()\ntime.sleep(60)")
    command = [sys.executable, "-m", "launch.train", f"--config={config}", "--workdir=never"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    while not begun.exists():
        time.sleep(0.01)
    process.send_signal(sent)
    assert process.communicate(timeout=60) == (
        "",
        f"{word}; the same command goes on from here\n",
    )
    assert process.returncode == code


def test_training_writes_a_row_once(corpus, tmp_path):
    command = (
        "launch.train",
        "--config=configs/tiny.py",
        f"--config.data.source=folder:{corpus}",
        "--config.data.sequence_length=16",
        "--config.data.validation_fraction=0.2",
        "--config.batch_size=8",
        "--config.tokens=1280",
        "--config.model.width=8",
        "--config.model.layers=1",
        "--config.mesh.data=8",
        f"--workdir={tmp_path / 'run'}",
        f"--data_dir={tmp_path / 'data'}",
    )
    first = run(*command)
    assert first.returncode == 0, first.stderr
    row = read_rows(tmp_path / "run").iloc[0]
    assert row.status == "ok"
    assert row.tokens == 1280
    assert f"{row.loss:.4f}" in first.stdout
    again = run(*command)
    assert "finished already" in again.stdout
    other = run(*command, "--config.policy=w4")
    assert other.returncode == 2
    assert "belongs to another run (policy is 'none' there, 'w4' here)" in other.stderr
    assert len(read_rows(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 100}, "tokens = 100 is less than one batch of 128 tokens"),
        ({"learning_rate": 0.0}, "learning rate 0.0"),
        ({"learning_rate": float("nan")}, "learning rate nan"),
        ({"clip_norm": -1.0}, "clip_norm = -1.0: expected at least 0"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
        ({"seed": -1}, "seed = -1"),
        ({"batch_size": 0}, "batch_size = 0: expected at least 1"),
        ({"evaluation_batches": 0}, "evaluation_batches = 0"),
        ({"policy": "w17"}, "int17"),
        ({"model": {"heads": 0}}, "heads = 0: expected at least 1"),
        ({"model": {"layers": 0}}, "layers = 0: expected at least 1"),
        ({"model": {"mlp_width": -8}}, "mlp_width = -8"),
        ({"model": {"dtype": "float33"}}, "dtype 'float33': expected one of float32"),
    ],
)
def test_an_experiment_checks_its_config(corpus, changes, message):
    with pytest.raises(ValueError, match=message):
        Experiment.from_config(small(corpus, **changes).to_dict())


def test_identity_covers_config_and_data(corpus, tmp_path):
    lab = Lab(tmp_path)
    ids = {
        lab.run_id(Experiment.from_config(small(corpus, **changes).to_dict()))
        for changes in ({}, {"policy": "w4"}, {"seed": 1}, {"learning_rate": 1e-3}, {})
    }
    assert len(ids) == 4
    shapes = {
        Experiment.from_config(small(corpus, **changes).to_dict()).shape
        for changes in ({}, {"policy": "w4"}, {"seed": 1}, {"tokens": 2560})
    }
    assert len(shapes) == 1


def with_few_resamples(fit, *arguments, bootstrap, **options):
    """A fit whose intervals, which are held elsewhere, take no time."""
    return fit(*arguments, bootstrap=min(bootstrap, 50), **options)


def test_the_demo_sweeps_fits_reports_and_goes_on(corpus, tmp_path, monkeypatch, capsys):
    grid = product(
        axis("model.width", (8, 16)),
        axis("tokens", (1280, 5120)),
        axis("policy", ("none", "w2", "w3", "w4")),
    )
    formats = ("int2/channel", "int3/channel", "int4/channel")
    sweep = Sweep(small(corpus).to_dict(), grid, ("rtn",), formats)
    monkeypatch.setattr(driving, "load", lambda path: sweep)
    monkeypatch.setattr(laws, "fit", functools.partial(with_few_resamples, laws.fit))
    monkeypatch.setenv("XLA_FLAGS", "")  # for the workers
    workdir = tmp_path / "demo"
    arguments = ["demo", f"--workdir={workdir}", f"--data_dir={tmp_path / 'data'}"]
    flags.FLAGS(arguments)

    assert demo.main(arguments[:1]) == 0
    printed = capsys.readouterr().out
    assert "16 ok of 16 runs; 40 rows" in printed
    assert "16 runs, 28 rows" in (workdir / "report.html").read_text()
    assert (workdir / "report.html").stat().st_size > 50_000
    rows = (workdir / "rows.csv").read_text()

    assert demo.main(arguments[:1]) == 0
    assert "16 of 16 runs are done already" in capsys.readouterr().out
    assert (workdir / "rows.csv").read_text() == rows
