"""The benchmark: turns that are fair, ratios that drift cannot move, rows for what is missing."""

import dataclasses
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from launch import timing
from launch.benchmarks import layers, models, training
from launch.benchmarks.contenders import OURS, SCHEMES
from launch.benchmarks.others import AQT, QWIX

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(monkeypatch):
    """Models of the same structure that compile and run in no time."""
    sizes = {"LAYERS": 2, "WIDTH": 16, "HEADS": 2, "ROWS": 8, "BATCH": 2, "TOKENS": 4}
    for name, size in sizes.items():
        monkeypatch.setattr(models, name, size)
    # All caches hold other tests' programs too.
    monkeypatch.setattr(jax, "clear_caches", layers.train_step.clear_cache)
    batches = [workload.batch for workload in models.WORKLOADS.values()]
    for batch in batches:
        batch.cache_clear()
    yield
    for batch in batches:
        batch.cache_clear()


@pytest.mark.parametrize("programs", [1, 2, 5, 8])
def test_every_program_takes_every_turn_once(programs):
    orders = [timing.order(index, programs) for index in range(programs)]
    assert all(sorted(order) == list(range(programs)) for order in orders)
    assert all(sorted(turn) == list(range(programs)) for turn in zip(*orders, strict=True))


@pytest.mark.parametrize("programs", [2, 8])
def test_every_program_follows_every_other_once(programs):
    orders = [timing.order(index, programs) for index in range(programs)]
    pairs = [pair for order in orders for pair in itertools.pairwise(order)]
    assert len(set(pairs)) == len(pairs) == programs * (programs - 1)


