"""Experiments with experts: their keys, a run from its config to its checkpoint, and its cost."""

import json

import jax
import pytest

from configs import experiment, finetune, moe, tiny
from launch import origin, training
from launch.ahead import compilation, fitting
from launch.ahead.compilation import Compiled, compile_step
from launch.checkpoints import open_checkpoint
from launch.experiment import Experiment
from launch.runner import Saving, Watching
from launch.sweeps import lanes
from launch.sweeps.plan import experiments
from models.task import matrix_params
from qat.sweep import Sweep, axis, product
from qat.training.flops import train_flops
from qat.training.results import hash_of, read_rows

KEYS = ("experts", "experts_per_token", "capacity_factor", "balance")


def small(corpus="", **changes):
    config = experiment.get_config()
    config.data.source = f"folder:{corpus}"
    config.data.sequence_length = 16
    config.data.validation_fraction = 0.2
    config.batch_size = 8
    config.tokens = 1280
    config.model.width = 8
    config.model.layers = 1
    config.model.experts = 4
    config.evaluation_batches = 4
    config.update_from_flattened_dict(changes)
    return config.to_dict()


def test_a_dense_experiment_is_the_one_that_knew_of_no_experts():
    """Its hash is that of before, and a config of then opens."""
    config = tiny.get_config().to_dict()
    config["model"] = {key: value for key, value in config["model"].items() if key not in KEYS}
    before = Experiment.from_config(config)
    plain = {key: value for key, value in config.items() if key not in ("init", "teacher")}
    assert before.config_hash == hash_of(plain) == "93f5e68bcbb7"
    now = Experiment.from_config(tiny.get_config().to_dict())
    assert (now.config_hash, now.shape) == (before.config_hash, before.shape)
    other = moe.get_config()
    other.model.experts = 0
    other.data.sequence_length, other.tokens = 64, 1_000_000
    assert Experiment.from_config(other.to_dict()).config_hash == now.config_hash


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    saving, watching = Saving(0, 1, 0), Watching(False, None, None, errors=False)
    assert training.run(small(corpus), folder / "run", folder / "data", saving, watching) == 0
    return folder / "run"


def test_a_run_with_experts_is_a_row_and_a_checkpoint(run):
    row, found = read_rows(run).iloc[0], open_checkpoint(run)
    width, gated = 8, 24
    attention, norms = width * 16 + width * width, 3 * width + 4 * gated + width
    assert row.params == attention + 4 * (3 * width * gated) + 4 * width + norms
    met = attention + 3 * width * gated + 4 * width + 256 * width
    assert matrix_params(found.config) == met
    assert row.flops == train_flops(1280, met, 1, width, 16)
    assert row.status == "ok"
    assert found.config.experts == 4
    assert found.params["blocks"]["mlp"]["down"]["kernel"].shape == (1, 4, gated, width)
    assert json.loads((run / "config.json").read_text())["model"]["capacity_factor"] == 1.25


def test_a_run_that_begins_with_it_has_its_experts(run):
    config = finetune.get_config().to_dict() | {"init": str(run), "policy": "w2"}
    model = Experiment.from_config(origin.resolved(config)).model
    assert (model.experts, model.experts_per_token) == (4, 1)
    dense = small(**{"model.experts": 0}) | {"init": str(run)}
    with pytest.raises(ValueError, match="experts is 4 there, 0 here"):
        origin.check(Experiment.from_config(origin.resolved(dense)), "any")


def test_a_sweep_over_experts_has_runs_that_train_together(corpus):
    grid = product(axis("model.experts", (0, 4)), axis("policy", ("none", "w2")))
    sweep = Sweep(small(corpus), grid, ("rtn", "gptq"), ("int3/channel",))
    runs = {str(index): each for index, each in enumerate(experiments(sweep))}
    assert [each.model.experts for each in runs.values()] == [0, 0, 4, 4]
    assert lanes.groups(runs, 8) == [("0", "1"), ("2", "3")]
    config = sweep.config | {"policy": "amxfp4"}  # blocks of 32; an expert's F is 24
    wrong = Sweep(config, axis("model.width", (32,)), (), ())
    config["model"] = config["model"] | {"mlp_width": 24}
    with pytest.raises(ValueError, match=r"layer blocks/mlp/down: .* shape \(1, 5, 24\)"):
        experiments(wrong)


def test_a_step_with_experts_compiles_for_a_mesh_and_takes_more_memory_by_the_estimate():
    changes = {"model.width": 16, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    changes["model.kv_heads"] = 2
    sparse, dense = (
        Experiment.from_config(small(**changes, **e)) for e in ({}, {"model.experts": 0})
    )
    compiled = compile_step(sparse, jax.devices(), say=lambda line: None)
    assert isinstance(compiled, Compiled)
    assert not compiled.census.unknown_loops
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    state, dense_state = (compilation.abstract_state(e, jax.devices())[0] for e in (sparse, dense))
    needs = fitting.estimate(sparse, state, mesh, jax.devices())
    less = fitting.estimate(dense, dense_state, mesh, jax.devices())
    assert needs[0] > 1.5 * less[0]
    assert needs[1] > less[1]
