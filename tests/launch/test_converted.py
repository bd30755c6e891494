"""Runs that begin with a converted model, and students of one."""

from pathlib import Path

import jax
import numpy as np
import pytest

from configs import distill, experiment, finetune
from launch import origin, training
from launch.checkpoints import open_checkpoint
from launch.experiment import Experiment
from launch.lab import Lab
from launch.runner import Saving, Watching
from models import pretrained
from qat.training.results import read_rows
from tests.models.llama_files import Shape, learned_tokenizer, logits, weights, write_folder

WATCHING = Watching(tensorboard=False, wandb_project=None, profile=None, errors=False)
SHAPE = Shape(layers=1, channels=8)
TENSORS = weights(SHAPE, tied=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a converted model."""
    folder = tmp_path_factory.mktemp("llama")
    source = write_folder(folder / "source", SHAPE, TENSORS)
    pretrained.write(folder / "model", pretrained.read(source))
    return folder / "model"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("data"), jax.devices()[:1])


@pytest.fixture
def train(lab, tmp_path, monkeypatch):
    """Trains a config; returns its row."""

    def train(config):
        monkeypatch.setattr(training, "Lab", lambda data_dir: lab)
        assert training.run(config, tmp_path / "run", Path(), Saving(0, 1, 0), WATCHING) == 0
        (row,) = read_rows(tmp_path / "run").itertuples()
        return row

    return train


@pytest.fixture(scope="module")
def needed(corpus):
    """What a converted model does not say."""
    return {"data.source": f"folder:{corpus}", "data.sequence_length": 16, "learning_rate": 1e-9}


def small(module, **changes):
    config = module.get_config()
    config.batch_size = 8
    config.tokens = 12 * 128
    config.evaluation_batches = 4
    config.update_from_flattened_dict(changes)
    return config.to_dict()


def tuned(model, **changes):
    return small(finetune, init=str(model), **changes)


def test_a_run_begins_with_it(train, model, needed, lab):
    config = tuned(model, **needed)
    row = train(config)
    _, validation = lab.batches(Experiment.from_config(origin.resolved(config)))
    losses = []
    for window_S in np.concatenate([validation.batch_at(step) for step in range(4)]):
        logits_TV = logits(SHAPE, TENSORS, window_S[:-1], neighbours=False)
        total_T = np.log(np.exp(logits_TV).sum(axis=1))
        losses.append((total_T - logits_TV[np.arange(16), window_S[1:]]).mean())
    assert row.loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_it_has_a_student(train, model, needed, tmp_path):
    changes = {**needed, "learning_rate": 1e-2, "policy": "w2", "writing.sequences": 40}
    config = origin.student_of(str(model), small(distill, **changes))
    config["writing"]["batch_size"] = 16
    row = train(config)
    assert row.init == row.teacher == f"{model}@{open_checkpoint(model).fingerprint}"
    first, *_, last = (tmp_path / "run" / "curve.csv").read_text().splitlines()[1:]
    assert float(last.split(",")[1]) < float(first.split(",")[1])


def test_what_it_does_not_say_is_asked_for(model, needed):
    asked = "--config.learning_rate, --config.data.source, --config.data.sequence_length"
    with pytest.raises(ValueError, match=f"model' was converted, .* expected {asked}$"):
        origin.resolved(tuned(model))
    for name, value in needed.items():
        with pytest.raises(ValueError, match=f"was converted, .* expected --config.{name}$"):
            origin.resolved(tuned(model, **{**needed, name: type(value)()}))


def test_its_tokenizer_may_be_a_copy_but_no_other(model, needed, tmp_path):
    for name, size in (("same", 300), ("other", 290)):
        learned_tokenizer(size=size).save(str(tmp_path / f"{name}.json"))
    same, other = (
        Experiment.from_config(
            origin.resolved(tuned(model, **needed, **{"data.tokenizer": str(tmp_path / name)}))
        )
        for name in ("same.json", "other.json")
    )
    origin.check(same, "any")
    with pytest.raises(ValueError, match=r"tokenizer is '.*model/tokenizer.json', here '.*other"):
        origin.check(other, "any")


def test_another_shape_is_one_line_that_says_where_to_take_it_from(train, model, corpus):
    config = small(experiment, init=str(model), **{"data.source": f"folder:{corpus}"})
    with pytest.raises(ValueError, match=r"vocabulary is 330 there, 256 here; configs/finetune"):
        train(config)
