"""Runs that begin with a checkpoint, and students of one, taught by what it writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import distill, experiment, finetune
from launch import origin, own_text, training
from launch.checkpoints import open_checkpoint
from launch.experiment import Experiment
from launch.lab import Lab, blank_constants
from launch.runner import Saving, Watching
from launch.sweeps.lanes import groups
from launch.sweeps.plan import Plan
from models.task import model_of
from qat.sweep import Sweep, axis
from qat.training.data import load
from qat.training.results import read_rows
from tests.training_checks import assert_same

ROOT = Path(__file__).parents[2]
SAVING = Saving(every=4, keep=2, keep_every=0)
WATCHING = Watching(tensorboard=False, wandb_project=None, profile=None, errors=False)
STEP = 128  # tokens


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("data"), jax.devices()[:1])


@pytest.fixture(scope="module")
def train(corpus, lab):
    """Trains a changed small config in a folder, through programs compiled once."""

    def train(workdir, base=None, **changes):
        config = base or small(corpus)
        config.update(changes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "Lab", lambda data_dir: lab)
            return training.run(config, workdir, Path("unused"), SAVING, WATCHING)

    return train


def small(corpus):
    config = experiment.get_config()
    config.data.source = f"folder:{corpus}"
    config.data.sequence_length = 16
    config.data.validation_fraction = 0.2
    config.batch_size = 8
    config.tokens = 24 * STEP
    config.learning_rate = 1e-2
    config.model.width = 8
    config.model.layers = 1
    config.evaluation_batches = 4
    return config.to_dict()


def student(folder, **changes):
    config = distill.get_config()
    config.batch_size = 8
    config.tokens = 12 * STEP
    config.policy = "w2"
    config.evaluation_batches = 4
    config.writing.sequences = 40
    config.writing.batch_size = 16
    config.update_from_flattened_dict(changes)
    return origin.resolved(origin.student_of(str(folder), config.to_dict()))


@pytest.fixture(scope="module")
def full(train, tmp_path_factory):
    """A finished run in full precision."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    assert train(folder) == 0
    return folder


def content(folder):
    """Its curve, and its row but for the seconds."""
    rows = read_rows(folder).drop(columns="wall_s").to_dict("records")
    return (folder / "curve.csv").read_text(), rows


def test_a_run_begins_with_the_parameters_of_another(train, full, lab, corpus, tmp_path):
    pinned = origin.resolved({**small(corpus), "init": str(full)})["init"]
    run = Experiment.from_config({**small(corpus), "init": pinned, "policy": "w4"})
    assert_same(lab.fresh(run).params, open_checkpoint(full).params)
    assert train(tmp_path / "fine", init=str(full), learning_rate=1e-9) == 0
    (row,) = read_rows(tmp_path / "fine").itertuples()
    (before,) = read_rows(full).itertuples()
    assert row.loss == pytest.approx(before.loss, rel=1e-4)
    assert (row.init, row.teacher, before.init) == (pinned, "none", "none")


@pytest.mark.slow
def test_a_ternary_model_begins_with_a_checkpoint(train, full, tmp_path):
    assert train(tmp_path / "bitnet", init=str(full), policy="bitnet") == 0
    assert train(tmp_path / "random", policy="bitnet") == 0
    (tuned,), (random,) = (read_rows(tmp_path / name).loss for name in ("bitnet", "random"))
    assert tuned < random


def test_identity_covers_the_parameters_a_run_begins_with(train, full, corpus, tmp_path):
    assert train(tmp_path / "other", seed=1) == 0
    resolved = [
        Experiment.from_config(origin.resolved({**small(corpus), "init": folder}))
        for folder in ("", str(full), str(tmp_path / "other"))
    ]
    assert len({each.config_hash for each in resolved}) == 3
    for name in ("a", "b"):  # the same folder with other parameters in it
        shutil.copytree(full if name == "a" else tmp_path / "other", tmp_path / "moved")
        path = str(tmp_path / "moved")
        found = Experiment.from_config(origin.resolved({**small(corpus), "init": path}))
        resolved.append(found)
        shutil.rmtree(path)
        origin._summary.cache_clear()
    assert len({each.config_hash for each in resolved}) == 5


def test_runs_without_a_checkpoint_are_who_they_were(corpus):
    config = small(corpus)
    older = {name: value for name, value in config.items() if name not in ("init", "teacher")}
    runs = [Experiment.from_config(each) for each in (config, older)]
    assert runs[0].config_hash == runs[1].config_hash
    assert runs[0].size == runs[1].size


def tuned(folder, **changes):
    """A config that follows a checkpoint; what it leaves open is the checkpoint's."""
    config = finetune.get_config()
    config.init = str(folder)
    config.batch_size = 8
    config.tokens = 24 * STEP
    config.evaluation_batches = 4
    config.update_from_flattened_dict(changes)
    return config.to_dict()


