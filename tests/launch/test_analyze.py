"""An analysis of trained runs: its numbers, going on after a stop, what is refused."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from configs import experiment
from launch import training
from launch.curvature import analysis, choice, driving, point
from launch.curvature.analysis import Analysis, Settings
from launch.curvature.point import Point, basis_of, batches_of
from launch.curvature.rows import ExpansionRow, SpectrumRow, saved
from launch.experiment import Experiment
from launch.lab import Lab
from launch.rounding import driving as rounding
from launch.runner import Saving, Watching
from launch.sweeps.rounding import Rounding
from launch.timing import counting_compiles
from qat.analysis import sharpness
from qat.sweep import Sweep, axis
from qat.training.results import rows_of

ROOT = Path(__file__).parents[2]
FORMATS = ("int3/channel", "int8/channel")
SETTINGS = Settings(
    expansion_sequences=16, spectrum_sequences=4, probes=4, eigenvalues=2, products=12
)


def config_of(corpus, **changes):
    config = experiment.get_config()
    config.data.source = f"folder:{corpus}"
    config.data.sequence_length = 16
    config.data.validation_fraction = 0.2
    config.batch_size = 8
    config.tokens = 128 * 128
    config.learning_rate = 1e-2
    config.model.width = 16
    config.model.layers = 1
    config.evaluation_batches = 5
    config.mesh.data = 1
    config.update(changes)
    return config.to_dict()


@pytest.fixture(scope="module")
def place(corpus, tmp_path_factory):
    """A sweep's workdir of two unquantized runs and a quantized one, rounded as a sweep does it."""
    folder = tmp_path_factory.mktemp("analyze")
    lab, watching = Lab(folder / "data", jax.devices()[:1]), Watching(False, None, None, False)
    for name, changes in {"a": {}, "b": {"seed": 1}, "c": {"policy": "w3"}}.items():
        config = config_of(corpus, **changes)
        sweep = Sweep(config, axis("seed", (config["seed"],)), ("rtn",), FORMATS)
        run, workdir = Experiment.from_config(config), folder / "sweep" / "runs" / name
        looks = Rounding(lab, run, workdir, sweep)
        training.go_on(lab, run, workdir, Saving(0, 1, 0), watching, lambda: False, looks)
    return folder


@pytest.fixture
def analyze(place, tmp_path):
    """Runs the program; returns its tables."""

    def analyze(*checkpoints, settings=SETTINGS, **options):
        asked = rounding.Options(
            checkpoint=Path(),
            workdir=tmp_path / "out",
            data_dir=place / "data",
            **{"formats": FORMATS, **options},
        )
        names = tuple(str(place / "sweep" / each) for each in checkpoints or ("runs/a",))
        driving.run(driving.Options(names, asked, settings))
        return [pd.read_csv(tmp_path / "out" / f"{name}.csv") for name in ("spectra", "expansions")]

    return analyze


def of(rows, **values):
    (found,) = [row for row in rows.to_dict("records") if values.items() <= row.items()]
    return found


def test_the_true_cost_is_the_sweeps_and_is_what_the_expansion_adds_up_to(analyze, place, tmp_path):
    settings = dataclasses.replace(SETTINGS, expansion_sequences=40, by_tensor=True)
    spectra, expansions = analyze(settings=settings)
    (trained,) = rows_of(place / "sweep" / "runs" / "a")
    rows = rows_of(place / "sweep" / "runs" / "a" / "ptq")
    assert len(rows) == len(expansions) == len(FORMATS)
    for row in rows:
        found = of(expansions, ptq_quantizer=row.ptq_quantizer)
        assert found["ptq_delta"] == pytest.approx(row.ptq_delta, abs=2e-6)
        assert found["ptq_delta_se"] == pytest.approx(row.ptq_delta_se, rel=1e-2)
        assert found["change"] == pytest.approx(row.ptq_delta, abs=2e-6)  # of the same sequences
        assert (found["ptq_bits"], found["ptq_format"]) == (row.ptq_bits, row.ptq_format)
        assert (found["run_id"], found["status"], found["basis"]) == (row.run_id, "ok", "none")
        parts = found["linear"] + found["quadratic"] + found["remaining"]
        assert parts == pytest.approx(found["change"], abs=1e-9)
    int8, int3 = (of(expansions, ptq_format=name) for name in ("int8", "int3"))
    assert abs(int8["remaining"]) < 0.02 * int8["quadratic"]
    assert int3["squared_norm"] > 100 * int8["squared_norm"]
    tensors = [name for name in expansions if name.startswith("squared_norm_of.")]
    assert len(tensors) == 4
    assert sum(int3[name] for name in tensors) == pytest.approx(int3["squared_norm"])
    assert all(int3[name.replace("squared_norm", "quadratic")] != 0 for name in tensors)
    assert of(spectra, basis="none")["loss"] == trained.loss


