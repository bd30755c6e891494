"""A run in a folder: exit codes, its rows and branches, stopped anywhere, and kept to itself."""

import dataclasses
import fcntl
import json
import math

import jax
import pytest

from configs import experiment
from launch import training
from launch.lab import Lab
from launch.runner import Saving, Watching
from qat.training import curve
from qat.training.results import read_rows

SAVING = Saving(every=4, keep=2, keep_every=0)
WATCHING = Watching(tensorboard=False, wandb_project=None, profile=None, errors=False)


@pytest.fixture(scope="module")
def shared_lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("data"), devices=jax.devices()[:1])


@pytest.fixture
def go(corpus, shared_lab, tmp_path, monkeypatch):
    """Runs a changed small config in a folder, through programs compiled once."""
    monkeypatch.setattr(training, "Lab", lambda data_dir: shared_lab)

    def go(name="run", saving=SAVING, watching=WATCHING, **changes):
        config = experiment.get_config()
        config.data.source = f"folder:{corpus}"
        config.data.sequence_length = 16
        config.data.validation_fraction = 0.2
        config.batch_size = 8
        config.tokens = 24 * 128
        config.model.width = 8
        config.model.layers = 1
        config.evaluation_batches = 4
        config.update(changes)
        return training.run(config.to_dict(), tmp_path / name, tmp_path / "data", saving, watching)

    return go


WSD = {"schedule": {"name": "wsd", "branches": (10 * 128, 16 * 128)}}


def content(folder):
    """Curves by name, and rows but for their seconds."""
    curves = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("curve.csv")}
    return curves, read_rows(folder).drop(columns="wall_s").to_dict("records")


def test_branches_have_curves_and_rows_of_their_own(go, tmp_path, capsys):
    assert go(**WSD) == 0
    curves, rows = content(tmp_path / "run")
    assert [row["tokens"] for row in rows] == [10 * 128, 16 * 128, 24 * 128]
    assert len({row["run_id"] for row in rows}) == 3
    assert rows[0]["flops"] * 24 == rows[2]["flops"] * 10
    lengths = {name: text.count("\n") - 1 for name, text in curves.items()}
    assert lengths == {"curve.csv": 24, "branches/10/curve.csv": 2, "branches/16/curve.csv": 3}
    assert curves["branches/10/curve.csv"].splitlines()[1].startswith("9,")
    assert "Training: 29/29 steps" in capsys.readouterr().out


def test_a_branch_is_the_row_of_a_run_of_its_budget(go, tmp_path):
    go(**WSD)
    go("alone", tokens=10 * 128, schedule={"name": "wsd", "branches": ()})
    _, (branch, *_) = content(tmp_path / "run")
    _, (alone,) = content(tmp_path / "alone")
    own = {"run_id", "config_hash"}
    assert {key: branch[key] for key in branch.keys() - own} == {
        key: alone[key] for key in alone.keys() - own
    }


@pytest.mark.parametrize("every", [5, 7])
def test_stopped_again_and_again_it_ends_the_same(go, stopping, tmp_path, every):
    go("whole", **WSD)
    stopping(every)
    codes = [75]
    while codes[-1] == 75:
        codes.append(go("parts", saving=Saving(0, 1, 0), **WSD))
    assert codes[-1] == 0
    assert len(codes) > 4
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_what_is_finished_is_left_alone(go, tmp_path, capsys):
    go()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert go() == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("is finished already")
    assert len(printed) == 2
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before


def test_a_diverged_run_says_so_again_and_keeps_its_curve(go, tmp_path, capsys):
    changes = {"learning_rate": 10.0, "tokens": 200 * 128}
    assert go(**changes) == 3
    assert go(**changes) == 3
    assert "finished already" in capsys.readouterr().out
    (row,) = map(json.loads, (tmp_path / "run" / "rows.jsonl").read_text().splitlines())
    assert row["status"] == "diverged"
    assert row["loss"] != row["loss"]
    *healthy, last = [each.loss for each in curve.read(tmp_path / "run" / "curve.csv").values()]
    assert max(healthy) <= 3 * math.log(256) < last < math.inf


def test_errors_of_a_finished_run_are_told(go, tmp_path):
    assert go(policy="w2") == 0
    assert go(policy="w2", watching=dataclasses.replace(WATCHING, errors=True)) == 0
    assert "int2/channel" in (tmp_path / "run" / "errors.txt").read_text()


def test_a_trunk_that_diverges_leaves_a_row_of_every_budget(go, tmp_path):
    assert go(learning_rate=1e30, **WSD) == 3
    _, rows = content(tmp_path / "run")
    assert [row["status"] for row in rows] == ["diverged"] * 3


def test_a_run_that_is_going_on_is_left_alone(go, tmp_path):
    go(tokens=1280)
    with (tmp_path / "run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is in use: the same run is going on in it"):
            go(tokens=1280)


def test_a_curve_that_was_lost_is_told(go, stopping, tmp_path, capsys):
    stopping(9)
    assert go() == 75
    (tmp_path / "run" / "curve.csv").unlink()
    assert go() == 75
    assert "curve.csv lacks 8 steps up to 8" in capsys.readouterr().err
