"""Quantizers and meshes that do not fit a model, found by its shapes alone."""

import contextlib
import re

import jax
import numpy as np
import pytest

from configs import experiment
from launch.experiment import Experiment
from launch.lab import Lab
from launch.sweeps import fitting
from launch.sweeps.fitting import Fitting
from launch.sweeps.plan import Plan, experiments
from models.task import constants_for
from qat.sweep import Sweep, axis, product


def run(**changes):
    config = experiment.get_config()
    config.model.layers = 1
    config.update(changes)
    return Experiment.from_config(config.to_dict())


@pytest.mark.parametrize(
    ("changes", "formats", "message"),
    [
        (
            {},
            ("int3/channel", "int4/block:32"),
            "int4/block:32 does not fit the weights of layer blocks/mlp/down: block size 32 does "
            "not divide axis 0 of an array of shape (88, 32); nearest that fits all layers is "
            "block:8",
        ),
        ({"policy": "w4g32"}, (), "does not fit the weights of layer blocks/mlp/down: "),
        ({"policy": "amxfp4"}, (), "mxfp4 does not fit the activations of layer blocks/mlp/down: "),
        ({"policy": "kvmxfp4"}, (), "fit the kv_cache of layer blocks/attention/cache: "),
        ({"policy": "w8a8, native"}, ("nf4/block:8",), "mode 'native' cannot run this policy"),
        ({"policy": "w8a8, gradients int8/block:32"}, (), "(32, 64, 2, 88); nearest is 22"),
        ({}, ("int4/channel/learned",), "expected scales that are not learned"),
        ({"mesh": {"fsdp": 64}}, (), "batch_size = 32 is not a multiple of accumulation × data"),
        ({"mesh": {"fsdp": 0}}, (), "fsdp=0"),
        ({"mesh": {"tensor": 4}}, (), "not a multiple of mesh axis tensor = 4"),
    ],
)
def test_what_does_not_fit_is_named_with_layer_and_shape(changes, formats, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Fitting(formats).check(run(**changes))


@pytest.mark.parametrize("policy", ["none", "w4a8kv4", "bitnet", "w8a8, native", "nothing"])
def test_what_fits_passes(policy):
    formats = ("int4/channel",) if "native" in policy else ("int3/block:8", "e2m1/block:8/e8m0")
    Fitting(formats).check(run(policy=policy, mesh={"fsdp": 2}))


@pytest.mark.parametrize(("policy", "fits"), [("w4g8", True), ("w4g32", False)])
def test_blocks_are_refused_as_the_programs_refuse_them(policy, fits, tmp_path):
    each = run(policy=policy, batch_size=8, model={"width": 16}, data={"sequence_length": 16})
    programs = Lab(tmp_path, jax.devices()[:1]).programs(each)
    params = jax.eval_shape(programs.init_state, np.uint32(0)).params
    arguments = (params, constants_for(each.model, each.policy), np.zeros((8, 17), np.int32))
    for attempt in (
        lambda: jax.eval_shape(programs.eval_step, *arguments),
        lambda: Fitting().check(each),
    ):
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="not divide"):
            attempt()


def test_a_model_is_traced_once_a_size(monkeypatch):
    traced = []
    trace = fitting._traced
    monkeypatch.setattr(fitting, "_traced", lambda run: traced.append(run.size) or trace(run))
    check = Fitting(("int2/channel",)).check
    for policy in ("none", "w4", "w4g8", "a8"):
        check(run(policy=policy))
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (
            axis("policy", ("w4", "w3", "w4a16")),
            "runs 1 and 3 of the grid are the same: policy=w4; ",
        ),
        (axis("policy", ("W4", "w4")), "runs 1 and 2 of the grid are the same"),
        (axis("tokens", (32_768, 32_769)), "tokens=32768; tokens=32769"),
        (axis("policy", ("none", "w4g32")), "run policy=w4g32: int4/block:32 does not fit"),
    ],
)
def test_a_grid_has_no_run_twice_and_none_that_does_not_fit(grid, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        experiments(Sweep(experiment.get_config().to_dict(), grid))


def test_other_spellings_leave_the_names_of_runs_alone(corpus, tmp_path):
    config = experiment.get_config()
    config.data.source = f"folder:{corpus}"
    config.data.sequence_length = 16
    config.data.validation_fraction = 0.2
    lab = Lab(tmp_path, jax.devices()[:1])
    sweep = Sweep(config.to_dict(), product(axis("policy", ("w4a16",)), axis("seed", (0, 1))))
    plan = Plan.of(sweep, lab)
    expected = [lab.run_id(Experiment.from_config(each)) for each in sweep.configs()]
    assert list(plan.runs) == expected
    assert plan.told(expected[1]) == f"run {expected[1]} (policy=w4a16, seed=1)"


def test_a_mesh_needs_its_devices():
    fitting.check_mesh(run(), 4)
    with pytest.raises(ValueError, match="needs 2 devices, there are 1"):
        fitting.check_mesh(run(mesh={"data": 1, "fsdp": 2}), 1)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("stdlb", ValueError, "nearest is 'stdlib'"),
        ("folder:/nope", FileNotFoundError, "/nope is not a folder"),
        ("jsonl:/nope.jsonl", FileNotFoundError, "does not exist"),
    ],
)
def test_text_that_cannot_be_there_is_named(source, error, message):
    with pytest.raises(error, match=message):
        fitting.check_source(run(data={"source": source}))
    fitting.check_source(run(data={"source": "tfds:c4/en"}))  # is looked for by who trains
    fitting.check_source(run())
