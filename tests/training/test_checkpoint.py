"""Checkpoints: other meshes, other runs, every kind of damage, full disks, who owns a workdir."""

import collections
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.transformer import TransformerConfig
from qat.training.checkpoint import Checkpoints, claim
from qat.training.files import write_whole
from qat.training.sharding import make_mesh
from tests.training_checks import (
    abstract,
    assert_same,
    programs_on,
    run,
)

ROOT = Path(__file__).parents[2]
IDENTITY = {"configuration": "mine", "seed": 0}


@pytest.fixture(scope="module")
def saved(programs, tmp_path_factory):
    """A folder with the checkpoints of steps 2, 4 and 6, and the state of each."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(folder, IDENTITY, keep=9) as checkpoints:
        run(programs, steps=6, checkpoints=checkpoints, checkpoint_every=2)
    return folder, {step: run(programs, steps=6, stop=step).state for step in (2, 4, 6)}


def restored(programs, folder, identity=IDENTITY, warnings=None, **options):
    warn = [].append if warnings is None else warnings.append
    with Checkpoints(folder, identity, warn=warn, **options) as checkpoints:
        return checkpoints.restore(abstract(programs), programs.state_sharding)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_restored_bit_for_bit(programs, saved):
    folder, states = saved
    assert_same(restored(programs, folder), states[6])


def test_nothing_saved_is_nothing_restored(programs, tmp_path):
    assert restored(programs, tmp_path) is None


def test_a_checkpoint_restores_onto_another_mesh(programs, saved):
    folder, states = saved
    sharded = programs_on(make_mesh(2, 2, 2))
    found = restored(sharded, folder)
    assert_same(found, states[6])
    assert len(found.params["head"]["kernel"].sharding.device_set) == 8


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({"configuration": "other", "seed": 0}, "configuration is 'mine', expected 'other'"),
        ({"configuration": "mine", "seed": 1}, "seed is 0, expected 1"),
        ({"configuration": "mine", "seed": 0, "data": "abc"}, "data is None, expected 'abc'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(programs, saved, identity, message):
    folder, _ = saved
    before = names(folder)
    with pytest.raises(ValueError, match=message):
        restored(programs, folder, identity)
    assert names(folder) == before


def test_a_checkpoint_of_another_architecture_is_no_damage(saved):
    wider = TransformerConfig(vocabulary=32, width=32, layers=2, heads=4, kv_heads=2)
    folder, _ = saved
    with pytest.raises(ValueError, match=r"6 does not fit this program: its array opt_state/"):
        restored(programs_on(make_mesh(), wider), folder)
    assert "6" in names(folder)


def kinds_of_damage(checkpoint):
    """Truncated, emptied, missing and one bit changed, for each file that is not a bare mark."""
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file())
    for path in files:
        if path.name != "commit_success.txt" or path.parent != checkpoint:
            yield from ((path.relative_to(checkpoint), kind) for kind in DAMAGE)


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE = {"truncated": lambda content: content[:-1], "emptied": lambda _: b"", "flipped": flip}


def test_whatever_is_damaged_the_one_before_is_used(programs, saved, tmp_path):
    folder, states = saved
    found = collections.Counter()
    for index, (name, kind) in enumerate(kinds_of_damage(folder / "6")):
        if kind == "flipped" and name == Path("_CHECKPOINT_METADATA"):
            continue  # a changed time is no damage
        copy = tmp_path / str(index)
        shutil.copytree(folder, copy)
        path = copy / "6" / name
        path.write_bytes(DAMAGE[kind](path.read_bytes()))
        warnings = []
        assert_same(restored(programs, copy, warnings=warnings), states[4])
        assert names(copy) == ["2", "4", "6.damaged"]
        (line,) = warnings
        assert f"{copy}/6 is damaged ({'its ' if name.name == 'seal.json' else ''}{name}" in line
        assert "renamed to 6.damaged" in line
        found[kind] += 1
        shutil.rmtree(copy)
    assert min(found.values()) > 8


def test_a_missing_file_is_damage(programs, saved, tmp_path):
    folder, states = saved
    for index, name in enumerate(("seal.json", "_CHECKPOINT_METADATA", "state/manifest.ocdbt")):
        copy = tmp_path / str(index)
        shutil.copytree(folder, copy)
        (copy / "6" / name).unlink()
        assert_same(restored(programs, copy), states[4])


def test_garbage_in_the_newest_two_falls_back_twice(programs, saved, tmp_path):
    folder, states = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "6" / "state")
    (tmp_path / "4" / "seal.json").write_bytes(os.urandom(64))
    warnings = []
    assert_same(restored(programs, tmp_path, warnings=warnings), states[2])
    assert len(warnings) == 2
    assert names(tmp_path) == ["2", "4.damaged", "6.damaged"]


def test_a_run_goes_on_after_damage_and_may_be_damaged_again(programs, saved, tmp_path):
    folder, states = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for aside in ("6.damaged", "6.damaged1"):
        (tmp_path / "6" / "seal.json").unlink()
        with Checkpoints(tmp_path, IDENTITY, keep=9, warn=[].append) as checkpoints:
            state = checkpoints.restore(abstract(programs), programs.state_sharding)
            result = run(programs, steps=6, state=state, checkpoints=checkpoints)
        assert aside in names(tmp_path)
        assert_same(result.state, states[6])
        assert_same(restored(programs, tmp_path), states[6])


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(programs, saved, tmp_path):
    folder, _ = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for step in (2, 4, 6):
        (tmp_path / str(step) / "seal.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no whole checkpoint .* 2.damaged, 4.damaged"):
            restored(programs, tmp_path)
    assert names(tmp_path) == ["2.damaged", "4.damaged", "6.damaged"]


def test_a_save_that_was_killed_is_cleaned_up(programs, saved, tmp_path):
    folder, states = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "6").rename(tmp_path / "6.orbax-checkpoint-tmp")
    assert_same(restored(programs, tmp_path), states[4])
    assert names(tmp_path) == ["2", "4"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [9, 10]),
        ({"keep": 1}, [10]),
        ({"keep": 3}, [8, 9, 10]),
        ({"keep_every": 4}, [4, 8, 9, 10]),
    ],
)
def test_the_newest_and_every_nth_are_kept(programs, tmp_path, options, kept):
    with Checkpoints(tmp_path, IDENTITY, **options) as checkpoints:
        run(programs, steps=10, checkpoints=checkpoints, checkpoint_every=1)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == kept


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep_every": -1}])
def test_a_policy_out_of_range_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="expected at least 1 and 0"):
        Checkpoints(tmp_path, IDENTITY, **options)


FULL_DISK = """
import resource, sys
import numpy as np
from pathlib import Path
from qat.training.checkpoint import Checkpoints
from qat.training.step import TrainState
import jax, jax.numpy as jnp

