"""The test of independence on tables that are independent, and on one that is not."""

import itertools

import numpy as np
import pandas as pd
import pytest

from qat import laws
from qat.analysis.independence import independence, is_testable
from tests.laws.runs import ACTIVATIONS, KV_CACHE, PTQ, TRAINED, WEIGHTS

pytestmark = pytest.mark.usefixtures("optimized")

ALONE = [(16, 16, 16), (4, 16, 16), (6, 16, 16), (16, 4, 16), (16, 6, 16), (16, 16, 4)]
JOINT = [(4, 4, 16), (4, 6, 16), (6, 6, 4), (4, 4, 4)]
CONSTANTS = TRAINED | WEIGHTS | ACTIVATIONS | KV_CACHE | dict.fromkeys(PTQ, np.nan)


def runs(factor=1.0, seed=0, noise=1e-3):
    """Ten settings at twelve sizes and budgets; `factor` on N of those with 4 bits of both."""
    grid = itertools.product((3e7, 6e7, 1.1e8, 2.2e8), (20, 60, 200), ALONE + JOINT)
    rows = [(n, n * ratio, *setting) for n, ratio, setting in grid]
    names = ["params", "tokens", "weight_bits", "activation_bits", "kv_bits"]
    frame = pd.DataFrame(rows, columns=names)
    both = (frame.weight_bits == 4) & (frame.activation_bits == 4)
    effective = frame.assign(params=frame.params * np.where(both, factor, 1.0))
    loss = laws.get_law("precision").predict(CONSTANTS, effective)
    noisy = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(frame)))
    return frame.assign(loss=noisy)


def test_the_product_is_not_rejected_where_it_holds():
    p_values = [independence(runs(seed=s), resamples=99, starts=8).p_value for s in range(4)]
    assert min(p_values) > 0.01
    assert np.mean(np.array(p_values) < 0.5) < 0.9


def test_a_broken_setting_is_found_and_mapped():
    found = independence(runs(factor=0.8), resamples=199, starts=16)
    assert found.p_value == pytest.approx(1 / 200)
    settings = found.settings.set_index(["weight_bits", "activation_bits", "kv_bits"])
    broken = settings[settings.breaks]
    assert set(broken.index) == {(4, 4, 16), (4, 4, 4)}
    np.testing.assert_allclose(broken.factor, 0.8, rtol=0.03)
    assert (settings.low < settings.factor).all()
    assert (settings.factor < settings.high).all()
    # What the factor costs, in nats: the size term with 0.8 N_eff less that with N_eff.
    at = runs(factor=0.8, noise=0).query("weight_bits == 4 & activation_bits == 4 & kv_bits == 16")
    product = runs(factor=1.0, noise=0).loc[at.index, "loss"]
    assert settings.excess[4, 4, 16] == pytest.approx((at.loss - product).mean(), rel=0.1)


def test_joint_runs_without_their_marginals_are_left_out_and_named():
    frame = runs().query("kv_bits == 16 | weight_bits != 16")  # no KV cache alone
    found = independence(frame, resamples=20, starts=8)
    assert found.without_marginal == ((4.0, 4.0, 4.0), (6.0, 6.0, 4.0))
    assert len(found.settings) == 2


def test_rounded_rows_do_not_take_part():
    frame = runs()
    rounded = frame.assign(ptq_bits=3, loss=frame.loss + 1)
    both = pd.concat([frame, rounded], ignore_index=True)
    assert independence(both, resamples=20, starts=8).p_value == (
        independence(frame, resamples=20, starts=8).p_value
    )


def test_without_joint_runs_there_is_nothing_to_test():
    frame = runs().query("weight_bits == 16 | activation_bits == 16").query("kv_bits == 16")
    assert not is_testable(laws.as_table(frame))
    assert is_testable(laws.as_table(runs()))
    with pytest.raises(ValueError, match="no run is quantized in two operands or more"):
        independence(frame)
