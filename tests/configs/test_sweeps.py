"""Every preset is a sweep of runs that can be trained, of the size that its docstring states."""

import functools
import importlib
import re
from pathlib import Path

import pytest

from launch.experiment import Experiment
from launch.sweeps.budget import Ptq, estimate
from models.task import matrix_params
from qat.policy import Policy
from qat.quantizer import Quantizer
from qat.training.flops import train_flops

FILES = Path(importlib.import_module("configs.sweeps").__file__).parent.glob("*.py")
NAMES = sorted(path.stem for path in FILES if path.stem != "__init__")


@functools.cache
def preset(name):
    module = importlib.import_module(f"configs.sweeps.{name}")
    sweep = module.get_sweep()
    return sweep, [Experiment.from_config(config) for config in sweep.configs()], module.__doc__


def stated(pattern, text):
    return float(re.search(pattern, " ".join(text.split()))[1].replace(",", ""))


def roundings(sweep, runs):
    """Rows after quantization: a run's rows, each rounded to fewer bits than it trained with."""
    bits = [Quantizer.parse(text).bits for text in sweep.ptq_formats]
    return sum(
        (1 + len(run.branches))
        * len(sweep.ptq_methods)
        * len(sweep.ptq_at)
        * sum(each < run.policy.bits("weights") for each in bits)
        for run in runs
    )


def policies(name):
    return [Policy.parse(config["policy"]) for config in preset(name)[0].configs()]


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_as_its_docstring_says(name):
    sweep, runs, text = preset(name)
    assert f"--sweep=configs/sweeps/{name}.py" in text
    assert len(runs) == stated(r"(\d+) runs of", text)
    assert len({run.shape for run in runs}) == stated(r"runs of (\d+) shapes?", text)
    # Trunks, and of every branch what it trains on its own.
    tokens = sum(run.tokens for run in runs)
    for run in runs:
        for branch in run.branches:
            alone = 1 - branch.cooldown_start / branch.total_steps
            tokens += run.tokens_of(branch) * alone
    assert stated(r"shapes?, ([\d.,]+) million tokens", text) == pytest.approx(
        tokens / 1e6, abs=0.5
    )
    assert roundings(sweep, runs) == (
        stated(r"([\d,]+) roundings", text) if sweep.ptq_methods else 0
    )
    assert len({run.config_hash for run in runs}) == len(runs)


def test_the_demo_is_what_its_docstring_says():
    sweep, runs, _ = preset("demo")
    cells = {
        (run.config["model"]["width"], run.config["tokens"], run.config["seed"]) for run in runs
    }
    whole = {(width, tokens, 0) for width in (16, 24, 32) for tokens in (250_000, 3_000_000)}
    assert cells == whole | {(16, 250_000, seed) for seed in (1, 2)}
    for policy in ("none", "w4", "w3", "w2", "a3", "kv2"):
        assert sum(run.config["policy"] == policy for run in runs) == len(cells)
    assert {run.config["learning_rate"] for run in runs} == {1.2e-2}
    assert sweep.ptq_formats == tuple(f"int{bits}/channel" for bits in range(2, 9))


def test_the_benchmark_is_a_grid_of_one_structure():
    _, runs, _ = preset("benchmark")
    cells = {(run.config["model"]["width"], run.tokens, str(run.policy)) for run in runs}
    assert len(cells) == 2 * 2 * 12
    assert len({run.policy.traced().structure for run in runs}) == 1
    assert {run.tokens for run in runs} == {2**16, 2**17}


def test_the_papers_sweep_has_its_sizes_budgets_and_precisions():
    sweep, runs, text = preset("paper")
    sizes = {round(run.model.params / 1e6, -1) for run in runs}
    assert sizes == {30, 60, 110, 220}
    assert {run.config["tokens"] for run in runs} == {
        1_500_000_000,
        3_000_000_000,
        6_000_000_000,
        13_000_000_000,
        26_000_000_000,
    }
    assert {run.config["schedule"]["name"] for run in runs} == {"cosine"}
    unquantized = [run for run in runs if str(run.policy) == "none"]
    assert len(unquantized) == 20
    bits = [
        tuple(policy.bits(operand) for operand in ("weights", "activations", "kv_cache"))
        for policy in policies("paper")
    ]
    alone = {place: {b[place] for b in bits if b.count(16) == 2} - {16} for place in range(3)}
    assert alone == {0: {*range(3, 13)}, 1: {*range(4, 13)}, 2: {*range(4, 13)}}
    assert min(min(b[1:]) for b in bits) == 4
    assert all(len({*b} - {16}) <= 1 for b in bits)
    assert any(b[0] == b[1] == b[2] != 16 for b in bits)
    assert sweep.ptq_methods == ("rtn",)
    flops = sum(
        train_flops(run.tokens, matrix_params(run.model), run.model.layers, run.model.width, 1024)
        for run in runs
    )
    assert stated(r"tokens, (\S+) FLOPs", text) == pytest.approx(flops, rel=0.02)
    budget = estimate(runs, 1, ptq=Ptq(sweep.ptq_methods, sweep.ptq_formats, sweep.ptq_at))
    assert stated(r"(\d+) device-hours", text) == pytest.approx(budget.chip_hours["v5e"], rel=1e-4)


def test_the_factorial_has_every_combination_with_every_seed():
    _, runs, text = preset("factorial")
    cells = {
        (*(run.policy.bits(name) for name in ("weights", "activations", "kv_cache")), seed)
        for run in runs
        for seed in [run.config["seed"]]
    }
    assert len(cells) == len(runs)
    levels = [{cell[place] for cell in cells} for place in range(4)]
    assert levels == [{16, 4, 3, 2}, {16, 4, 3}, {16, 3, 2}, {0, 1, 2}]
    assert len({run.tokens for run in runs}) == 1
    ratio = runs[0].tokens / runs[0].model.params
    assert stated(r"D/N = (\d+)", text) == pytest.approx(ratio, abs=0.5)


def test_cooldowns_has_the_demos_budgets_and_policies():
    _, runs, _ = preset("cooldowns")
    _, others, _ = preset("demo")

    def cells(run):
        schedules = (*run.branches, run.schedule)
        return {(run.model.width, str(run.policy), run.tokens_of(s)) for s in schedules}

    assert set().union(*map(cells, runs)) == set().union(*map(cells, others))
    assert all(run.config["schedule"]["name"] == "wsd" for run in runs)
    assert all(len(run.branches) == 1 for run in runs)
