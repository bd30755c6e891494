"""The programs of laws on small tables: what they write, say and refuse."""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from launch import tables
from launch.laws import comparing, fitting, numbers, planning
from qat import laws
from tests.laws.runs import CHINCHILLA, ROWS, chinchilla_runs

pytestmark = pytest.mark.usefixtures("optimized")

ROOT = Path(__file__).parents[2]
FIT = fitting.Options(
    workdir=Path(),
    law="chinchilla",
    loss="huber",
    delta=1e-3,
    weights="equal",
    fixed={},
    bootstrap=50,
    resampling="runs",
    starts=32,
    seed=0,
)
PLAN = planning.Options(
    fit="published:kumar",
    workdir=None,
    flops=(1e20, 1e21),
    params=None,
    bits=None,
    ptq_bits=None,
    inference_tokens=0.0,
    cost="linear",
    columns={},
    tolerance=1e-3,
    critical=(),
    shrink=None,
    next=3,
)


def options(base, **changes):
    return dataclasses.replace(base, **changes)


@functools.cache
def table():
    return laws.as_table(chinchilla_runs(noise=2e-3))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A workdir of launch.fit."""
    folder = tmp_path_factory.mktemp("laws") / "fit"
    fitting.run(table(), "2 rows by hand", options(FIT, workdir=folder), profiles=True)
    return folder


def test_a_fit_is_written_with_all_that_judges_it(fitted, capsys):
    fit = laws.load(fitted / "fit.json")
    assert fit.params["E"] == pytest.approx(CHINCHILLA["E"], rel=0.02)
    assert fit.checklist["left out"].endswith("2 rows by hand")
    assert "largest-params: median relative error 0." in fit.checklist["held-out validation"]
    assert "all rows have one value, 16" in fit.checklist["held-out validation"]
    page = (fitted / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "missing" in page  # nobody said what the learning rates were
    profiles = pd.read_csv(fitted / "profile_likelihood.csv").set_index("parameter")
    assert (profiles.low < pd.Series(fit.params)).all()
    assert (profiles.high > pd.Series(fit.params)).all()
    assert len(pd.read_csv(fitted / "without_one_run.csv")) == 20


def test_the_same_command_goes_on_and_another_is_refused(fitted, capsys):
    before = (fitted / "fit.json").read_text()
    fitting.run(table(), "2 rows by hand", options(FIT, workdir=fitted), profiles=True)
    assert (fitted / "fit.json").read_text() == before
    said = capsys.readouterr().out
    assert "hyper-parameters: missing" in said
    assert "irreducible loss" in said
    other = options(FIT, workdir=fitted, seed=1)
    with pytest.raises(ValueError, match=str(fitted)):
        fitting.run(table(), None, other, profiles=True)
    assert (fitted / "fit.json").read_text() == before


def test_a_plan_has_a_row_a_budget_and_a_page(fitted, tmp_path, capsys):
    asked = options(PLAN, fit=str(fitted / "fit.json"), workdir=tmp_path / "plan")
    planning.run(asked, None)
    rows = pd.read_csv(tmp_path / "plan" / "plan.csv")
    fit = laws.load(fitted / "fit.json")
    plan = laws.plan(fit, 1e21)
    assert rows.params[1] == plan.params.value
    assert rows.params_low[1] == plan.params.low
    assert "bits" not in rows
    page = (tmp_path / "plan" / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "1e+20 FLOPs" in capsys.readouterr().out


def test_published_constants_are_planned_with_bits_and_critical_tokens(tmp_path, capsys):
    asked = options(PLAN, workdir=tmp_path, critical=(7e9,), ptq_bits=4.0)
    planning.run(asked, None)
    said = capsys.readouterr().out
    assert "critical tokens of 7e+09 parameters: 5.74e+11" in said
    page = (tmp_path / "report.html").read_text()
    assert "arXiv 2411.04330" in page
    rows = pd.read_csv(tmp_path / "plan.csv")
    assert rows.bits.between(6, 7.1).all()


def test_next_runs_are_named(fitted, capsys):
    asked = options(PLAN, fit=str(fitted / "fit.json"), flops=(), shrink="beta")
    planning.run(asked, table())
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("next runs for beta")
    assert len(said) == 5
    with pytest.raises(ValueError, match="--shrink needs --table"):
        planning.run(asked, None)


def test_a_comparison_tests_independence_where_it_can(tmp_path, capsys):
    grid = itertools.product((1e7, 3e7, 1e8), (1e9, 1e10, 1e11), (4, 16), (5, 16))
    names = ["params", "tokens", "weight_bits", "activation_bits"]
    frame = pd.DataFrame(grid, columns=names)
    rng = np.random.default_rng(0)
    frame["loss"] = 2 + 100 * frame.params**-0.3 + 300 * frame.tokens**-0.3
    frame["loss"] *= np.exp(1e-3 * rng.standard_normal(len(frame)))
    asked = comparing.Options(
        tmp_path / "all", ("chinchilla", "kaplan"), ("largest-params",), "l2", 1e-3, 20, 16, 0
    )
    comparing.run(laws.as_table(frame), asked)
    said = capsys.readouterr().out
    assert "by itself 0 of 1 joint settings departs" in said
    assert "verdict: " in said
    assert laws.load(tmp_path / "all" / "kaplan.json").law.name == "kaplan"
    assert len(pd.read_csv(tmp_path / "all" / "independence.csv")) == 1
    assert (tmp_path / "all" / "report.html").read_text().count("<svg") == 3


def test_a_comparison_outlives_a_test_that_cannot_be(tmp_path, capsys):
    """Nine rows with a joint one are too few for an efficiency of every width."""
    frame = chinchilla_runs(noise=1e-3, rows=9)
    frame["weight_bits"] = [16, 16, 16, 16, 16, 2, 3, 4, 2]
    frame["activation_bits"] = [16, 16, 16, 16, 4, 16, 16, 16, 4]
    asked = comparing.Options(tmp_path / "few", ("chinchilla", "kaplan"), (), "l2", 1e-3, 0, 8, 0)
    comparing.run(laws.as_table(frame), asked)
    assert "independence was not tested: 9 rows cannot fit 10 parameters" in capsys.readouterr().out
    assert (tmp_path / "few" / "comparison.csv").exists()


def test_numbers_of_flags():
    assert numbers.listed("flops", ["1e18", "2"]) == (1e18, 2.0)
    assert numbers.named("fixed", ["E=1.69", "alpha = 0.3"]) == {"E": 1.69, "alpha": 0.3}
    for words, message in (
        (["E"], "--fixed: expected NAME=NUMBER such as E=1.69, not 'E'"),
        (["E=1", "E=2"], "--fixed gives E twice: 1 and 2"),
    ):
        with pytest.raises(ValueError, match=message):
            numbers.named("fixed", words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"where": "params > 1e30"}, "--where='params > 1e30' leaves none of the 120 rows"),
        ({"where": "tokens"}, "--where='tokens' is no condition: expected such as 'seed == 0'"),
        ({"where": "params >"}, "--where='params >' cannot be read"),
        ({"drop_highest": 120}, "--drop_highest=120 leaves none of 120 rows"),
        ({"path": Path("rows.txt")}, "cannot read 'rows.txt'"),
    ],
)
def test_a_table_that_cannot_be_is_refused(arguments, message, tmp_path):
    path = tmp_path / "runs.csv"
    chinchilla_runs(noise=1e-3).to_csv(path, index=False)
    with pytest.raises(ValueError, match=message):
        tables.load(**({"path": path} | arguments))


def test_rows_that_were_left_out_are_told(tmp_path):
    path = tmp_path / "runs.csv"
    frame = chinchilla_runs(noise=1e-3)
    frame.assign(weight_format="e4m3").to_csv(path, index=False)
    kept, said = tables.load(path, where="tokens > 5e9", drop_highest=3)
    few = (frame.tokens > 5e9).sum()
    assert said == f"{ROWS - few} rows by tokens > 5e9; 3 rows of highest loss"
    assert len(kept) == few - 3
    assert kept.frame.loss.max() == frame.loss[frame.tokens > 5e9].nlargest(4).iloc[-1]
    assert set(kept.frame.mantissa_bits) == {3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fit": "published:kumr"}, "unknown published law 'kumr': .*nearest is 'kumar'"),
        ({"flops": ()}, "nothing to plan"),
        ({"flops": (-1.0,)}, "flops must be a finite number above 0"),
        ({"cost": "v5"}, "unknown cost 'v5'"),
        ({"fit": "{path}"}, "is not a fit that qat.laws saved"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes, message, tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("params,tokens\n1,2\n")
    changes = {k: x.format(path=path) if isinstance(x, str) else x for k, x in changes.items()}
    with pytest.raises(ValueError, match=message) as raised:
        planning.run(options(PLAN, workdir=tmp_path / "new", **changes), None)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "new").exists()


def call(program, *words):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", program, *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_program_fits_or_refuses_from_the_command_line(tmp_path):
    path, workdir = tmp_path / "runs.jsonl", tmp_path / "new"
    chinchilla_runs(noise=1e-3).to_json(path, orient="records", lines=True)
    words = [f"--table={path}", f"--workdir={workdir}", "--bootstrap=20", "--starts=16"]
    refused = call("launch.fit", "--law=chinchila", *words)
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: unknown law 'chinchila': expected one of " + refused.stderr.split("one of ")[1]
    )
    assert not workdir.exists()
    done = call("launch.fit", "--law=chinchilla", "--fixed=E=1.8", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads((workdir / "fit.json").read_text())["params"]["E"] == 1.8
