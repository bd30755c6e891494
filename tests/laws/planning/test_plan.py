"""Plans against closed forms, scipy and the papers' claims; what is flagged, what is refused."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brentq, minimize

from qat import laws
from qat.laws import LAWS
from qat.laws.forms.free import free
from qat.laws.planning.cost import Hardware
from qat.laws.planning.plan import plan
from qat.laws.published import published
from tests.laws.runs import chinchilla_runs

pytestmark = pytest.mark.usefixtures("optimized")

KUMAR = published("kumar")
CHINCHILLA = published("besiroglu")
OFFSETS = {"n_w", "n_a", "n_kv"}
PLAIN = dataclasses.replace(
    KUMAR,
    law=LAWS["precision_plain"],
    params={name: value for name, value in KUMAR.params.items() if name not in OFFSETS},
)
ROUNDING = ("C_T", "gamma_D", "gamma_N", "gamma_post")


def drawn(fit, count=40, spread=0.01):
    rng = np.random.default_rng(0)
    draws = {p: v * np.exp(spread * rng.standard_normal(count)) for p, v in fit.params.items()}
    return dataclasses.replace(fit, samples=draws)


def without(fit, *names):
    return dataclasses.replace(fit, params=fit.params | dict.fromkeys(names, np.nan))


def tail(p, bits):
    """``e_x = exp(-P/γ_x + n_x)`` of the three operands."""
    return {x: np.exp(-bits / p[f"gamma_{x}"] + p.get(f"n_{x}", 0.0)) for x in ("w", "a", "kv")}


def tied_equation(p, bits):
    """Zero at the bits that are best whatever the budget."""
    return sum(bits / p[f"gamma_{x}"] * e / (1 - e) for x, e in tail(p, bits).items()) - 1


def kumar_loss(p, params, tokens, bits):
    effective = params * np.prod([1 - e for e in tail(p, bits).values()])
    return p["A"] * effective ** -p["alpha"] + p["B"] * tokens ** -p["beta"] + p["E"]


def best_size(p, flops, share=1.0):
    """Chinchilla's closed form; ``share`` of N is effective."""
    a, b = p["alpha"], p["beta"]
    balance = (a * p["A"] * share**-a / (b * p["B"])) ** (1 / (a + b))
    return balance * (flops / 6) ** (b / (a + b))


@pytest.mark.parametrize("flops", [1e18, 1e21, 1e25])
def test_seven_bits_at_every_budget(flops):
    found = plan(KUMAR, flops)
    assert found.bits.value == pytest.approx(7.00, abs=0.01)
    assert tied_equation(KUMAR.params, found.bits.value) == pytest.approx(0, abs=1e-5)
    share = np.prod([1 - e for e in tail(KUMAR.params, found.bits.value).values()])
    size = best_size(KUMAR.params, flops * 16 / found.bits.value, share)
    assert found.params.value == pytest.approx(size, rel=1e-6)
    spent = 6 / 16 * found.params.value * found.tokens.value * found.bits.value
    assert spent == pytest.approx(flops)
    lowest = kumar_loss(KUMAR.params, found.params.value, found.tokens.value, found.bits.value)
    assert found.loss.value == pytest.approx(lowest, rel=1e-12)
    assert found.flags == ()


def test_half_of_that_without_offsets():
    found = plan(PLAIN, 1e21)
    assert found.bits.value == pytest.approx(
        brentq(lambda bits: tied_equation(PLAIN.params, bits), 2, 9), abs=1e-5
    )
    assert found.bits.value == pytest.approx(3.5, abs=0.05)


@pytest.mark.parametrize("flops", [1e17, 1e21, 1e24])
def test_chinchilla_is_the_closed_form(flops):
    found = plan(CHINCHILLA, flops)
    assert found.params.value == pytest.approx(best_size(CHINCHILLA.params, flops), rel=1e-6)
    assert found.bits is None
    assert found.near_optimal["bits"].tolist() == [16]
    assert found.tokens_per_param.value == pytest.approx(
        found.tokens.value / found.params.value, rel=1e-12
    )


def test_bits_grow_with_the_logarithm_of_a_budget_for_a_model_of_one_size():
    budgets = np.array([1e20, 1e21, 1e22])
    bits = [plan(KUMAR, flops, params=1e9).bits.value for flops in budgets]
    for flops, found in zip(budgets, bits, strict=True):
        near = minimize(
            lambda b, c=flops: kumar_loss(KUMAR.params, 1e9, c * 16 / 6e9 / b[0], b[0]),
            [8.0],
            method="Nelder-Mead",
            options={"xatol": 1e-9, "fatol": 1e-15},
        )
        assert found == pytest.approx(near.x[0], abs=1e-4)
    steps = np.diff(bits)
    assert (steps > 1).all()
    assert steps[0] == pytest.approx(steps[1], rel=0.1)


