"""Compiling ahead of time: on virtual CPU devices everywhere, for TPUs where their compiler is."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import experiment
from launch.ahead import compilation, fitting, topologies
from launch.ahead.compilation import Compiled, Memory, TooLarge, compile_step
from launch.ahead.report import Report, as_json, as_text
from launch.experiment import Experiment
from launch.lab import Lab
from models.task import constants_for, matrix_params
from qat.training.census import Census, Collectives, Dots
from qat.training.devices import DEVICES
from qat.training.flops import train_flops
from qat.training.sharding import MESH_AXES

ROOT = Path(__file__).parents[2]
LIBTPU = importlib.util.find_spec("libtpu") is not None


def small(**changes):
    config = experiment.get_config()
    config.model.vocabulary = 512
    config.model.width = 64
    config.model.layers = 3
    config.batch_size = 16
    config.mesh.fsdp = 4
    config.update_from_flattened_dict(changes)
    return Experiment.from_config(config.to_dict())


def analytic(run):
    tokens = run.config["batch_size"] * run.config["data"]["sequence_length"]
    model, length = run.model, run.config["data"]["sequence_length"]
    return train_flops(tokens, matrix_params(model), model.layers, model.width, length)


def held_by_one(tree, placed):
    """Bytes that the first device holds of arrays of these shapes."""
    arrays = jax.tree.map(lambda x, s: jax.device_put(np.zeros(x.shape, x.dtype), s), tree, placed)
    return sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(arrays))


@pytest.fixture(scope="module")
def compiled():
    return compile_step(small(), jax.devices())


def test_the_program_does_the_analytic_flops(compiled):
    """Loops, batched products and their gradients included, on eight devices together."""
    assert 8 * compiled.census.flops == pytest.approx(analytic(small()), rel=0.01)
    assert not compiled.census.unknown_loops


def test_the_arguments_are_what_training_would_pass(compiled):
    run = small()
    programs = Lab(Path(), jax.devices()).programs(run)
    state = jax.eval_shape(programs.init_state, jnp.uint32(0))
    passed = held_by_one(state, programs.state_sharding)
    passed += held_by_one(jnp.zeros((16, 65), jnp.int32), programs.batch_sharding)
    constants = constants_for(run.model, run.policy), run.schedule
    passed += sum(jnp.asarray(leaf).nbytes for leaf in jax.tree.leaves(constants))
    assert compiled.memory.arguments == passed


@pytest.mark.parametrize("sizes", [(2, 4, 1), (1, 4, 2)])
def test_the_estimate_of_the_state_is_exact(sizes):
    mesh = dict(zip(MESH_AXES, sizes, strict=True))
    run = fitting.with_mesh(small(**{"model.kv_heads": 2}), mesh)
    state, placed = compilation.abstract_state(run, jax.devices())
    assert fitting.estimate(run, state, mesh, jax.devices())[0] == held_by_one(state, placed)


def test_more_devices_and_recomputation_need_less_by_the_estimate():
    def temporaries(mesh=(2, 4, 1), **changes):
        run = small(**{"model.kv_heads": 2, **changes})
        state, _ = compilation.abstract_state(run, jax.devices())
        sizes = dict(zip(MESH_AXES, mesh, strict=True))
        return fitting.estimate(run, state, sizes, jax.devices())[1]

    assert temporaries((2, 2, 2)) > temporaries() > temporaries(accumulation=2)
    kept = [temporaries(**{"model.remat": remat}) for remat in ("none", "dots", "full")]
    assert kept == sorted(kept, reverse=True)


def test_meshes_come_nearest_first_and_only_those_that_divide():
    """One key-value head cannot be split over tensor, and the asked mesh is not an answer."""
    run = small()
    state, _ = compilation.abstract_state(run, jax.devices())

    def meshes(limit):
        asked = dict(zip(MESH_AXES, (2, 4, 1), strict=True))
        return list(fitting.fitting_meshes(run, state, jax.devices(), asked, limit))

    found = [tuple(mesh.values()) for mesh in meshes(1e12)]
    assert set(found[:2]) == {(4, 2, 1), (1, 8, 1)}
    assert found[2:] == [(8, 1, 1)]
    whole = {"data": 1, "fsdp": 8, "tensor": 1}
    least = sum(fitting.estimate(run, state, whole, jax.devices()))
    assert meshes(least) == [whole]
    assert not meshes(least - 1)


MEMORY = Memory(6 * 2**30, 6 * 2**30, 5 * 2**30, 8 * 2**30, 2**25, 12 * 2**30)
CENSUS = Census(
    (Dots("bf16", "bf16", 10, 3e12), Dots("s8", "s8", 5, 1e12)),
    (Collectives("all-gather", 4, 7, 2**20),),
    ("while.3",),
)


def test_the_search_takes_the_first_mesh_that_compiles_and_larger_slices_next(monkeypatch):
    tried = []

    def compile_step(run, devices, *, fast, say):
        tried.append((len(devices), tuple(run.config["mesh"].values())))
        fits = len(tried) == 3
        return Compiled(1.0, MEMORY, CENSUS) if fits else TooLarge(1.0, 2**31, 2**30)

    slices = {"v5e:2x2": jax.devices()[:4], "v5e:2x4": jax.devices()}
    monkeypatch.setattr(fitting, "compile_step", compile_step)
    monkeypatch.setattr(fitting, "devices_of", slices.__getitem__)
    run = small(**{"mesh.fsdp": 1, "batch_size": 8})
    fit = fitting.nearest_fit(run, "v5e:2x2", TooLarge(1.0, 2**31, 2**31), say=lambda line: None)
    assert [devices for devices, _ in tried] == [4, 4, 8]
    assert all(mesh[1] > 1 for devices, mesh in tried if devices == 4)  # in larger shares
    assert (fit.topology, tuple(fit.mesh.values())) == ("v5e:2x4", tried[-1][1])


def test_the_search_goes_through_all_larger_slices(monkeypatch):
    asked = []

    def devices_of(name):
        asked.append(name)
        return jax.devices()[:4]

    monkeypatch.setattr(fitting, "devices_of", devices_of)
    run = small(**{"mesh.fsdp": 1, "batch_size": 8})
    assert fitting.nearest_fit(run, "v5e:2x2", TooLarge(1.0, 2**31, 1)) is None  # a byte
    assert sorted(set(asked)) == sorted(name for name in topologies.NAMES if name[:3] == "v5e")


def report(outcome, **changes):
    mesh = {"data": 2, "fsdp": 2, "tensor": 1}
    given = Report(small(), "v5e:2x2", mesh, "TPU v5 lite", DEVICES["TPU v5e"], outcome, False)
    return dataclasses.replace(given, **changes)


def test_the_report_says_what_it_found():
    text = as_text(report(Compiled(12.0, MEMORY, CENSUS)))
    for line in (
        r"v5e:2x2: 4 devices 'TPU v5 lite', mesh data=2 × fsdp=2 × tensor=1",
        r"peak +12.00 GiB +75% of 16.00 GiB",
        r"outputs +6.00 GiB +5.00 GiB of them in place of arguments",
        r"s8 × s8 +5 +1.000e\+12 +25.0%",
        r"at most 8 bits: 25.0% of the FLOPs",
        r"all-gather +4 +7 +1.00 MiB",
        r"counted once, since their turns are not known: while.3",
        r"program's ideal +0.018 s",  # 3e12 at 197 and 1e12 at 393 TFLOP/s
        r"It fits\.",
    ):
        assert re.search(line, text), line
    assert "not reliable" not in text
    fast = as_text(report(Compiled(12.0, MEMORY, CENSUS), fast=True))
    assert re.search(r"temporaries .*not reliable with --fast", fast)


def test_the_report_of_what_does_not_fit_names_what_does():
    fit = fitting.Fit("v5e:2x4", {"data": 1, "fsdp": 8, "tensor": 1}, Compiled(1, MEMORY, CENSUS))
    outcome = TooLarge(3.0, 20 * 2**30, 16 * 2**30)
    text = as_text(report(outcome, fit=fit))
    assert "It does not fit: 20.00 GiB a device needed, 16.00 GiB there." in text
    flags = "--config.mesh.data=1 --config.mesh.fsdp=8 --config.mesh.tensor=1"
    assert f"--topology=v5e:2x4 {flags}" in text
    assert "found to fit" in as_text(report(outcome))


def test_the_report_is_also_json():
    written = json.loads(json.dumps(as_json(report(Compiled(12.0, MEMORY, CENSUS)))))
    assert written["fits"] and written["memory"]["peak"] == MEMORY.peak
    assert written["low_precision_share"] == 0.25
    assert written["census"]["collectives"][0]["kind"] == "all-gather"
    assert written["analytic_flops"] == analytic(small())
    assert not json.loads(json.dumps(as_json(report(TooLarge(1.0, 2, 1)))))["fits"]


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (20.50G) exceeds available HBM (15.75G).",
    ],
)
def test_a_lack_of_memory_is_read_from_the_compilers_words(message):
    shortage = compilation._shortage(jax.errors.JaxRuntimeError(message))
    assert shortage == (20.5 * 2**30, 15.75 * 2**30)


def test_another_complaint_of_the_compiler_is_bad_input():
    with pytest.raises(ValueError, match="the compiler refuses this step: UNIMPLEMENTED: s3"):
        compilation._shortage(jax.errors.JaxRuntimeError("UNIMPLEMENTED: s3"))


def test_slices_grow_by_two_and_unknown_ones_are_refused():
    def chips(name):
        return math.prod(int(size) for size in name.split(":")[1].split("x"))

    for name in topologies.NAMES:
        topologies.check_name(name)
        for index, bigger in enumerate(topologies.larger(name), start=1):
            assert chips(bigger) == 2**index * chips(name)
    assert topologies.larger("v5e:8x8") == ["v5e:8x16", "v5e:16x16"]
    with pytest.raises(ValueError, match=r"unknown topology 'v5x:4x4'.*nearest is 'v5e:4x4'"):
        topologies.check_name("v5x:4x4")
    with pytest.raises(
        ValueError, match=r"'v5p:5x5': expected one of v5p:[^:;]*; nearest is 'v5p:"
    ):
        topologies.check_name("v5p:5x5")


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    device_kind: str
    coords: tuple[int, int, int]


@pytest.mark.parametrize(
    ("kind", "cores", "share"),
    [("TPU v4", 1, 1), ("TPU v4", 2, 0.5), ("TPU7x", 2, 1), ("TPU7x", 1, 2)],
)
def test_devices_that_are_cores_have_their_share_of_the_chip(kind, cores, share):
    devices = [FakeDevice(kind, (x, 0, 0)) for x in range(4) for _ in range(cores)]
    found, known = topologies.limits(devices), DEVICES[kind]
    assert found.bfloat16 == share * known.bfloat16
    assert found.memory == share * known.memory
    assert found.per_chip == cores


def test_an_unknown_kind_of_device_has_no_limits():
    assert topologies.limits([FakeDevice("TPU v99", (0, 0, 0))]) is None


def test_a_missing_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"pip install 'jax\[tpu\]=={jax.__version__}'"):
        topologies.devices_of("v5e:2x2")


def aot(*arguments, config="tiny"):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-m", "launch.aot", f"--config=configs/{config}.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def test_the_program_refuses_an_unknown_topology_in_one_line():
    result = aot("--topology=v5p:5x5")
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown topology 'v5p:5x5'")
    assert len(result.stderr.splitlines()) == 1


needs_tpu_compiler = pytest.mark.skipif(not LIBTPU, reason="libtpu is not installed (extra aot)")


@pytest.mark.tpu_aot
@needs_tpu_compiler
def test_native_products_stay_in_eight_bits_on_tpu(tmp_path):
    """The forward products of the blocks are int8; head, attention and gradients are not."""
    out = tmp_path / "new" / "report.json"
    policy = "--config.policy=w8a8, native"
    sizes = ("--config.model.dtype=bfloat16", "--config.model.width=256", "--config.mesh.fsdp=4")
    result = aot("--topology=v5e:2x2", "--fast", f"--json={out}", policy, *sizes)
    assert result.returncode == 0, result.stderr
    assert "It fits." in result.stdout
    found = json.loads(out.read_text())
    model = Experiment.from_config(found["config"]).model
    forward = 2 * model.kernel_params * 32 * 64 / 4
    low = sum(d["flops"] for d in found["census"]["dots"] if (d["lhs"], d["rhs"]) == ("s8", "s8"))
    assert low == pytest.approx(forward, rel=0.01)
    assert found["program_flops_per_device"] * 4 == pytest.approx(found["analytic_flops"], rel=0.02)
    again = aot("--topology=v5e:2x2", f"--json={out}")
    assert again.returncode == 2 and "exists already" in again.stderr


@pytest.mark.tpu_aot
@needs_tpu_compiler
def test_what_does_not_fit_on_tpu_is_reported_with_a_mesh_that_does():
    """Embedding and head of 3 million ids take 20 GiB with their moments, copied or in shares."""
    sizes = ("--config.model.vocabulary=3200000", "--config.model.width=256")
    batch = ("--config.batch_size=4", "--config.data.sequence_length=32")
    result = aot("--topology=v5e:2x2", "--fast", *sizes, *batch, config="paper_30m")
    assert result.returncode == 4, result.stderr
    assert "It does not fit" in result.stdout
    assert re.search(r"--topology=v5e:2x2 .*--config\.mesh\.fsdp=[24]", result.stdout)
