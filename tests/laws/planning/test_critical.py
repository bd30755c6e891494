"""Critical tokens against the closed forms of Kumar et al. and Sun et al., and without any."""

import dataclasses

import numpy as np
import pytest

from qat.laws import LAWS
from qat.laws.planning.critical import critical_tokens
from qat.laws.published import published


def kumar(p, params, ptq_bits):
    """Where ``B D^-β`` and ``C_T D^γ_D N^-γ_N e^(-P/γ_post)`` have opposite slopes."""
    falling = p["beta"] * p["B"]
    rising = p["gamma_D"] * p["C_T"] * params ** -p["gamma_N"] * np.exp(-ptq_bits / p["gamma_post"])
    return (falling / rising) ** (1 / (p["gamma_D"] + p["beta"]))


def drawn(name, count=300, spread=0.02):
    rng, fit = np.random.default_rng(0), published(name)
    samples = {p: v * np.exp(spread * rng.standard_normal(count)) for p, v in fit.params.items()}
    return dataclasses.replace(fit, samples=samples)


@pytest.mark.parametrize("params", [3e7, 7e9])
@pytest.mark.parametrize("ptq_bits", [2, 4, 8, 15])
def test_kumar_is_the_closed_form(params, ptq_bits):
    found = critical_tokens(published("kumar"), params, ptq_bits=ptq_bits)
    expected = kumar(published("kumar").params, params, ptq_bits)
    assert found.value == pytest.approx(expected, rel=1e-10)
    assert np.isnan([found.low, found.high]).all()


def test_interval_is_that_of_the_closed_form():
    fit = drawn("kumar")
    found = critical_tokens(fit, 7e9, ptq_bits=4)
    draws = np.sort(kumar(fit.samples, 7e9, 4))
    assert draws[5] < found.low < draws[10]
    assert draws[-11] < found.high < draws[-6]
    assert found.low < found.value < found.high


@pytest.mark.parametrize(
    ("exponent", "mantissa", "trillions"), [(8, 7, 1730), (4, 3, 27), (2, 1, 0.4)]
)
def test_sun_is_what_the_paper_says(exponent, mantissa, trillions):
    found = critical_tokens(
        published("sun"), 1e9, exponent_bits=exponent, mantissa_bits=mantissa, scale_group=128
    )
    p = published("sun").params
    worth = (exponent + 0.5) ** p["delta"] * (mantissa + 0.5) ** p["nu"]
    closed = (p["d"] * p["gamma"] * 1e9 ** p["alpha"] * worth / 7) ** (0.5 / p["beta"])
    assert found.value == pytest.approx(closed, rel=1e-10)
    assert found.value == pytest.approx(trillions * 1e12, rel=0.02)


def test_more_data_always_helps_or_always_hurts():
    assert critical_tokens(published("kumar"), 7e9).value == np.inf
    assert critical_tokens(published("besiroglu"), 7e9).value == np.inf
    assert critical_tokens(published("ouyang"), 7e9, ptq_bits=4).value == 0


def test_a_model_trained_with_no_more_bits_than_it_is_rounded_to_is_not_hurt():
    unified = LAWS["precision_unified"]
    params = published("kumar").params | {"C_w": 0.3, "C_a": 0.3, "C_kv": 0.3}
    fit = dataclasses.replace(published("kumar"), law=unified, params=params)
    assert critical_tokens(fit, 1e9, ptq_bits=4, weight_bits=4).value == np.inf
    six = critical_tokens(fit, 1e9, ptq_bits=4, weight_bits=6).value
    assert critical_tokens(fit, 1e9, ptq_bits=4).value < six < np.inf


def test_infinite_draws_are_kept():
    """Half of the draws say that rounding costs more with more tokens, half the opposite."""
    fit = drawn("kumar", count=100)
    signs = np.where(np.arange(100) < 50, 1.0, -1.0)
    fit = dataclasses.replace(fit, samples=fit.samples | {"gamma_D": 0.5068 * signs})
    found = critical_tokens(fit, 7e9, ptq_bits=4)
    assert found.low < found.value < found.high == np.inf


@pytest.mark.parametrize(
    ("name", "columns", "words"),
    [
        ("kumar", {"params": 0, "ptq_bits": 4}, "params must be a finite number above 0"),
        ("kumar", {"params": 1e9, "ptq_bits": 17}, "at most 16, not 17"),
        ("kumar", {"params": 1e9, "pqt_bits": 4}, "nearest is 'ptq_bits'"),
        ("kumar", {"params": 1e9, "tokens": 4}, "tokens = 4 cannot be fixed here"),
        ("kumar", {"params": 1e9, "activation_bits": 2}, "means nothing at"),
        ("sun", {"params": 1e9}, "also reads exponent_bits, mantissa_bits, scale_group"),
        (
            "besiroglu",
            {"params": 1e9, "ptq_bits": 4},
            "unknown column for law 'chinchilla' 'ptq_bits'",
        ),
    ],
)
def test_refuses(name, columns, words):
    with pytest.raises(ValueError) as caught:
        critical_tokens(published(name), **columns)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_bits_that_were_not_fitted():
    nothing = dict.fromkeys(("C_T", "gamma_D", "gamma_N", "gamma_post"), np.nan)
    fit = published("kumar")
    fit = dataclasses.replace(fit, params=fit.params | nothing)
    assert critical_tokens(fit, 1e9).value == np.inf
    with pytest.raises(ValueError, match="no rows with few ptq_bits"):
        critical_tokens(fit, 1e9, ptq_bits=4)
