"""A study whose truth is known: rows drawn from a law at the points of the real design."""

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from configs.studies import precision_micro, precision_micro_again, precision_micro_decay
from configs.studies import precision_micro_rates as tuning
from launch.studies import QUESTIONS, decay, experts, shapes, ternary
from launch.studies import rounding as costs
from launch.studies.answer import Answer, markdown_of, placed
from launch.studies.rows import Study, gather
from qat.laws import get_law
from qat.policy import Policy
from qat.sweep import apply
from qat.training.results import write_rows
from tests.rows import ROW

pytestmark = pytest.mark.usefixtures("optimized")

LAW = "precision_weibull_plain"
TRUTH = {"A": 17.0, "B": 420.0, "E": 1.1, "alpha": 0.27, "beta": 0.48}
TRUTH |= {"gamma_w": 2.2, "k_w": 0.8, "gamma_a": 2.0, "k_a": 1.3, "gamma_kv": 1.0, "k_kv": 1.1}
ROUNDING = {"C_T": 0.02, "gamma_D": 0.5, "gamma_N": 0.3, "gamma_post": 0.8}
SEEDS, PAIRED = 0.01, 0.004  # scatter of a seed, and of a precision beside it
EXPERTS_GAMMA = 1.5
BUDGETS = [round(budget * precision_micro.MILLION) for budget in precision_micro_decay.BUDGETS]


def test_every_question_has_its_place_in_the_readme():
    text = "\n".join(f"<!-- {name} -->\nold\n<!-- /{name} -->" for name in QUESTIONS)
    for name in QUESTIONS:
        text = placed(text, name, f"{name} is new")
    assert "old" not in text
    assert text.count("is new") == len(QUESTIONS)


@pytest.mark.parametrize("text", ["", "<!-- noises -->\n<!-- /noises -->", "<!-- /x --><!-- x -->"])
def test_a_readme_without_the_place_is_refused(text):
    with pytest.raises(ValueError, match="expected one place <!-- x --> … <!-- /x -->"):
        placed(text, "x", "")


@pytest.mark.parametrize("question", ["rates", "noise"])
def test_what_is_committed_is_what_the_committed_rows_say(question):
    published = Study(Path(__file__).parents[2] / "docs/studies/precision_micro")
    text = (published.folder / "README.md").read_text()
    assert placed(text, question, QUESTIONS[question](published).markdown()) == text


def test_markdown():
    table = pd.DataFrame({"N": [92960], "loss": [1.23456], "none": [np.nan], "ok": [True]})
    assert markdown_of(table).splitlines()[-1] == "| 92,960 | 1.235 | – | yes |"


def test_the_grid_is_what_the_study_asks_for():
    grid = precision_micro.get_sweep().grid
    assert len(grid) >= 465
    widths = {run["model.width"] for run in grid}
    assert len(widths) >= 5
    again = precision_micro_again.get_sweep().grid
    assert len(again) == 5
    assert all(run in grid for run in again)


def drawn(overrides, config, rng):
    """A run's rows: trained, and rounded if it was trained unquantized."""
    config = apply(config, overrides)
    policy = Policy.parse(config["policy"])
    params = PARAMS[config["model"]["width"]]
    bits = {
        name: policy.bits(operand)
        for name, operand in (
            ("weight_bits", "weights"),
            ("activation_bits", "activations"),
            ("kv_bits", "kv_cache"),
        )
    }
    experts = config["model"]["experts"]
    truth = TRUTH | {"gamma_w": EXPERTS_GAMMA} if experts else TRUTH
    rows = pd.DataFrame([{"params": params, "tokens": config["tokens"], **bits}])
    seed = np.random.default_rng((config["seed"], params, config["tokens"])).normal(0, SEEDS)
    loss = float(get_law(LAW).predict(truth | ROUNDING, rows)[0]) + seed
    loss += rng.normal(0, PAIRED) if config["policy"] != "none" else 0
    row = dataclasses.replace(
        ROW,
        run_id=f"{rng.integers(2**48):012x}",
        params=params,
        tokens=config["tokens"],
        policy=str(policy),
        loss=loss,
        loss_se=0.01,
        seed=config["seed"],
        learning_rate=config["learning_rate"],
        schedule=config["schedule"]["name"],
        **bits,
        **{
            f"{name}_format": policy.format_name(operand)
            for name, operand in (
                ("weight", "weights"),
                ("activation", "activations"),
                ("kv", "kv_cache"),
            )
        },
        experts=experts,
        experts_per_token=config["model"]["experts_per_token"] if experts else 0,
    )
    return [row, *(rounded(row) if config["policy"] == "none" else [])]


