"""The configs of real sizes: their numbers, their docstrings, and that meshes can hold them."""

import importlib
import math
import re

import jax
import jax.numpy as jnp
import pytest

from configs import paper
from launch.ahead.compilation import abstract_state
from launch.ahead.fitting import with_mesh
from launch.experiment import Experiment
from models.task import matrix_params
from qat.training.devices import peak
from qat.training.flops import train_flops

SIZES = {"paper_30m": 30e6, "paper_60m": 60e6, "paper_110m": 110e6, "paper_220m": 220e6}
SIZES["paper_1700m"] = 1.7e9
ALL = [*SIZES, "bitnet", "fp8"]


def experiment(name):
    module = importlib.import_module(f"configs.{name}")
    return Experiment.from_config(module.get_config().to_dict()), module.__doc__


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_a_paper_config_has_the_papers_size_and_schedule(name, size):
    run, _ = experiment(name)
    assert run.model.params == pytest.approx(size, rel=0.03)
    assert run.model.vocabulary >= 50_280
    assert run.tokens == pytest.approx(26e9, rel=1e-4)
    assert run.tokens == run.schedule.total_steps * 256 * 1024
    assert run.scaling.depth == run.model.layers / paper.BASE_LAYERS
    assert run.model.residual_scale == pytest.approx(run.scaling.depth**-0.5)
    assert run.config["learning_rate"] == 6e-4


def test_the_smallest_model_is_the_base_of_the_learning_rate():
    run, _ = experiment("paper_30m")
    assert run.scaling.depth == 1


@pytest.mark.parametrize("name", ALL)
def test_the_docstring_states_the_cost(name):
    run, text = experiment(name)
    model = run.model
    flops = train_flops(run.tokens, matrix_params(model), model.layers, model.width, 1024)
    stated = re.search(r"Cost: (\S+) FLOPs, (\d+) device-hours of (\S+ \S+) .*its (\w+) peak", text)
    dtype = {"bfloat16": "bfloat16", "fp8": "float8_e4m3fn"}[stated[4]]
    assert float(stated[1]) == pytest.approx(flops, rel=0.04)
    assert float(stated[2]) == pytest.approx(
        flops / (0.4 * peak(stated[3], dtype)) / 3600, rel=0.02
    )
    assert f"--config=configs/{name}.py" in text


@pytest.mark.parametrize("name", SIZES)
def test_the_docstring_states_what_the_papers_law_gives(name):
    """Table 2 of the paper: A N^-α + B D^-β + E."""
    run, text = experiment(name)
    loss = 4.299e3 * run.model.params**-0.4965 + 1.806e4 * run.tokens**-0.4965 + 2.7648
    assert float(re.search(r"law gives (\S+) nats", text)[1]) == pytest.approx(loss, abs=0.01)


@pytest.mark.parametrize("name", ALL)
def test_a_mesh_holds_every_matrix_in_shares(name):
    """The state is that of 12 bytes a parameter, and 2 × 2 devices share all but the vectors."""
    run, _ = experiment(name)
    run = with_mesh(run, {"data": 2, "fsdp": 2, "tensor": 2})
    state, placed = abstract_state(run, jax.devices())
    leaves = list(zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True))
    total = sum(x.size for x, _ in leaves)
    held = sum(math.prod(s.shard_shape(x.shape)) for x, s in leaves)
    embeddings = 2 * run.model.vocabulary * run.model.width
    assert total == 3 * (run.model.params + embeddings) + 3  # two moments; two counters, a seed
    assert all(x.dtype == jnp.float32 for x, _ in leaves if x.ndim)
    assert total / 4 < held < 1.01 * total / 4
