"""Papers' constants: that they are complete, and that they give what the papers claim of them."""

import numpy as np
import pandas as pd
import pytest

from qat.laws import LAWS, load
from qat.laws.published import PUBLISHED, published


def runs(**columns):
    return pd.DataFrame({name: np.atleast_1d(value) for name, value in columns.items()})


@pytest.mark.parametrize("name", PUBLISHED)
def test_complete_and_without_intervals(name):
    fit = published(name)
    assert set(fit.params) == set(fit.law.names)
    assert np.isfinite(list(fit.params.values())).all()
    assert not fit.samples
    assert np.isnan(list(fit.intervals.values())).all()
    assert fit.diagnostics.flags == ()
    assert "arXiv" in PUBLISHED[name].reference


def test_four_bits_leave_a_fifth_and_eight_nearly_all():
    params = published("kumar").params
    share = {
        bits: np.prod(
            [1 - np.exp(-bits / params[f"gamma_{x}"] + params[f"n_{x}"]) for x in ("w", "a", "kv")]
        )
        for bits in (4, 8)
    }
    assert share[4] == pytest.approx(0.19, abs=0.005)
    size, tokens = 1e8, 1e10
    few = runs(params=size, tokens=tokens, weight_bits=4, activation_bits=4, kv_bits=4)
    fewer = runs(params=share[4] * size, tokens=tokens)
    sixteen = np.prod(
        [1 - np.exp(-16 / params[f"gamma_{x}"] + params[f"n_{x}"]) for x in ("w", "a", "kv")]
    )
    fewer["params"] /= sixteen
    np.testing.assert_allclose(published("kumar").predict(few), published("kumar").predict(fewer))


def test_chinchilla_at_the_size_of_chinchilla():
    (loss,) = published("besiroglu").predict(runs(params=70e9, tokens=1.4e12))
    assert loss == pytest.approx(482.01 / 70e9**0.3478 + 2085.43 / 1.4e12**0.3658 + 1.8172)


def test_a_term_completes_a_law():
    size = {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658}
    table = runs(params=1e9, tokens=1e11, ptq_bits=4)
    (whole,) = LAWS["ouyang"].predict(size | published("ouyang").params, table)
    (plain,) = published("besiroglu").predict(table)
    added = 0.017 * 1e11**0.5251 / (1e9**0.2261 * 4**5.4967)
    assert whole - plain == pytest.approx(added, rel=1e-9)
    assert published("ouyang").predict(table)[0] == pytest.approx(added, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "at_128"),
    [
        ("chen_w4a4", 0.1582 * 1e11**0.0745 * 7**0.7779 / 1e9**0.2186),
        ("chen_w4a16", 0.2522 * 1e11**0.1610 * 7**0.3533 / 1e9**0.3589),
        ("chen_w16a4", 0.1004 * 1e11**0.0331 * 7**0.9812 / 1e9**0.1816),
    ],
)
def test_groups_of_128(name, at_128):
    (added,) = published(name).predict(runs(params=1e9, tokens=1e11, weight_group=128.0))
    assert added == pytest.approx(at_128, rel=1e-12)


def test_is_saved_and_loaded(tmp_path):
    published("sun").save(tmp_path / "sun.json")
    assert load(tmp_path / "sun.json") == published("sun")


def test_unknown_name():
    with pytest.raises(ValueError, match=r"unknown published law 'kummar'.*nearest is 'kumar'"):
        published("kummar")