class Machine:
    """A clock that moves when a program runs, on a machine that gets slower and slower."""

    def __init__(self):
        self.now, self.slowness, self.calls = 0.0, 1.0, []

    def program(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds * self.slowness

        return call

    def slow_down(self):
        self.slowness *= 1.5


def test_drift_and_warm_up_move_no_ratio():
    machine = Machine()
    programs = [machine.program("plain", 2.0), machine.program("quantized", 3.0)]
    seconds_RP = timing.take_turns(programs, 5, machine.slow_down, clock=lambda: machine.now)
    assert machine.calls[:6] == ["plain"] * timing.WARM_UP + ["quantized"] * timing.WARM_UP
    assert len(machine.calls) == 2 * (timing.WARM_UP + 5)
    np.testing.assert_allclose(seconds_RP[:, 0], 2.0 * 1.5 ** np.arange(5))
    ratio = timing.ratio(seconds_RP[:, 1], seconds_RP[:, 0])
    np.testing.assert_allclose(dataclasses.astuple(ratio), 1.5)


def test_a_ratio_is_the_median_of_rounds_with_quartiles():
    seconds_R = np.array([1.0, 2.0, 3.0, 4.0, 100.0])
    assert timing.ratio(seconds_R, np.ones(5)) == timing.Ratio(3.0, 2.0, 4.0)


def test_a_table_is_aligned():
    assert timing.table(("name", "n"), [("a", "10"), ("longer", "-")], text_columns=1) == (
        "name     n\n------  --\na       10\nlonger   -"
    )


def test_compiles_are_counted_by_name():
    def triple(x):
        return 3 * x

    with timing.counting_compiles() as compiled:
        for size in (2, 3, 3):
            jax.jit(triple)(np.ones(size, np.float32))
    jax.jit(triple)(np.ones(4, np.float32))  # outside
    assert compiled["triple"] == 2


# Lowering ahead of time rebuilds pytrees of `ArgInfo`, which no annotation expects.
@pytest.mark.usefixtures("small", "unchecked_annotations")
def test_missing_and_broken_libraries_have_rows_with_reasons(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no such kernel\nand much more")

    missing = dataclasses.replace(QWIX, package="no_such_package")
    failing = dataclasses.replace(AQT, package="qat", build=broken, weights_of_bits=broken)
    monkeypatch.setattr(layers, "LIBRARIES", (OURS, missing, failing))
    rows = layers.run(["mlp"], ["none", "w4a8"], rounds=2)
    found = {(row["library"], row["scheme"]): row for row in rows}
    assert set(found) == {
        ("flax nnx", "plain"),
        ("flax linen", "plain"),
        ("ours", "none"),
        *((library, "w4a8") for library in ("ours", "qwix", "aqt")),
        *((library, "int2 to int8") for library in ("ours", "qwix", "aqt")),
    }
    assert found["flax nnx", "plain"]["step_ratio"] == 1
    assert found["ours", "w4a8"]["step_ratio_low"] <= found["ours", "w4a8"]["step_ratio"]
    assert found["ours", "none"]["first_loss"] != found["ours", "w4a8"]["first_loss"]
    assert found["ours", "int2 to int8"]["compiles"] == 1
    assert "not installed" in found["qwix", "w4a8"]["note"]
    assert "step_ratio" not in found["qwix", "w4a8"]
    assert found["aqt", "w4a8"]["note"] == "RuntimeError: no such kernel"
    printed = capsys.readouterr().out
    assert "qwix: not installed" in printed
    assert "aqt, w4a8: RuntimeError: no such kernel" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["w4a8", "qwix", "-", "-", "-", "-", "-"] in lines


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_both_apis_compute_the_same_model(small, name):
    workload = models.WORKLOADS[name]
    inputs, targets = workload.batch()
    model = workload.nnx(nnx.Linear)
    params = linen_params(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    of_linen = workload.linen(None).apply({"params": params}, inputs)
    np.testing.assert_allclose(of_linen, model(inputs), rtol=1e-5, atol=1e-6)
    assert np.isfinite(workload.loss(of_linen, targets))


def linen_params(params):
    """The parameters of an NNX model under the names of its Linen twin."""
    if "layers" in params:
        return {f"dense_{index}": dense for index, dense in params["layers"].items()}
    blocks = {
        f"block_{index}": {
            **{name: block[name] for name in ("qkv", "out", "up", "down")},
            **{f"LayerNorm_{norm}": value for norm, value in block["norms"].items()},
        }
        for index, block in params["blocks"].items()
    }
    return {
        "Embed_0": params["embed"],
        "LayerNorm_0": params["norm"],
        "head": params["head"],
        **blocks,
    }


@pytest.mark.usefixtures("small", "unchecked_annotations")
@pytest.mark.filterwarnings("default")  # theirs
@pytest.mark.parametrize("library", [QWIX, AQT], ids=lambda library: library.name)
def test_other_libraries_train_where_they_are_installed(library, monkeypatch):
    if importlib.util.find_spec(library.package) is None:
        pytest.skip(f"{library.package} is not installed")
    monkeypatch.setattr(layers, "LIBRARIES", (library,))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        rows = layers.run(["mlp"], ["w8a8"], rounds=1)
    assert [row["note"] for row in rows] == [""] * len(rows)
    assert rows[-1]["compiles"] == 7


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "sr-element"])
def test_we_have_every_scheme(small, scheme):
    OURS.build(models.WORKLOADS["mlp"], scheme)


def test_fewer_bits_take_less_memory(small):
    workload = models.WORKLOADS["mlp"]
    sizes = [OURS.build(workload, f"w{bits}a8").weight_bytes() for bits in (3, 4, 8)]
    kernels, channels = 2 * 16 * 16, 2 * 16
    assert sizes == [kernels * bits // 8 + 4 * channels for bits in (3, 4, 8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json={rows}"], "--json=.* exists already"),
        (
            ["--suite=training", "--scheme=sr"],
            "--scheme says nothing to --suite=training: .*layers",
        ),
        (["--suite=sweep", "--rounds=3"], "--rounds says nothing .*: expected layers or training"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([]))
    result = subprocess.run(
        [sys.executable, "-m", "launch.benchmark", *(each.format(rows=rows) for each in arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2
    assert re.match(f"error: {message}", result.stderr)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_training_is_compared_with_the_matrix_product(monkeypatch, capsys):
    monkeypatch.setattr(training, "SHAPES", {"tiny": training._shape(16, 1, 2, 1, 2, 8)})
    monkeypatch.setattr(training, "MATRIX", 64)
    yardstick, *rows = training.run(["tiny"], rounds=2)
    assert (yardstick["share_of_product"], yardstick["ratio_to_plain"]) == (1, 1)
    assert [row["policy"] for row in rows] == ["no policy", "none", "w8a8"]
    plain = rows[0]
    assert plain["ratio_to_plain"] == 1
    model = training.SHAPES["tiny"].model
    work = 6 * 2 * 8 * (model.kernel_params + 16 * 256) + 3 * 4 * 16 * 8 * 2 * 8
    assert plain["flops"] == work
    assert plain["gflops_per_s"] == pytest.approx(work / plain["ms"] / 1e6)
    assert "of product" in capsys.readouterr().out