def rounded(row, status="ok", factor=1.0, budget=None):
    tokens = budget or row.tokens
    for method, better in (("rtn", 1.0), ("gptq", 0.4)):
        for bits in (2, 3, 4, 5):
            scale = tokens ** ROUNDING["gamma_D"] * row.params ** -ROUNDING["gamma_N"]
            delta = better * factor * ROUNDING["C_T"] * scale * np.exp(-bits / 0.8)
            yield dataclasses.replace(
                row,
                tokens=tokens,
                loss=row.loss + delta,
                ptq_delta=delta,
                ptq_delta_se=1e-4,
                ptq_method=method,
                ptq_bits=float(bits),
                ptq_format=f"int{bits}",
                ptq_quantizer=f"int{bits}/channel",
                status=status,
            )


PARAMS = {}


@functools.cache
def all_rows():
    """The grid, the tuning, and budgets of one trunk."""
    config = precision_micro.get_sweep().config
    study = Study(None)
    by_rate = {rate: params for params, rate in study.rates.items()}
    PARAMS.update({width: by_rate[rate] for width, rate in precision_micro.RATES.items()})
    rng = np.random.default_rng(0)
    rows = [r for run in precision_micro.get_sweep().grid for r in drawn(run, config, rng)]
    rows += [r for run in tuning.get_sweep().grid for r in drawn(run, config, rng)]
    for run in precision_micro_decay.get_sweep().grid:
        own = drawn(run, config, rng)
        rows += own
        for budget in BUDGETS if run["policy"] == "none" else ():
            rows += rounded(own[0], "unfinished", factor=0.5, budget=budget)
            if "schedule.branches" in run:
                branch = dataclasses.replace(own[0], run_id=f"{budget}-{own[0].run_id}")
                rows += rounded(branch, budget=budget)
    return rows


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    found = Study(folder, resamples=30, starts=8)
    write_rows(folder / "all.jsonl", all_rows())
    count = gather(found.path("runs"), folder / "all.jsonl")
    assert count == len(all_rows())
    first = found.path("runs").read_bytes()
    gather(found.path("runs"), folder / "all.jsonl")  # the same rows again
    assert found.path("runs").read_bytes() == first
    places = "\n".join(f"<!-- {name} -->\n<!-- /{name} -->" for name in QUESTIONS)
    (folder / "README.md").write_text(f"# A study\n\n{places}\n")
    return found


def numbers(text):
    return [float(x.replace(",", "")) for x in re.findall(r"-?[\d,]*\.?\d+(?:e-?\d+)?", text)]


def only(answer):
    (table,) = answer.tables.values()
    return table


def test_noise_is_that_of_the_truth(study):
    table = only(QUESTIONS["noise"](study))
    of_loss, of_pairs = table.iloc[-1][["of the loss", "of what precision adds"]]
    value, low, high = numbers(of_pairs)
    assert low <= PAIRED <= high
    assert value == pytest.approx(PAIRED, rel=0.25)
    assert numbers(of_loss)[0] == pytest.approx(np.hypot(SEEDS, PAIRED), rel=0.35)


def test_rates_are_those_that_were_tried(study):
    table = only(QUESTIONS["rates"](study))
    assert [f"{rate:g}" for rate in tuning.RATES] == list(table.columns[2:-1])
    assert len(table) == 12


def test_the_cost_of_rounding_is_an_exponential_with_the_powers_of_the_truth(study):
    answer = costs.answer(study)
    fitted = answer.fits["rtn_kumar_term"]
    assert fitted.params["gamma_D"] == pytest.approx(0.5, abs=0.01)
    assert fitted.params["gamma_N"] == pytest.approx(0.3, abs=0.01)
    assert fitted.params["gamma_post"] == pytest.approx(0.8, abs=0.01)
    criteria = next(table for caption, table in answer.tables.items() if "`rtn`" in caption)
    assert criteria.set_index("law")["ΔBIC"].idxmin() == "kumar_term"