@pytest.mark.parametrize("follows", [False, True])
def test_a_stopped_run_goes_on_without_what_it_began_with(
    train, full, corpus, stopping, tmp_path, follows
):
    lent = tmp_path / "lent"
    shutil.copytree(full, lent)
    config = tuned(lent) if follows else {**small(corpus), "init": str(lent)}
    assert train(tmp_path / "whole", base=dict(config)) == 0
    stopping(9)
    assert train(tmp_path / "run", base=dict(config)) == 75
    shutil.rmtree(lent)
    origin._summary.cache_clear()
    codes = [train(tmp_path / "run", base=dict(config)) for _ in range(3)]
    assert codes[-1] == 0
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_a_config_that_follows_says_what_the_same_run_would(full, corpus):
    config = small(corpus)
    told = {**tuned(full), **{name: config[name] for name in ("model", "scaling", "data")}}
    told["learning_rate"] = config["learning_rate"] / 10
    ours, theirs = (Experiment.from_config(origin.resolved(c)) for c in (tuned(full), told))
    assert ours.config == theirs.config
    changes = {"model.dtype": "bfloat16", "data.sequence_length": 8, "learning_rate": 1.0}
    found = origin.resolved(tuned(full, **changes))
    assert (found["model"]["dtype"], found["model"]["width"]) == ("bfloat16", 8)
    assert (found["data"]["sequence_length"], found["learning_rate"]) == (8, 1.0)
    with pytest.raises(ValueError, match=r"wants --config\.init=CHECKPOINT"):
        Experiment.from_config(origin.resolved(tuned("")))


def damaged(folder):
    (state,) = folder.glob("checkpoints/24/state/_METADATA")
    state.write_bytes(state.read_bytes()[:-9])


def unfinished(folder):
    shutil.rmtree(folder / "checkpoints" / "24")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "config.json").unlink(),
            "lent' holds no model: expected the workdir of .*; nearest is .*good",
        ),
        (lambda folder: (folder / "config.json").write_text("[]"), "is not that of a run"),
        (unfinished, r"no state after its last step \(24\); expected one that is finished"),
        (damaged, "is damaged: state/_METADATA is damaged"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(train, full, tmp_path, spoil, message):
    shutil.copytree(full, tmp_path / "good")
    shutil.copytree(full, tmp_path / "lent")
    spoil(tmp_path / "lent")
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", init=str(tmp_path / "lent"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"width": 16}}, "does not fit: width is 8 there, 16 here"),
        ({"model": {"mlp_width": 16}}, r"mlp/down/kernel is \(1, 24, 8\) there, \(1, 16, 8\) here"),
        ({"model": {"rope_base": 5e3}}, "does not fit: rope_base is 10000.0 there, 5000.0 here"),
        ({"policy": "weights int4/channel/learned"}, r"weights_value is None there, \(1"),
    ],
)
def test_a_checkpoint_of_another_shape_is_one_line(train, full, corpus, tmp_path, changes, message):
    config = small(corpus)
    config["model"].update(changes.pop("model", {}))
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", base=config, init=str(full), **changes)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_has_changed_is_told(train, full, tmp_path):
    pinned = f"{full}@0123456789ab"
    with pytest.raises(ValueError, match=r"other parameters by now: fingerprint .* expected 0123"):
        train(tmp_path / "run", init=pinned)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("model", "the config has no shape: .* is for launch.distill"),
        ("teacher", "writing: expected a teacher that writes"),
    ],
)
def test_a_config_for_the_other_program_is_told(full, without, message):
    config = student(full)
    del config[without]
    with pytest.raises(ValueError, match=message):
        Experiment.from_config(config)
    with pytest.raises(ValueError, match="the config has no 'writing'"):
        origin.student_of(str(full), experiment.get_config().to_dict())


def test_a_teacher_in_low_precision_is_refused(train, full, tmp_path):
    assert train(tmp_path / "w4", policy="w4") == 0
    with pytest.raises(ValueError, match="trained with policy 'w4': expected one in full"):
        train(tmp_path / "run", base=student(tmp_path / "w4"))
    assert not (tmp_path / "run").exists()


def test_a_student_learns_from_what_its_teacher_writes(train, full, lab, stopping, tmp_path):
    config = student(full)
    assert train(tmp_path / "whole", base=config) == 0
    (row,) = read_rows(tmp_path / "whole").itertuples()
    (teacher,) = read_rows(full).itertuples()
    assert row.teacher == row.init == config["teacher"]
    assert (row.eval_set, row.data_fingerprint) == (teacher.eval_set, teacher.data_fingerprint)
    assert row.learning_rate == pytest.approx(1e-3)
    assert row.flops * 24 * 3 == teacher.flops * 12 * 4
    stopping(5)
    codes = [train(tmp_path / "parts", base=config) for _ in range(4)]
    assert codes == [75, 75, 0, 0]
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    train_windows = lab.batches(Experiment.from_config(config))[0].records
    assert train_windows.shape == (32, 17)  # a fifth of 40 is for validation