checkpoints = Checkpoints(Path(sys.argv[1]), {})
state = lambda step: TrainState(
    {"w": jax.random.normal(jax.random.key(step), (512, 512))}, (), jnp.int32(step), jnp.uint32(0)
)
checkpoints.save(state(1))
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save(state(2))
    checkpoints.wait()
except OSError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert f"cannot save a checkpoint in {tmp_path}, earlier ones are untouched" in line
    assert "1" in names(tmp_path)
    assert "2" not in names(tmp_path)


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write_whole(path, "before")

    def full(descriptor, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*rows\.jsonl'"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert names(tmp_path) == ["rows.jsonl"]


def test_a_workdir_belongs_to_one_configuration(tmp_path):
    workdir = tmp_path / "a"
    claim(workdir, {"policy": "w4", "seed": 0})
    claim(workdir, {"seed": 0, "policy": "w4"})
    with pytest.raises(ValueError, match="policy is 'w4' there, 'w3' here"):
        claim(workdir, {"policy": "w3", "seed": 0})


def test_a_workdir_names_the_nested_setting_that_differs(tmp_path):
    claim(tmp_path / "a", {"model": {"width": 8, "layers": 2}})
    with pytest.raises(ValueError, match=r"\(model\.width is 8 there, 16 here\)"):
        claim(tmp_path / "a", {"model": {"width": 16, "layers": 2}})


def test_a_workdir_whose_claim_was_killed_is_free(tmp_path):
    (tmp_path / "config.json.123.partial").write_text("{")
    claim(tmp_path, {"seed": 0})
    claim(tmp_path, {"seed": 0})
    with pytest.raises(ValueError, match="seed is 0 there, 1 here"):
        claim(tmp_path, {"seed": 1})


def test_a_damaged_marker_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        claim(tmp_path, {"seed": 0})
    assert (tmp_path / "config.json").read_text() == "{"


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not empty and no run made it"):
        claim(tmp_path, {"seed": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