def test_decay_doubles_the_cost_and_tokens_raise_it_either_way(study):
    tables = list(decay.answer(study).tables.values())
    growth = tables[0].set_index(["rate", "bits"])
    for rate in ("at the peak", "cooled down"):
        value, low, high = numbers(growth.loc[(rate, 3), "power of D"])
        assert low - 1e-9 <= value <= high + 1e-9
        assert value == pytest.approx(0.5, abs=1e-3)
    np.testing.assert_allclose(tables[1].ratio, 2.0, rtol=1e-6)


def test_mixtures_have_a_gamma_of_their_own(study):
    answer = experts.answer(study)
    table = next(iter(answer.tables.values())).set_index("model")
    dense, sparse = (numbers(table.loc[x, "gamma_w"]) for x in ("dense", "4 experts, top 2"))
    assert dense[1] <= TRUTH["gamma_w"] <= dense[2]
    assert sparse[1] <= EXPERTS_GAMMA <= sparse[2]


def test_ternary_models_are_worth_the_bits_that_they_were_drawn_with(study):
    table = only(ternary.answer(study)).set_index("model")
    worth = table.loc["ternary weights", "worth, bits of an integer"]
    assert worth.median() == pytest.approx(np.log2(3), abs=0.1)


def test_the_law_that_made_the_rows_is_preferred(study, monkeypatch):
    monkeypatch.setattr(shapes, "CURVES", (LAW,))
    answer = shapes.answer(study)
    captions = list(answer.tables)
    assert f"`{LAW}`" in captions[1]
    table = answer.tables[captions[0]].set_index("law")
    assert table["ΔBIC"].idxmin() in (LAW, "free")
    assert float(table.loc[LAW, "largest-params: error"][:-1]) < 1
    assert table.loc[LAW, "largest-params: R²"] > table.loc["offset", "largest-params: R²"]
    known = answer.tables[captions[1]].set_index("parameter").value
    _, low, high = numbers(known["gamma_w"])
    assert low <= TRUTH["gamma_w"] <= high


def test_runs_that_were_trained_again_are_compared(study):
    table = study.rows
    chosen = table[(table.ptq_method == "none") & (table.policy == "none")].head(2)
    again = [row for row in all_rows() if row.run_id in set(chosen.run_id)]
    again = [dataclasses.replace(row, loss=row.loss + 0.02) for row in again]
    write_rows(study.folder / "again.jsonl", again)
    gather(study.path("again"), study.folder / "again.jsonl")
    found = only(QUESTIONS["reproduction"](study))
    assert len(found) == 2
    np.testing.assert_allclose(found["standard errors apart"], 0.02 / np.hypot(0.01, 0.01))
    assert (found.rows == 9).all()


def test_an_answer_is_written_where_it_belongs(study):
    before = (study.folder / "README.md").read_text()
    table = pd.DataFrame({"a": [1]})
    Answer({"One": table}, {"a_figure": "<svg/>"}).write(study.folder, "noise")
    text = (study.folder / "README.md").read_text()
    assert (
        "<!-- noise -->\n\nOne:\n\n| a |\n| --- |\n| 1 |\n\n![a figure](figures/a_figure.svg)"
        in text
    )
    assert (study.folder / "figures" / "a_figure.svg").read_text() == "<svg/>\n"
    (study.folder / "README.md").write_text(before)


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "runs.csv.gz").write_bytes(b"no rows")
    with pytest.raises(ValueError, match=r"runs\.csv\.gz: damaged"):
        assert Study(tmp_path).rows is None


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--question=shape", "question 'shape'"),
        ("--add=run=rows.csv", "--add=run: expected TABLE=PATH, TABLE one of runs, again"),
        ("--add=runs", "--add=runs: expected TABLE=PATH"),
    ],
)
def test_bad_input_is_one_line(flag, message, tmp_path):
    command = [sys.executable, "-m", "launch.study", f"--folder={tmp_path}", flag]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.startswith("error: ")
    assert message in found.stderr
    assert found.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