def test_the_spectrum_is_that_of_the_dense_hessian(place, tmp_path, monkeypatch):
    """In the scales of one norm, which are few enough."""
    monkeypatch.setattr(point, "_is_rounded", lambda path: path == "norm/scale")
    (subject,), _ = choice.chosen([str(place / "sweep" / "runs" / "a")])
    asked = rounding.Options(Path(), tmp_path, place / "data")
    study, _ = rounding.study_of(subject, asked, [])
    settings = Settings(16, 16, probes=400, eigenvalues=2, products=16, tolerance=1e-3)
    Analysis(study, settings, tmp_path).measure(["none"], lambda *_: None)
    (row,) = saved(tmp_path / "spectra", SpectrumRow)
    here, tokens_NS = Point.of(subject.model(None)), jnp.asarray(study.texts[0].tokens_NS[:16])

    def loss(scale_D):
        return here.loss({"norm/scale": scale_D}, tokens_NS)

    scale_D = here.weights["norm/scale"]
    dense_DD = np.asarray(jax.jit(jax.hessian(loss))(scale_D), np.float64)
    values_K = np.linalg.eigvalsh(dense_DD)
    assert row.weights == 16
    assert abs(row.trace - np.trace(dense_DD)) < 4 * row.trace_se
    assert row.trace_of == {"norm/scale": row.trace}
    found = [row.eigenvalue[rank] for rank in ("1", "2", "-1")]
    assert found == pytest.approx(
        [values_K[-1], values_K[-2], values_K[0]], abs=2e-3 * values_K[-1]
    )
    assert all(row.eigenvalue_converged.values())
    gradient_D = jax.jit(jax.grad(loss))(scale_D)
    assert row.gradient_norm == pytest.approx(float(jnp.linalg.norm(gradient_D)), rel=1e-4)


