"""A checkpoint and its variants: the numbers, going on after a stop, what is refused."""

import dataclasses
import functools
import os
import re
import shutil
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
from launch.experiment import Experiment
from launch.lab import Lab
from launch.rounding import driving, study
from launch.rounding import subject as subjects
from launch.rounding.driving import Options
from launch.rounding.fitting import running_policy
from launch.rounding.subject import open_subject
from launch.rounding.texts import Library, TextSet
from launch.runner import Saving, Watching
from launch.timing import counting_compiles
from models.task import model_of
from qat.policy import Policy
from qat.training.results import read_rows, rows_of

ROOT = Path(__file__).parents[2]
WHOLE, PARTS = 1, 5  # rows of a variant and text: 16 positions are 0, 1, 2, 4, 8, 16


def config_of(corpus):
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
    config.mesh.data = 2  # the program itself takes one device
    return config.to_dict()


@pytest.fixture(scope="module")
def place(corpus, tmp_path_factory):
    """A trained run, its prepared text, and another corpus."""
    folder = tmp_path_factory.mktemp("ptq")
    (folder / "letters").mkdir()
    for index in range(30):
        text = " ".join(chr(97 + (index * k) % 26) * (k % 5) for k in range(60))
        (folder / "letters" / f"{index}.txt").write_text(text)
    lab, run = Lab(folder / "data", jax.devices()[:2]), Experiment.from_config(config_of(corpus))
    watching = Watching(False, None, None, False)
    training.go_on(lab, run, folder / "run", Saving(0, 1, 0), watching, lambda: False)
    return folder


@pytest.fixture(scope="module")
def subject(place):
    return open_subject(place / "run")


@pytest.fixture(scope="module")
def library(subject, place):
    return Library(subject.checkpoint, place / "data", print)


@pytest.fixture
def ptq(place, subject, tmp_path, monkeypatch):
    """Runs the program on a checkpoint that is open already; returns its rows."""
    monkeypatch.setattr(driving, "open_subject", lambda folder: subject)

    def ptq(name="out", **options):
        defaults = {"checkpoint": place / "run", "data_dir": place / "data", "formats": ("int3",)}
        driving.run(Options(workdir=tmp_path / name, **{**defaults, **options}))
        return pd.read_parquet(tmp_path / name / "rows.parquet")

    return ptq


def of(rows, **values):
    (found,) = [row for row in rows.to_dict("records") if values.items() <= row.items()]
    return found


def log_softmax(logits_RTV):
    x_RTV = np.asarray(logits_RTV, np.float64)
    x_RTV = x_RTV - x_RTV.max(axis=-1, keepdims=True)
    return x_RTV - np.log(np.exp(x_RTV).sum(axis=-1, keepdims=True))