def test_intervals_are_those_of_every_draws_own_optimum():
    fit = drawn(CHINCHILLA, count=400)
    found = plan(fit, 1e21)
    sizes = np.sort(best_size(fit.samples, 1e21))
    assert sizes[8] < found.params.low < sizes[12]
    assert sizes[-13] < found.params.high < sizes[-9]
    for name in ("params", "tokens", "tokens_per_param", "loss"):
        estimate = getattr(found, name)
        assert estimate.low < estimate.value < estimate.high
    pd.testing.assert_series_equal(
        found.frame().loc["params"],
        pd.Series(dataclasses.asdict(found.params), name="params"),
    )


def test_bits_have_an_interval():
    fit = drawn(KUMAR)
    found = plan(fit, 1e21)
    params = [{n: draws[s] for n, draws in fit.samples.items()} for s in range(40)]
    best = sorted(brentq(lambda b, p=p: tied_equation(p, b), 5, 12) for p in params)
    assert [found.bits.low, found.bits.high] == pytest.approx([best[0], best[-1]], abs=1e-5)
    assert found.bits.low < found.bits.value < found.bits.high
    excess = found.near_optimal.set_index("bits")
    assert (excess["excess_loss"] >= 0).all()
    assert (excess["excess_low"] >= 0).all()
    assert (excess["excess_low"] <= excess["excess_high"]).all()
    assert excess["excess_loss"].idxmin() == 7


def test_near_optimal_sets():
    found = plan(KUMAR, 1e21, tolerance=2e-3)
    table = found.near_optimal.set_index("bits")
    for bits in (4, 6, 8, 12, 16):
        share = np.prod([1 - e for e in tail(KUMAR.params, bits).values()])
        size = best_size(KUMAR.params, 1e21 * 16 / bits, share)
        loss = kumar_loss(KUMAR.params, size, 1e21 * 16 / 6 / bits / size, bits)
        assert table.loc[bits, "params"] == pytest.approx(size, rel=1e-6)
        assert table.loc[bits, "excess_loss"] == pytest.approx(loss - found.loss.value, abs=1e-9)
        assert table.loc[bits, "within_tolerance"] == (loss <= 1.002 * found.loss.value)
    assert np.isinf(table.loc[3, "loss"])
    assert not table.loc[3, "within_tolerance"]


def test_near_optimal_sizes():
    found = plan(CHINCHILLA, 1e21)
    p, best = CHINCHILLA.params, found.params.value

    def excess(log_size):
        size = np.exp(log_size)
        loss = p["A"] * size ** -p["alpha"] + p["B"] * (1e21 / 6 / size) ** -p["beta"] + p["E"]
        return loss / found.loss.value - 1.001

    ends = [np.exp(brentq(excess, np.log(best), np.log(best * by))) for by in (0.1, 10)]
    assert found.near_optimal_params == pytest.approx(ends, rel=0.025)
    assert plan(CHINCHILLA, 1e21, tolerance=100.0).near_optimal_params == (0, np.inf)


def test_a_chip_is_used_at_a_width_it_has():
    chip = Hardware({8: 1.99}, quantized_share=1.0)
    found = plan(drawn(KUMAR), 1e21, cost=chip)
    assert found.bits.value == found.bits.low == found.bits.high == 8.0
    spent = 6 * found.params.value * found.tokens.value / 1.99
    assert spent == pytest.approx(1e21)
    # A third of the FLOPs twice as fast does not pay for what eight bits lose.
    assert plan(KUMAR, 1e21, cost="v5e").bits.value == 16


def test_rounding_to_four_bits_prefers_fewer_tokens_a_parameter():
    plain, rounded = plan(KUMAR, 1e27, bits=16), plan(KUMAR, 1e27, bits=16, ptq_bits=4)
    assert rounded.tokens.value < 0.2 * plain.tokens.value
    assert rounded.params.value > plain.params.value
    assert rounded.loss.value > plain.loss.value


def test_serving_is_paid_out_of_the_budget():
    fit, tokens = KUMAR, 1e12
    found = plan(fit, 1e22, bits=8, ptq_bits=4, inference_tokens=tokens)
    size = found.params.value
    trained, served = 6 * size * found.tokens.value * 8 / 16, 2 * size * tokens * 20 / 3 / 16
    assert trained + served == pytest.approx(1e22)
    assert size < plan(fit, 1e22, bits=8, ptq_bits=4).params.value


def test_one_operand_alone():
    """Weights at P and the others at 16, so that a bit is a third of a bit of the price."""
    found = plan(KUMAR, 1e21, operands=["weight_bits"])
    p = KUMAR.params

    def slope(bits):  # of log share against log price, balanced at any budget
        e = np.exp(-bits / p["gamma_w"] + p["n_w"])
        return e / (1 - e) / p["gamma_w"] - 1 / (bits + 32)

    assert found.bits.value == pytest.approx(brentq(slope, 1, 16), abs=1e-4)
    assert found.operands == ("weight_bits",)


