"""What a sweep costs, against sums by hand; and how long it takes to say so."""

import contextlib
import dataclasses
import itertools
import json
import time

import pytest

from configs import experiment, paper_220m
from launch.experiment import Experiment
from launch.sweeps import budget as budgets
from launch.sweeps import calibration as calibrations
from launch.sweeps import probe as probes
from launch.sweeps.budget import Ptq, estimate, prices_of
from launch.sweeps.calibration import Calibration, Probe, calibrate, step_flops
from launch.sweeps.report import report

BATCH, LENGTH, VOCABULARY = 8, 16, 256
STEP_TOKENS = BATCH * LENGTH


def run(width=8, steps=20, policy="none", seed=0, branches=()):
    config = experiment.get_config()
    config.policy = policy
    config.seed = seed
    config.batch_size = BATCH
    config.data.sequence_length = LENGTH
    config.tokens = steps * STEP_TOKENS
    config.model.width = width
    config.model.layers = 1
    config.evaluation_batches = 4
    if branches:
        config.schedule.name = "wsd"
        config.schedule.branches = tuple(branch * STEP_TOKENS for branch in branches)
    return Experiment.from_config(config.to_dict())


def flops_by_hand(width, tokens):
    """Forward and backward, of one layer with two heads that share one key and value."""
    gated = {8: 24, 16: 48}[width]
    kernels = width * (width + 2 * width // 2) + width * width + 3 * width * gated
    return 3 * tokens * (2 * (kernels + width * VOCABULARY) + 4 * width * LENGTH)


STEP = flops_by_hand(8, STEP_TOKENS)


def steady(rate=1e9, compile_s=10.0, import_s=5.0):
    """A machine of one rate for all shapes."""
    return Calibration(2, import_s, (Probe(rate / 100, 1 / 100, compile_s),), 1.0, 20.0)


def test_costs_are_sums_over_runs():
    small, large = run(8, 20), run(16, 30)
    found = estimate([small, run(8, 50, "w4"), large], workers=2)
    assert [shape.runs for shape in found.shapes] == [1, 2]  # the dearest first
    assert found.total("tokens") == (20 + 50 + 30) * STEP_TOKENS
    by_hand = flops_by_hand(8, 70 * STEP_TOKENS) + flops_by_hand(16, 30 * STEP_TOKENS)
    assert found.total("train_flops") == by_hand
    forward = flops_by_hand(8, 2 * STEP_TOKENS) + flops_by_hand(16, STEP_TOKENS)
    assert found.total("eval_flops") == 4 * forward // 3
    assert (found.total("runs"), found.total("rows"), found.total("programs")) == (3, 3, 4)
    assert found.total("compiles") == 2 * 1 + 2 * 2  # two workers share the shape of two runs
    assert found.hours_here is None


def test_branches_share_their_trunk():
    trunk = run(steps=100, branches=(20, 40))
    found = estimate([trunk], workers=1)
    # Cooldowns of a fifth: 4 and 8 steps that are not the trunk's.
    assert found.total("tokens") == (100 + 4 + 8) * STEP_TOKENS
    assert found.total("train_flops") == flops_by_hand(8, found.total("tokens"))
    assert found.total("rows") == 3


@pytest.mark.parametrize(
    ("at", "evaluations", "quantized"),
    [((1.0,), 3, 3 * 6), ((0.25, 0.5, 1.0), 3 + 2, (3 + 2) * 6), ((0.5,), 3 + 1, 6)],
)
def test_quantizing_after_training_costs_evaluations(at, evaluations, quantized):
    trunk = run(steps=100, branches=(20, 40))
    ptq = Ptq(("rtn", "other"), ("int2/channel", "int3/channel", "e2m1/channel"), at)
    found = estimate([trunk], workers=1, ptq=ptq)
    assert found.total("evaluations") == evaluations
    assert found.total("ptq_evaluations") == quantized
    assert found.total("rows") == evaluations + quantized
    forward = 4 * flops_by_hand(8, STEP_TOKENS) // 3
    assert found.total("eval_flops") == forward * (evaluations + quantized)


def test_formats_of_another_structure_are_compiled():
    def programs(*formats):
        return estimate([run()], 1, ptq=Ptq(("rtn",), formats)).total("programs")

    assert programs() == programs("int2/channel", "e4m3/channel") == 2
    assert programs("int2/channel", "int2/block:4", "int3/block:4", "nf4") == 4
    without_method = Ptq((), ("int2/block:4",), (0.5,))
    assert estimate([run()], 1, ptq=without_method).total("rows") == 1


def test_structures_of_all_runs_are_compiled_but_not_what_none_is_rounded_to():
    def programs(runs, *formats):
        return estimate(runs, 1, ptq=Ptq(("rtn",), formats)).total("programs")

    assert programs([run(policy="w2")], "int4/block:4", "int3/block:4") == 2  # no fewer bits
    assert programs([run(policy="w2"), run(policy="w5")], "int4/block:4", "int3/block:4") == 3
    assert programs([run(policy="w5"), run(policy="w2")], "int4/block:4") == 3


def test_hours_here_share_runs_among_workers():
    runs = [run(seed=seed) for seed in range(6)]
    per_run_s = (20 * STEP + 4 * STEP // 3) / 1e9
    found = estimate(runs, workers=2, calibration=steady())
    compiling_s = 10.0 + 5.0 + 5.0  # the step, initialisation and evaluation
    assert found.hours_here * 3600 == pytest.approx(5 + compiling_s + 3 * per_run_s)
    more_workers_than_runs = estimate(runs, workers=60, calibration=steady())
    assert more_workers_than_runs.hours_here * 3600 == pytest.approx(5 + compiling_s + per_run_s)


def test_the_longest_run_is_waited_for():
    runs = [run(steps=10_000), *(run(seed=seed) for seed in range(1, 4))]
    found = estimate(runs, workers=4, calibration=steady(rate=1e6, compile_s=0.0))
    assert found.hours_here * 3600 == pytest.approx(5 + (10_000 * STEP + 4 * STEP // 3) / 1e6)


def test_rates_are_carried_over_in_log_flops():
    known = (Probe(1e6, 1.0, 4.0), Probe(1e8, 10.0, 8.0))  # 1e6 and 1e7 FLOPs a second
    calibration = Calibration(1, 1.0, known, 1.0, 20.0)
    assert calibration.rate(1e7) == pytest.approx((1e6 + 1e7) / 2)
    assert calibration.compile_s(1e7) == pytest.approx(6)
    assert (calibration.rate(1.0), calibration.rate(1e20)) == (1e6, 1e7)


def test_accelerators_run_at_a_share_of_their_peak():
    runs = [run(steps=10**9)]
    found = estimate(runs, 1, chips=4, utilisation=0.25, prices={"v5e": 2.0, "H100": 3.0})
    flops = found.total("train_flops") + found.total("eval_flops")
    assert found.chip_hours["v5e"] == pytest.approx(flops / (197e12 * 0.25) / 3600)
    assert found.chip_hours["v5p"] == pytest.approx(flops / (459e12 * 0.25) / 3600)
    assert found.chip_hours["v6e"] == pytest.approx(flops / (918e12 * 0.25) / 3600)
    assert found.chip_hours["H100"] == pytest.approx(flops / (989.5e12 * 0.25) / 3600)
    assert found.money == pytest.approx(
        {"v5e": 2 * found.chip_hours["v5e"], "H100": 3 * found.chip_hours["H100"]}
    )
    text = report(found)
    assert "25% of the bfloat16 peak" in text
    line = next(line for line in text.splitlines() if line.startswith("v5e"))
    assert line.split()[-1] == f"{found.money['v5e']:,.2f}"
    hours, chip_hours = (float(word.replace(",", "")) for word in line.split()[2:4])
    assert hours == pytest.approx(chip_hours / 4, rel=0.01)


def test_a_report_tells_no_price_and_no_time_that_nobody_gave():
    text = report(estimate([run()], 1))
    assert "money" not in text
    assert "this machine was not timed" in text
    assert "40% of the bfloat16 peak" in text


def test_a_report_doubts_what_was_cut():
    calibration = steady()
    assert "cut" not in report(estimate([run()], 1, calibration=calibration))
    cut = tuple(dataclasses.replace(each, cut=True) for each in calibration.probes)
    doubtful = dataclasses.replace(calibration, probes=cut)
    assert "upper bound" in report(estimate([run()], 1, calibration=doubtful))


def test_a_report_leaves_out_no_shape():
    widths = [8, 16, 24, 32]
    found = estimate([run(width) for width in widths], 1, calibration=steady())
    whole, short = report(found), report(found, most=1)
    for shape in found.shapes:
        assert f"{shape.params:,}" in whole
    assert "3 cheaper shapes" in short
    share = found.shapes[0].flops / sum(shape.flops for shape in found.shapes)
    assert f"{share:.1%}" in short
    assert f"{1 - share:.1%}" in short


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experiments": []}, "no runs"),
        ({"workers": 0}, "workers = 0"),
        ({"chips": 0}, "chips = 0"),
        ({"utilisation": 0.0}, "utilisation = 0.0"),
        ({"utilisation": 1.5}, "utilisation = 1.5"),
        ({"utilisation": float("nan")}, "utilisation = nan"),
        ({"prices": {"v5e": -1.0}}, "price of v5e = -1.0"),
        ({"prices": {"v5": 1.0}}, "nearest is 'v5"),
        ({"ptq": Ptq(("rtn",), ("imt4",))}, "nearest"),
    ],
)
def test_bad_numbers_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        estimate(**{"experiments": [run()], "workers": 1, **changes})


def test_prices_are_read_from_a_flag():
    assert prices_of(["v5e:1.2", "H100:3"]) == {"v5e": 1.2, "H100": 3.0}
    for word in ("v5e", "v5e:", "v5e=1", "v5e:cheap"):
        with pytest.raises(ValueError, match=r"such as 'v5e:1\.2'"):
            prices_of([word])
    with pytest.raises(ValueError, match=r"'v5e:2': v5e has one already, 1\.2"):
        prices_of(["v5e:1.2", "v5e:2"])
    with pytest.raises(ValueError, match="nearest is 'H100'"):
        prices_of(["h1000:3"])


@pytest.mark.parametrize("policy", ["none", "w4a8kv4", "wnf4", "wmxfp4amxfp8", "w8a8, native"])
def test_a_shape_needs_no_arrays_to_be_known(policy):
    found = run(policy=policy).policy
    assert found.structure == found.traced().structure


def test_what_is_too_dear_is_timed_in_part():
    dear = Experiment.from_config(paper_220m.get_config().to_dict())
    cut = calibrations._cut(dear.config)
    assert step_flops(dear) > 1e12
    assert 1e8 < step_flops(cut) < 1e11
    assert (cut.model.width, cut.model.vocabulary) == (dear.model.width, dear.model.vocabulary)
    cheap = calibrations._cut(run().config)
    assert (cheap.model, step_flops(cheap)) == (run().model, STEP)


@pytest.mark.parametrize(("count", "workers"), [(3, 1), (3, 2), (3, 3), (2, 5), (1, 4)])
def test_every_shape_has_a_worker_and_every_worker_a_shape(count, workers):
    shares = [calibrations._share(count, workers, worker) for worker in range(workers)]
    assert all(shares)
    assert set(itertools.chain(*shares)) == set(range(count))


def test_step_functions_take_turns_until_the_time_is_over():
    calls = []

    def sleeper(name, seconds):
        def step(count):
            calls.append(name)
            time.sleep(count * seconds)

        return step

    found = probes._timed([sleeper("a", 0.01), sleeper("b", 0.05)], seconds=1.0)
    assert found == pytest.approx([0.01, 0.05], rel=0.5)
    assert calls == ["a", "b"] * (len(calls) // 2)
    assert probes._timed([sleeper("a", 0.01)], seconds=0.0) == pytest.approx([0.01], rel=0.5)


@pytest.mark.slow
def test_a_calibration_times_real_steps(monkeypatch):
    monkeypatch.setattr(calibrations, "_LEAST_S", 0.5)
    start = time.monotonic()
    found = calibrate([run(), run(seed=1, policy="w4")], seconds=1.0, workers=1)
    elapsed = time.monotonic() - start
    (probe,) = found.probes
    assert probe.flops == STEP
    assert not probe.cut
    assert 1e-5 < probe.step_s < probe.compile_s < elapsed
    assert 0 < found.import_s < elapsed
    assert found.seconds == pytest.approx(elapsed, rel=0.1)
    assert found.workers == 1
    assert 0 < found.core_share < 1.5


def test_a_calibration_takes_the_mean_of_workers_and_tells_what_it_cut(monkeypatch):
    """One probe in two workers, whose processes are played."""
    monkeypatch.setattr(calibrations, "_AFFORDABLE", STEP / 2)
    answers = iter([1.0, 3.0])

    class Played:
        def __init__(self):
            self.seconds = next(answers)
            self.left = ["step_s", "compile_s"]

        def ask(self, question):
            assert question >= 3.0

        def answer(self):
            return {
                self.left.pop(): [self.seconds],
                "import_s": 2 * self.seconds,
                "core_share": 0.5,
            }

    played = lambda configs, worker: contextlib.nullcontext(Played())  # noqa: E731
    monkeypatch.setattr(calibrations, "_process", played)
    found = calibrate([run()], seconds=0.0, workers=2)
    assert found.probes == (Probe(STEP / 2, 2.0, 2.0, cut=True),)
    assert (found.import_s, found.core_share) == (4.0, 0.5)
    assert "50% of a core (too many workers" in report(estimate([run()], 2, calibration=found))


def test_a_failing_calibration_says_why():
    broken = run()
    config = {**broken.config, "data": {**broken.config["data"], "tokenizer": "bpe:9"}}
    process = calibrations._process([{**config, "policy": "w99x"}], 0)
    with process as asked, pytest.raises(OSError, match=r"exit code 1: ValueError: .+"):
        asked.answer()


@pytest.mark.parametrize("arguments", [([], 1.0, 1), ([run()], 1.0, 0)])
def test_a_calibration_needs_runs_and_workers(arguments):
    with pytest.raises(ValueError, match="expected at least 1 of each"):
        calibrate(*arguments)


def test_thousands_of_runs_are_planned_in_seconds():
    """10,000 take some 2 seconds, and twice that where annotations are checked, as here."""
    base = json.dumps(run().config)
    letters = itertools.product(range(2, 9), range(2, 9), range(2, 9))
    policies = [f"w{w}a{a}kv{kv}" for w, a, kv in letters]
    configs = []
    for seed in range(2000):
        config = json.loads(base)
        config |= {"seed": seed, "policy": policies[seed % len(policies)]}
        config["model"]["width"] = 8 * (1 + seed % 10)
        configs.append(config)
    start = time.process_time()
    runs = [Experiment.from_config(config) for config in configs]
    found = estimate(runs, 8, ptq=Ptq(("rtn",), ("int4/channel",)), calibration=steady())
    report(found)
    assert time.process_time() - start < 3.0
    assert (found.total("runs"), len(found.shapes)) == (2000, 10)
    assert len({each.config_hash for each in runs}) == 2000


def test_a_budget_is_only_numbers():
    found = estimate([run()], 1, calibration=steady())
    assert json.loads(json.dumps(dataclasses.asdict(found)))["shapes"][0]["runs"] == 1
    assert set(budgets.ACCELERATORS) == set(found.chip_hours)