def test_finished_rows_stay_and_others_are_added(analyze, tmp_path, monkeypatch, capsys):
    measured = []
    expansion = Analysis._expansion

    def counted(self, variant):
        measured.append(variant)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return expansion(self, variant)

    monkeypatch.setattr(Analysis, "_expansion", counted)
    with pytest.raises(KeyboardInterrupt):
        analyze()
    assert len(saved(tmp_path / "out" / "spectra", SpectrumRow)) == 1
    assert len(saved(tmp_path / "out" / "expansions", ExpansionRow)) == 1
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*.jsonl")}
    _, expansions = analyze()
    assert len(expansions) == 2
    assert len(measured) == 3
    analyze()
    assert "0 rows of 1 models are missing" in capsys.readouterr().out
    assert len(measured) == 3
    _, more = analyze(formats=("int4/channel",))
    assert set(more.ptq_format) == {"int3", "int4", "int8"}
    assert {path: path.stat().st_mtime_ns for path in files} == files
    with pytest.raises(ValueError, match=r"another run \(probes is 4 there, 5 here"):
        analyze(settings=dataclasses.replace(SETTINGS, probes=5))
    (tmp_path / "out" / "spectra" / "x.jsonl").write_text(json.dumps({"run_id": "x"}))
    with pytest.raises(ValueError, match=r"x.jsonl: a line is not a row of SpectrumRow"):
        analyze()
    (tmp_path / "out" / "spectra" / "x.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"x.jsonl: expected a JSON object a line"):
        analyze()


def test_a_sweep_is_all_its_unquantized_runs_and_they_share_programs(analyze, capsys):
    analyze("runs/a", formats=FORMATS[:1])
    with counting_compiles() as compiled:
        spectra, expansions = analyze("", formats=FORMATS[:1])
    assert not {"_along", "_value", "_compare"} & set(compiled)
    assert list(spectra.seed) == [0, 1] or list(spectra.seed) == [1, 0]
    assert len(expansions) == 2
    told = capsys.readouterr().out
    assert "runs/c' quantizes while it runs, by policy 'w3'" in told
    assert told.count("left out: ") == 1
    _, again = analyze("runs/[ab]", "runs/a", formats=FORMATS[:1])
    assert len(again) == 2


@pytest.mark.slow
def test_a_rotated_model_has_the_same_loss_and_an_expansion_of_its_own(analyze, place):
    settings = dataclasses.replace(SETTINGS, expansion_sequences=40, probes=64)
    spectra, expansions = analyze(
        methods=("rtn", "gptq", "quarot+gptq"), calibration_sequences=16, settings=settings
    )
    assert list(spectra.basis) == ["none", "quarot"]
    plain, rotated = (of(spectra, basis=name) for name in ("none", "quarot"))
    assert rotated["trace"] > 0
    assert rotated["trace"] != pytest.approx(plain["trace"], rel=1e-3)  # scales of norms are in it
    assert len(expansions) == 6
    for row in expansions.to_dict("records"):
        assert row["basis"] == basis_of(row["ptq_method"])
        assert row["change"] == pytest.approx(row["ptq_delta"], abs=5e-6)
        if row["ptq_format"] == "int8":
            assert abs(row["remaining"]) < 0.05 * row["quadratic"] + 1e-6
    assert set(expansions.ptq_calibration) > {"none"}


def test_batches_are_of_one_size_and_lose_nothing():
    for count, sizes in {128: [16] * 8, 40: [5] * 8, 7: [1] * 7, 1000: [31.25]}.items():
        tokens_NS = np.arange(count * 129).reshape(count, 129).astype(np.int32)
        batches = batches_of(tokens_NS)
        np.testing.assert_array_equal(np.concatenate(batches), tokens_NS)
        if count != 1000:
            assert [len(each) for each in batches] == sizes
        assert len({len(each) for each in batches}) == 1


def test_a_point_is_the_model_in_the_weights_that_are_rounded(place):
    subject = choice.chosen([str(place / "sweep" / "runs" / "a")])[0][0]
    point = Point.of(subject.model(None))
    assert point.size == subject.config.kernel_params
    assert not any("embed" in name or "head" in name for name in point.weights)
    assert all(not jnp.any(x) for x in point.change_to(subject.model(None)).values())


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("runs/c",), {}, "runs/c' quantizes while it runs, by policy 'w3', .* unquantized run"),
        (("runs/d",), {}, "runs/d' holds no model: .*; nearest is .*runs/"),
        (("runs/x*",), {}, r"runs/x\*: no model to analyze; nothing is there"),
        (("runs/c*",), {}, r"runs/c\*: no model to analyze; .* by policy 'w3'"),
        (("runs/a",), {"methods": ("awq",)}, "'awq' scales weights as each format .* gptq or hqq"),
        (("runs/a",), {"methods": ("rnt",)}, "unknown method 'rnt'.*nearest is 'rtn'"),
        (("runs/a",), {"formats": ("int4/block:21x3",)}, "not divide every layer; .*16x2'"),
        (("runs/a",), {"length": 17}, "--length=17: the model was trained on .* 16 tokens"),
        (("runs/a",), {"texts": ("folder:/nowhere",)}, "/nowhere is not a folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(analyze, tmp_path, names, options, message):
    with pytest.raises((ValueError, OSError), match=message) as raised:
        analyze(*names, **options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spectrum_sequences": 17}, "--spectrum_sequences=17: expected at most .*sequences=16"),
        ({"products": 2}, "--products=2: expected more than --eigenvalues=2"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(analyze, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        analyze(settings=dataclasses.replace(SETTINGS, **changes))
    assert not (tmp_path / "out").exists()


def test_other_texts_are_rows_of_their_own_and_may_not_change(analyze, place, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(20):
        (folder / f"{index}.txt").write_text(f"{index} and more of it, again and again. " * 9)
    analyze(formats=FORMATS[:1])
    _, expansions = analyze(formats=FORMATS[:1], texts=(f"folder:{folder}",))
    assert expansions.eval_set.nunique() == 2
    (folder / "more.txt").write_text("another document " * 20)
    with pytest.raises(ValueError, match=r"has changed since run \w+ was analyzed on it"):
        analyze(formats=FORMATS[:1], texts=(f"folder:{folder}",))


def test_a_model_in_low_precision_or_that_breaks_is_told(place, analyze, tmp_path, monkeypatch):
    opened = choice.open_subject

    def halved(folder):
        subject = opened(folder)
        config = dataclasses.replace(subject.config, dtype="bfloat16")
        checkpoint = dataclasses.replace(subject.checkpoint, config=config)
        return dataclasses.replace(subject, checkpoint=checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(choice, "open_subject", halved)
        with pytest.raises(ValueError, match=r"dtype: expected 'float32', got 'bfloat16'"):
            analyze()
    nothing = sharpness.Estimate(float("nan"), float("nan"))
    broken = sharpness.Expansion(nothing, nothing, nothing, nothing, float("nan"), {})
    monkeypatch.setattr(analysis.sharpness, "expand", lambda *_, **__: broken)
    _, expansions = analyze(formats=FORMATS[:1])
    assert list(expansions.status) == ["diverged"]


def test_the_program_says_what_is_wrong_in_one_line_and_helps(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def run(*arguments):
        command = [sys.executable, "-m", "launch.analyze", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    result = run(f"--checkpoint={tmp_path}", f"--workdir={tmp_path / 'out'}")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: checkpoint '{tmp_path}' holds no model")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    told = " ".join(run("--help").stdout.split())
    for words in ("--expansion_sequences", "130 stopped by Ctrl-C", "a sweep's workdir"):
        assert words in told