def test_other_laws_with_their_own_columns():
    sun = plan(
        published("sun"), 1e21, exponent_bits=4, mantissa_bits=3, scale_group=128, weight_bits=8
    )
    assert sun.bits is None
    spent = 6 * sun.params.value * sun.tokens.value * 40 / 3 / 16
    assert spent == pytest.approx(1e21)
    levels = free({"weight_bits": (4, 8)})
    efficiencies = {"eff_w4": 0.5, "eff_w8": 0.99}
    fit = dataclasses.replace(CHINCHILLA, law=levels, params=CHINCHILLA.params | efficiencies)
    found = plan(fit, 1e21, operands=["weight_bits"])
    assert found.bits.value in (4, 8, 16)
    assert np.isfinite(found.near_optimal.set_index("bits")["loss"]).sum() == 3


def test_bits_without_data_stay_at_sixteen_and_that_is_said():
    found = plan(without(KUMAR, "gamma_kv", "n_kv"), 1e21)
    assert found.operands == ("weight_bits", "activation_bits")
    assert "kv_bits stays at 16: the fit has no rows with fewer" in str(found)
    with pytest.raises(ValueError, match="no rows with few kv_bits"):
        plan(without(KUMAR, "gamma_kv", "n_kv"), 1e21, operands=["weight_bits", "kv_bits"])
    with pytest.raises(ValueError, match="no rows with few ptq_bits"):
        plan(without(KUMAR, *ROUNDING), 1e21, ptq_bits=4)


def test_what_is_at_an_end_is_no_optimum():
    found = plan(KUMAR, 1e24, params=1e8)
    assert found.bits.value == 16
    assert "bits = 16 is where the search ended" in found.flags[0]
    with pytest.raises(ValueError, match="'ouyang_term' is what rounding adds, no loss to plan"):
        plan(published("ouyang"), 1e21)
    rounded = plan(KUMAR, 1e24, params=1e8, ptq_bits=3)
    assert "fewer tokens than the budget pays for would lower the loss" in str(rounded)
    assert "fewer tokens" not in str(plan(KUMAR, 1e20, params=1e9, bits=16, ptq_bits=8))


def test_is_readable():
    text = str(plan(drawn(KUMAR), 1e21))
    assert "bits         7.002 (" in text
    assert "  bits       6, 7, 8, 9" in text
    assert "nats per token" in text


@pytest.mark.parametrize(
    ("fit", "asked", "words"),
    [
        (KUMAR, {"flops": 0}, "flops must be a finite number above 0, not 0"),
        (KUMAR, {"flops": "1e21"}, "flops must be a finite number"),
        (KUMAR, {"params": -1}, "params must be"),
        (KUMAR, {"bits": 17}, "bits must be a finite number above 0 and at most 16, not 17"),
        (KUMAR, {"ptq_bits": 0}, "ptq_bits must be"),
        (KUMAR, {"ptq_bits": "4"}, "ptq_bits must be"),
        (KUMAR, {"tolerance": 0}, "tolerance must be"),
        (KUMAR, {"inference_tokens": -1}, "inference_tokens must not be negative"),
        (KUMAR, {"inference_tokens": 1e30}, "serving inference_tokens = 1e+30 costs at least"),
        (KUMAR, {"operands": ["weights"]}, "nearest is 'weight_bits'"),
        (KUMAR, {"cost": "v5"}, "unknown cost 'v5'"),
        (KUMAR, {"weigth_bits": 4}, "nearest is 'weight_bits'"),
        (KUMAR, {"kv_bits": 4, "operands": ["kv_bits"]}, "kv_bits = 4 cannot be fixed here"),
        (KUMAR, {"widths": ()}, "widths must hold"),
        (KUMAR, {"widths": (0,)}, "each of widths must be"),
        (KUMAR, {"bits": 3}, "pays for no run that law 'precision' has a loss for"),
        (KUMAR, {"flops": 1e6}, "pays for no run"),
        (CHINCHILLA, {"bits": 8}, "bits = 8 would have no effect"),
        (CHINCHILLA, {"ptq_bits": 4}, "unknown column for law 'chinchilla' 'ptq_bits'"),
        (CHINCHILLA, {"operands": ["weight_bits"]}, "does not read weight_bits"),
        (published("sun"), {}, "also reads exponent_bits, mantissa_bits, scale_group"),
    ],
)
def test_refuses(fit, asked, words):
    with pytest.raises(ValueError) as caught:
        plan(fit, **{"flops": 1e21, **asked})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_far_from_what_was_fitted_is_said():
    frame = chinchilla_runs(noise=2e-3)
    fit = laws.fit("chinchilla", frame, bootstrap=20, starts=32)
    near = laws.plan(fit, 6 * 1e9 * 3e10)
    assert not any("times the most" in flag for flag in near.flags)
    far = laws.plan(fit, 1e26)
    assert any(f.startswith("params = ") and "times the most" in f for f in far.flags)
    little = laws.plan(fit, 1e13)
    assert any(f.startswith("tokens = ") and "times the least" in f for f in little.flags)
    doubtful = dataclasses.replace(fit.diagnostics, unidentified=("B", "beta"))
    doubted = laws.plan(dataclasses.replace(fit, diagnostics=doubtful), 1e21)
    assert "the rows of the fit do not identify B, beta" in doubted.flags
