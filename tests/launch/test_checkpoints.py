"""Runs and converted models come through one door, and the door leaves no trace."""

import json

import jax
import numpy as np
import pytest

from configs import experiment
from launch import training
from launch.checkpoints import open_checkpoint
from launch.experiment import Experiment
from launch.lab import Lab
from launch.runner import Saving, Watching
from models import pretrained
from qat.training.results import read_rows
from tests.models.llama_files import Shape, weights, write_folder

WATCHING = Watching(tensorboard=False, wandb_project=None, profile=None, errors=False)


def config_for(corpus):
    config = experiment.get_config()
    config.data.source = f"folder:{corpus}"
    config.data.tokenizer = "bpe:280"
    config.data.sequence_length = 16
    config.data.validation_fraction = 0.2
    config.batch_size = 8
    config.tokens = 6 * 128
    config.policy = "w8"
    config.model.width = 16
    config.model.layers = 1
    config.mesh.fsdp = 2
    config.evaluation_batches = 4
    return config.to_dict()


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A finished run on eight devices, and the folder of its text."""
    folder = tmp_path_factory.mktemp("runs")
    saving = Saving(every=4, keep=2, keep_every=0)
    training.run(config_for(corpus), folder / "run", folder / "data", saving, WATCHING)
    return folder / "run", folder / "data"


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_opens_as_it_was_trained(run, corpus):
    workdir, data_dir = run
    before = files(workdir)
    found = open_checkpoint(workdir)
    assert files(workdir) == before
    trained, lab = Experiment.from_config(config_for(corpus)), Lab(data_dir)
    assert (found.config, found.policy) == (trained.model, trained.policy)
    assert found.experiment.config_hash == trained.config_hash
    dataset = lab.dataset(trained)
    assert found.data_fingerprint == dataset.fingerprint
    assert found.tokenizer(data_dir) == dataset.tokenizer
    assert found.sequence_length == 16
    losses = lab.evaluate(trained, found.params, found.policy)  # on the mesh again
    row = next(read_rows(workdir).itertuples())
    assert found.row.run_id == row.run_id
    np.testing.assert_allclose(losses.mean(), row.loss, rtol=1e-6)


def test_what_is_no_run_is_named(run, tmp_path):
    workdir, _ = run
    with pytest.raises(ValueError, match=r"'bpe:280' was learned from text .* expected the run's"):
        open_checkpoint(workdir).tokenizer(tmp_path)
    with pytest.raises(ValueError, match="holds no model: expected the workdir of"):
        open_checkpoint(tmp_path)
    config = json.loads((workdir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "seed": 1}))
    with pytest.raises(ValueError, match=r"no state after its last step \(6\)"):
        open_checkpoint(tmp_path)
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    with pytest.raises(ValueError, match=r"6 belongs to another run than config\.json says"):
        open_checkpoint(tmp_path)


def test_a_converted_model_opens(tmp_path):
    shape = Shape(layers=1)
    source = write_folder(tmp_path / "source", shape, weights(shape, tied=False))
    with pytest.raises(ValueError, match=r"python -m launch\.pretrained --source"):
        open_checkpoint(source)
    model = pretrained.read(source)
    pretrained.write(tmp_path / "model", model)
    found = open_checkpoint(tmp_path / "model")
    assert found.config == model.description.config
    jax.tree.map(np.testing.assert_array_equal, found.params, model.params)
    assert (found.sequence_length, found.row, str(found.policy)) == (shape.context, None, "none")
    assert found.identity == model.description.identity
    assert found.tokenizer_name == str(tmp_path / "model" / "tokenizer.json")