@pytest.fixture(scope="module")
def writer(full):
    """The finished run, its model and settings to write by."""
    found = open_checkpoint(full)
    settings = distill.get_config().writing.to_dict()
    settings.update(sequences=300, batch_size=128)
    return found, model_of(found.config, None, found.params), settings


def test_every_id_begins_a_text_before_any_begins_two(writer):
    _, model, settings = writer
    batches = [own_text.batch_of(model, settings, index, 16) for index in range(3)]
    starts = [int(start) for batch in batches for start in batch[:, 0]]
    assert sorted(starts[:256]) == list(range(256))
    assert starts[256:] == starts[:128]
    assert (batches[2] != batches[0]).any()  # but the texts differ
    np.testing.assert_array_equal(own_text.batch_of(model, settings, 1, 16), batches[1])


def test_a_text_begins_with_the_most_likely_tokens(writer):
    _, model, settings = writer
    tokens_BS = own_text.batch_of(model, settings, 0, 16)
    likely_BT = np.asarray(model(jnp.asarray(tokens_BS[:, :-1], jnp.int32)).argmax(axis=-1))
    agrees_BT = likely_BT == tokens_BS[:, 1:]
    assert agrees_BT[:, :3].all()
    assert 0.2 < agrees_BT[:, 3].mean() < agrees_BT[:, 2].mean()
    assert agrees_BT[:, 5].mean() < 0.9


def test_killed_while_writing_it_goes_on_with_the_batch_it_was_at(
    writer, full, lab, tmp_path, monkeypatch
):
    found, _, settings = writer
    dataset = lab.dataset(found.experiment)
    whole = own_text.written(found, dataset, settings, tmp_path / "whole")
    indices, batch_of = [], own_text.batch_of

    def killed(model, settings, index, length):
        indices.append(index)
        if indices.count(1) == 1 and index == 1:
            raise KeyboardInterrupt
        return batch_of(model, settings, index, length)

    monkeypatch.setattr(own_text, "batch_of", killed)
    with pytest.raises(KeyboardInterrupt):
        own_text.written(found, dataset, settings, tmp_path / "parts")
    again = own_text.written(found, dataset, settings, tmp_path / "parts")
    assert indices == [0, 1, 1, 2]
    np.testing.assert_array_equal(again.train.records, whole.train.records)
    np.testing.assert_array_equal(again.validation.records, whole.validation.records)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [
        again.directory.parents[1].name
    ]
    own_text.written(found, dataset, settings, tmp_path / "parts")
    assert indices == [0, 1, 1, 2]
    assert load(again.directory).fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequences": 1}, "writing.sequences = 1: expected at least 2"),
        ({"greedy": (5, 3)}, r"writing.greedy = \(5, 3\)"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"top_k": 300}, "top_k = 300: expected at most 256"),
    ],
)
def test_settings_out_of_range_write_nothing(writer, lab, tmp_path, changes, message):
    found, _, settings = writer
    dataset = lab.dataset(found.experiment)
    with pytest.raises(ValueError, match=message):
        own_text.written(found, dataset, {**settings, **changes}, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_sweep_of_students_is_one_of_runs_that_train_alone(full, lab):
    plan = Plan.of(Sweep(student(full), axis("policy", ("w2", "w3"))), lab)
    assert len({each.shape for each in plan.runs.values()}) == 1
    assert groups(plan.runs, most=8) == [(run_id,) for run_id in plan.runs]


def program(*arguments):
    command = [sys.executable, "-m", "launch.distill", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return result.returncode, result.stderr


def test_the_program_has_a_config_and_wants_a_checkpoint(tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert program(workdir, "--config.policy=w4") == (2, "error: --checkpoint is required\n")
    code, said = program(workdir, "--checkpoint=c", "--config.writing.sequence=9")
    assert (code, said) == (
        2,
        "error: config: there is no key 'sequence'; nearest is 'sequences'\n",
    )
    code, said = program(workdir, f"--checkpoint={tmp_path}")
    assert code == 2
    assert said.startswith(f"error: checkpoint '{tmp_path}' holds no model: expected the workdir")
    assert json.dumps([*tmp_path.iterdir()]) == "[]"


def test_a_student_s_step_is_lowered_without_its_teacher(full, lab):
    run = Experiment.from_config({**student(full), "teacher": "nowhere", "init": "nowhere"})
    programs = lab.programs(run)
    state = jax.eval_shape(programs.init_state, np.uint32(0))
    tokens_BS = jax.ShapeDtypeStruct((8, 17), jnp.int32)
    programs.train_step.lower(state, blank_constants(run), run.schedule, tokens_BS)
