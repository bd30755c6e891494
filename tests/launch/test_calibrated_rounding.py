"""GPTQ in the visit that trains a run, against the library on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat.ptq
from configs import experiment
from launch.experiment import Experiment
from launch.lab import Lab
from launch.sweeps.rounding import FOLDER, Rounding
from models.task import model_of
from qat.policy import Policy
from qat.sweep import Sweep
from qat.training.data import train_batches
from qat.training.results import rows_of


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A lab, an experiment with quantized activations, what it trained to, and its folder."""
    config = experiment.get_config()
    config.data.source = f"folder:{corpus}"
    config.data.sequence_length = 16
    config.data.validation_fraction = 0.2
    config.batch_size = 8
    config.tokens = 1280
    config.model.width = 8
    config.model.layers = 1
    config.evaluation_batches = 4
    config.policy = "a8"
    each = Experiment.from_config(config.to_dict())
    lab = Lab(tmp_path_factory.mktemp("data"), devices=jax.devices()[:1])
    result, _ = lab.train(each)
    return lab, each, result, tmp_path_factory.mktemp("run")


def looked(trained, folder, calibration=8):
    lab, each, result, _ = trained
    formats = ("int2/channel", "int3/channel")
    sweep = Sweep(each.config, ({},), ("rtn", "gptq"), formats, ptq_calibration=calibration)
    looks = Rounding(lab, each, folder, sweep)
    looks.look(each.schedule, result)
    return looks, {(row.ptq_method, row.ptq_quantizer): row for row in rows_of(folder / FOLDER)}


def test_rows_are_those_of_the_library(trained, tmp_path):
    lab, each, result, _ = trained
    looks, rows = looked(trained, tmp_path)
    assert len(rows) == 4
    assert not looks.is_due(each.schedule, each.schedule.total_steps)
    running = Policy.parse("a8")
    model = model_of(each.model, running, jax.tree.map(np.asarray, result.state.params))
    tokens = train_batches(lab.dataset(each), 8, seed=0).batch_at(0)
    quantized, _ = qat.ptq.quantize(
        model, "gptq", "int2/channel", [jnp.asarray(tokens[:, :-1])], "embed|head"
    )
    batches = lab.batches(each)[1]
    losses = []
    for step in range(each.config["evaluation_batches"]):
        text = jnp.asarray(batches.batch_at(step))
        found = jax.nn.log_softmax(quantized(text[:, :-1]))
        losses.append(-jnp.take_along_axis(found, text[:, 1:, None], axis=2).mean())
    row = rows["gptq", "int2/channel"]
    assert row.loss == pytest.approx(float(jnp.stack(losses).mean()), rel=1e-5)
    assert row.activation_format == "int8"
    assert row.ptq_calibration.startswith(f"{each.config['data']['source']}/train 8×16 ")
    assert rows["rtn", "int2/channel"].ptq_calibration == "none"
    assert row.loss != rows["rtn", "int2/channel"].loss
    assert row.status == "ok"


def test_too_little_text_is_a_failed_row_with_its_reason(trained, tmp_path):
    _, rows = looked(trained, tmp_path, calibration=1_000_000)
    assert rows["gptq", "int2/channel"].status == "failed"
    assert rows["rtn", "int2/channel"].status == "ok"
    assert (
        "ptq_calibration = 1000000: the training text has" in (tmp_path / "error.txt").read_text()
    )