def test_every_policy_costs_what_float64_says_of_the_logits(ptq, subject, library, corpus):
    """A policy that rounds weights, activations or cache as it runs gives the same logits."""
    rows = ptq(policies=("w", "wa", "kv"))
    assert len(rows) == 1 + 3
    text = library.text_sets([f"folder:{corpus}"], 40, 16)
    tokens_RS = text[0].tokens_NS
    by_policy = {
        ("none", "none", "none"): None,
        ("int3/channel", "none", "none"): Policy("int3/channel"),
        ("int3/channel", "int3/token", "none"): Policy("int3/channel", "int3/token"),
        ("none", "none", "int3/token"): Policy(kv_cache="int3/token"),
    }
    losses = {}
    for spellings, policy in by_policy.items():
        model = model_of(subject.config, policy, subject.checkpoint.params)
        log_q_RTV = log_softmax(jax.jit(lambda x, model=model: model(x))(tokens_RS[:, :-1]))
        if policy is None:
            log_p_RTV = log_q_RTV
        taken_RT = np.take_along_axis(log_q_RTV, tokens_RS[:, 1:, None], axis=-1)[..., 0]
        losses[spellings] = -taken_RT.mean(axis=1)
        delta_R = losses[spellings] - losses["none", "none", "none"]
        kl_RT = (np.exp(log_p_RTV) * (log_p_RTV - log_q_RTV)).sum(axis=-1)
        same = log_p_RTV.argmax(axis=-1) == log_q_RTV.argmax(axis=-1)
        names = ("ptq_quantizer", "ptq_activations", "ptq_kv_cache")
        row = of(rows, **dict(zip(names, spellings, strict=True)))
        error = np.std(delta_R, ddof=1) / 40**0.5
        np.testing.assert_allclose(row["loss"], losses[spellings].mean(), rtol=1e-5)
        np.testing.assert_allclose(row["ptq_delta"], delta_R.mean(), atol=2e-5)
        np.testing.assert_allclose(row["ptq_delta_se"], error, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(row["ptq_kl"], kl_RT.mean(), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(row["ptq_agreement"], same.mean(), atol=2 / same.size)
        assert row["ptq_delta"] != 0 or policy is None


def test_the_original_is_the_runs_own_row_and_its_size_is_all_of_it(ptq, place, subject):
    rows = ptq()
    (trained,) = rows_of(place / "run")
    original = of(rows, ptq_method="none")
    assert original["loss"] == pytest.approx(trained.loss, rel=1e-6)
    assert original["eval_set"] == trained.eval_set
    assert original["run_id"] == trained.run_id
    leaves = jax.tree.leaves(subject.checkpoint.params)
    assert original["total_bits"] == 16 * sum(leaf.size for leaf in leaves)
    rounded = of(rows, ptq_method="rtn")
    kernels = subject.config.kernel_params
    channels = 4 * 8 + 16 + 2 * subject.config.gated_width + 16  # qkv, out, gate_up, down
    assert rounded["total_bits"] == original["total_bits"] - 13 * kernels + 32 * channels
    assert rounded["ptq_wall_s"] > 0


def test_parts_of_the_context_average_to_the_whole(ptq, tmp_path):
    rows = ptq(policies=("kv",), formats=("int2",))
    parts = pd.read_parquet(tmp_path / "out" / "positions" / "rows.parquet")
    assert len(parts) == 2 * PARTS
    whole = of(rows, ptq_kv_cache="int2/token")
    of_cache = parts[parts.ptq_kv_cache == "int2/token"]
    sizes = [1, 1, 2, 4, 8]
    names = [
        f"{whole['eval_set']}[{start}:{stop}]"
        for start, stop in zip([0, 1, 2, 4, 8], [1, 2, 4, 8, 16], strict=True)
    ]
    by_name = of_cache.set_index("eval_set")
    for column in ("loss", "ptq_delta", "ptq_kl", "ptq_agreement"):
        mean = np.dot(by_name.loc[names, column], sizes) / 16
        assert mean == pytest.approx(whole[column], abs=1e-9)
    assert (of_cache.ptq_delta_se > 0).any()


def test_one_program_evaluates_the_original_and_all_formats_of_its_weights(ptq):
    with counting_compiles() as compiled:
        ptq(
            sequences=7,  # of a shape that no other test has
            formats=("int2", "int8", "e2m1", "int3/block:8", "nf4/block:8"),
        )
    assert compiled["_compare"] == 1


def test_the_same_command_goes_on_where_it_was_killed(ptq, tmp_path, monkeypatch):
    expected = ptq("whole", formats=("int2…int4",))
    write, written = study.write_rows, []

    def killed_at_the_third(path, rows):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, rows)

    monkeypatch.setattr(study, "write_rows", killed_at_the_third)
    monkeypatch.setattr(driving, "_PAGES_APART", 0.0)
    with pytest.raises(KeyboardInterrupt):
        ptq(formats=("int2…int4",))
    monkeypatch.setattr(study, "write_rows", write)
    assert len(pd.read_parquet(tmp_path / "out" / "rows.parquet")) == 2
    assert "int2/channel" in (tmp_path / "out" / "report.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in written}
    rows = ptq(formats=("int2…int4",))
    assert {path: path.stat().st_mtime_ns for path in written} == before
    for table in (rows, expected):
        table["ptq_wall_s"] = 0.0
    pd.testing.assert_frame_equal(rows, expected)


def test_other_arguments_add_rows_and_the_same_ones_do_nothing(
    ptq, place, tmp_path, capsys, monkeypatch
):
    first = ptq()
    letters = f"folder:{place / 'letters'}"
    both = (first.eval_set[0].removesuffix("/validation"), letters)
    rows = ptq(formats=("int3", "int4"), policies=("w", "kv"), texts=both)
    assert len(rows) == 2 * (1 + 2 + 2)
    kept = rows[
        (rows.eval_set == first.eval_set[0])
        & rows.ptq_quantizer.isin(["none", "int3/channel"])
        & (rows.ptq_kv_cache == "none")
    ]
    pd.testing.assert_frame_equal(kept.reset_index(drop=True), first)
    monkeypatch.setattr(study, "measure_original", None)  # nothing is evaluated again
    capsys.readouterr()
    again = ptq(formats=("int4", "int3"), policies=("kv", "w"), texts=both[::-1])
    pd.testing.assert_frame_equal(again, rows)
    printed = capsys.readouterr().out
    assert "5 of 5 variants are measured already" in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 100 + len(str(place))


def test_calibration_text_that_changed_is_refused(ptq, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in "abcd":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{name} is for all of it. " * 40)
    options = {"calibration_text": f"folder:{tmp_path / 'texts'}", "calibration_length": 8}
    ptq(methods=("gptq",), calibration_sequences=4, **options)
    (tmp_path / "texts" / "e.txt").write_text("Something else has come. " * 400)
    with pytest.raises(ValueError, match="methods were calibrated on"):
        ptq(methods=("gptq",), formats=("int4",), calibration_sequences=4, **options)


def test_bits_of_a_cache_have_their_scales(ptq, subject, tmp_path, capsys):
    channels = subject.config.channels
    ptq(policies=("kv",), formats=("int4", "int4/block:4"))
    lines = capsys.readouterr().out.splitlines()
    (cells,) = [line.split() for line in lines if line.startswith("kv ")]
    assert cells[2:4] == ["int4/token", f"{4 + 32 / channels:.2f}"]


def test_the_table_is_sorted_and_the_page_is_whole(ptq, tmp_path, capsys):
    ptq(policies=("wa", "w", "kv"), formats=("int4", "int2", "e2m1"))
    lines = capsys.readouterr().out.splitlines()
    cells = [
        line.split()[:3] for line in lines if line.startswith(("original ", "w ", "wa ", "kv "))
    ]
    assert [each[0] for each in cells] == ["original", *["w"] * 3, *["wa"] * 3, *["kv"] * 3]
    assert cells[1][2] == "int2/channel"
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count("<svg") == 3 * 3
    assert "src=" not in text and "<script" not in text


def test_a_run_that_was_trained_in_low_precision_keeps_the_rest_of_its_policy():
    running = functools.partial(running_policy, Policy.parse("w4a8kv4"))
    (weights, cache) = (driving.variants(["rtn"], ["int3"], [policy])[0] for policy in ("w", "kv"))
    assert str(running(weights)) == str(Policy(activations="int8/tensor", kv_cache="int4/token"))
    assert str(running(cache)) == str(Policy("int4/channel", "int8/tensor", "int3/token"))
    assert str(running(driving.ORIGINAL)) == str(
        Policy("int4/channel", "int8/tensor", "int4/token")
    )


def test_batches_are_of_one_shape_and_lose_nothing():
    tokens_NS = np.arange(10 * 2049).reshape(10, 2049).astype(np.int32)
    text = TextSet("a", "b", tokens_NS[:5])
    batches = text.batches()
    assert [each.shape for each in batches] == [(2, 2049)] * 3
    np.testing.assert_array_equal(np.concatenate(batches)[:5], tokens_NS[:5])
    assert text.evaluated == 6


def test_calibration_never_sees_what_is_evaluated(library, place):
    letters = f"folder:{place / 'letters'}"
    again = f"folder:{place / 'run' / '..' / 'letters'}"  # the same files
    shared = library.sharing([letters], again)
    (text,) = shared.text_sets([letters], 20, 16)
    batches = shared.calibration(again, 20, 16)
    assert sum(map(len, batches)) == 20
    assert all(batch.shape[1] == 16 for batch in batches)
    dataset = shared.dataset(again, 16)
    assert dataset.tokenizer == library.checkpoint.tokenizer(place / "data")
    train = {record.tobytes() for record in np.asarray(dataset.train.records)}
    assert not train & {each.astype(np.uint8).tobytes() for each in text.tokens_NS}
    assert {each.astype(np.uint8).tobytes() for batch in batches for each in batch} <= {
        record[:-1] for record in train
    }


def test_text_that_is_not_shared_is_used_whole(ptq, place, tmp_path, capsys):
    """One document has but one side, whether it is evaluated on or calibrated with."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "only.txt").write_text(f"{name} of all the documents there are. " * 20)
    first, second = (f"folder:{tmp_path / name}" for name in ("first", "second"))
    tokens = len((tmp_path / "first" / "only.txt").read_bytes()) + 1
    rows = ptq(texts=(first,), sequences=9999)
    assert set(rows.eval_set) == {first}
    assert f"evaluated on all {tokens // 17} sequences" in capsys.readouterr().out
    (calibrated,) = (
        row
        for row in ptq(
            methods=("gptq",),
            texts=(first,),
            sequences=9999,
            calibration_text=second,
            calibration_sequences=40,
        ).to_dict("records")
        if row["ptq_method"] == "gptq"
    )
    assert calibrated["eval_set"] == first
    assert calibrated["ptq_calibration"].startswith(f"{second} 40×16 ")
    with pytest.raises(ValueError, match=r"first' is also calibrated with \(expected other --cal"):
        ptq("other", methods=("gptq",), texts=(first,), calibration_text=first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("rnt",)}, "unknown method 'rnt'.*nearest is 'rtn'"),
        ({"checkpoint": "rum"}, "checkpoint .*rum' holds no model: .*; nearest is .*run"),
        (
            {"checkpoint": "letters"},
            "letters' holds no model: expected the workdir of launch.train or launch.pretrained",
        ),
        ({"checkpoint": "empty"}, r"empty': the run has no state after its last step \(128\)"),
        ({"checkpoint": "going_on"}, "going_on': its run has no result yet; expected a finished"),
        ({"methods": ("gptq", "rtn+gptq")}, "'rtn.gptq': one rounding comes last"),
        ({"methods": ("gptq",), "calibration_sequences": 9999}, "calibration needs 9,999 seq"),
        ({"texts": ("folder:/nowhere",)}, "/nowhere is not a folder"),
        ({"texts": ("fodler:x",)}, "unknown source 'fodler:x'"),
        ({"length": 17}, r"--length=17: the model was trained on .* up to 16 tokens"),
        ({"calibration_length": 32}, r"--calibration_length=32: .*; expected at most 16"),
        ({"sequences": 1}, "1 sequences of 16 tokens to be evaluated on, expected at least 2"),
        (
            {"formats": ("mxfp4",)},
            "rtn weights mxfp4: block size 32 does not divide .* is 'e2m1/block:16/e8m0'",
        ),
        ({"formats": ("mxfp4",), "policies": ("kv",)}, "rtn kv_cache mxfp4: block size 32"),
        ({"formats": ("int4/block:21x3",)}, "not divide every layer; .* 'int4/block:16x2'"),
        ({"formats": ("int4/learned",), "methods": ("gptq",)}, "a learned scale is trained"),
        ({"workdir": "letters"}, "letters is not empty and no run made it"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(place, tmp_path, options, message):
    for name in ("empty", "going_on"):
        (place / name).mkdir(exist_ok=True)
        shutil.copy(place / "run" / "config.json", place / name)
    if not (place / "going_on" / "checkpoints").exists():
        shutil.copytree(place / "run" / "checkpoints", place / "going_on" / "checkpoints")
    options = {
        name: place / value if name in ("checkpoint", "workdir") else value
        for name, value in options.items()
    }
    defaults = {
        "checkpoint": place / "run",
        "workdir": tmp_path / "out",
        "data_dir": place / "data",
    }
    before = sorted(place.glob("letters/*"))
    with pytest.raises((ValueError, OSError), match=message) as raised:
        driving.run(Options(**{"formats": ("int3",), **defaults, **options}))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    assert sorted(place.glob("letters/*")) == before
    assert not (place / "empty" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("source", "shape", "message"),
    [
        (
            "letters",
            (5000, 16),
            r"calibration needs 5,000 sequences of 16 tokens, 80,000 tokens; .* has \d+ such",
        ),
        (
            "letters",
            (2, 50000),
            "calibration needs 2 sequences of 50,000 tokens, 100,000 tokens; .*side has",
        ),
    ],
)
def test_too_little_calibration_text_says_how_much_there_is(library, place, source, shape, message):
    with pytest.raises(ValueError, match=message):
        library.calibration(f"folder:{place / source}", *shape)


def test_another_calibration_or_length_is_refused(ptq):
    rows = ptq(methods=("gptq",), calibration_sequences=4, calibration_length=8)
    row = of(rows, ptq_method="gptq")
    source = re.escape(row["eval_set"].removesuffix("/validation"))
    assert re.fullmatch(rf"{source}/train 4×8 [0-9a-f]{{12}}", row["ptq_calibration"])
    for formats in ("int3",), ("int4",):
        with pytest.raises(ValueError, match=r"methods were calibrated on .* 4×8 \w+ there"):
            ptq(methods=("gptq",), formats=formats, calibration_sequences=5, calibration_length=8)
    assert len(ptq(calibration_sequences=5)) == 3  # which rounding to nearest does not see
    with pytest.raises(ValueError, match=r"another run \(length is 16 there, 8 here"):
        ptq(length=8)


def test_text_that_changed_since_training_is_no_text_of_the_run(subject, place, corpus):
    changed = dataclasses.replace(subject.checkpoint, data_fingerprint="other")
    library = Library(changed, place / "data", print)
    with pytest.raises(ValueError, match="has changed since the model was trained on it"):
        library.text_sets([f"folder:{corpus}"], 8, 16)
    assert library.text_sets([f"folder:{place / 'letters'}"], 8, 16)


def test_a_converted_model_needs_a_text_and_has_rows_of_its_own(
    subject, place, tmp_path, monkeypatch
):
    checkpoint = dataclasses.replace(
        subject.checkpoint, experiment=None, row=None, data_fingerprint="unknown"
    )
    monkeypatch.setattr(subjects, "open_checkpoint", lambda folder: checkpoint)
    assert Library(checkpoint, place / "data", print).length == 16  # of at most 512
    options = Options(place / "run", tmp_path / "out", place / "data", formats=("int3",), length=8)
    with pytest.raises(ValueError, match=r"says nothing of the text .* --text=folder:PATH"):
        driving.run(options)
    driving.run(dataclasses.replace(options, texts=(f"folder:{place / 'letters'}",)))
    rows = pd.read_parquet(tmp_path / "out" / "rows.parquet")
    assert set(rows.run_id) == {checkpoint.identity}
    assert rows.eval_set[0] == f"folder:{place / 'letters'}@8"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant", "quarot+gptq", "hqq", "llm_int8"])
def test_every_method_goes_through_every_policy(ptq, method):
    rows = ptq(
        methods=("rtn", method),
        policies=("w", "wa"),
        formats=("int3", "int4"),
        calibration_sequences=16,
    )
    assert len(rows) == 1 + 8
    assert (rows.status == "ok").all()
    assert (rows.total_bits > 0).all()


def test_a_text_that_changed_is_refused(ptq, place, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for path in (place / "letters").iterdir():
        (folder / path.name).write_text(path.read_text())
    ptq(texts=(f"folder:{folder}",))
    (folder / "more.txt").write_text("another document " * 20)
    with pytest.raises(ValueError, match="has changed since original was evaluated on it"):
        ptq(texts=(f"folder:{folder}",))


def test_a_method_that_cannot_take_a_format_is_named_and_leaves_whole_rows(
    ptq, tmp_path, monkeypatch
):
    quantize = study.qat.ptq.quantize

    def refusing(model, method, quantizer, **options):
        if str(quantizer) == "int4/channel":
            raise ValueError("no such thing")
        return quantize(model, method, quantizer, **options)

    monkeypatch.setattr(study.qat.ptq, "quantize", refusing)
    with pytest.raises(ValueError, match=r"^rtn weights int4/channel: no such thing$"):
        ptq(formats=("int3", "int4"))
    assert len(read_rows(tmp_path / "out" / "variants")) == 2 * (WHOLE + PARTS)
    assert len(pd.read_parquet(tmp_path / "out" / "rows.parquet")) == 2


def test_a_variant_that_breaks_the_model_is_a_row_too(ptq, monkeypatch):
    quantize = study.qat.ptq.quantize

    def breaking(model, **options):
        broken, report = quantize(model, **options)
        broken.norm.scale.set_value(jnp.full_like(broken.norm.scale[...], jnp.nan))
        return broken, report

    monkeypatch.setattr(study.qat.ptq, "quantize", breaking)
    rows = ptq()
    assert of(rows, ptq_method="rtn")["status"] == "diverged"


def test_the_program_says_what_is_wrong_in_one_line_and_helps(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def run(*arguments):
        command = [sys.executable, "-m", "launch.ptq", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    result = run(f"--checkpoint={tmp_path}", f"--workdir={tmp_path / 'out'}", "--policy=vw")
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown policy 'vw': expected one of w, wa, kv")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    told = " ".join(run("--help").stdout.split())
    for words in ("--calibration_sequences", "int2…int8,mxfp4", "130 stopped by Ctrl-C"):
        assert words in told
