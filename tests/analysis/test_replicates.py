"""Scatter within settings, against a simulation and by hand."""

import numpy as np
import pandas as pd
import pytest

from qat.analysis.replicates import scatter


def test_by_hand():
    table = pd.DataFrame({"n": [1, 1, 2, 2, 2, 3], "loss": [1.0, 3.0, 5.0, 6.0, 7.0, 100.0]})
    found = scatter(table, ["n"], "loss")
    assert found.freedom == 3
    assert found.deviation == pytest.approx(np.sqrt((2 + 2) / 3))


def test_the_interval_covers():
    rng = np.random.default_rng(0)
    setting = np.repeat(np.arange(10), 3)
    covered = 0
    for _ in range(400):
        values = setting + rng.normal(0, 0.5, 30)
        found = scatter(pd.DataFrame({"s": setting, "x": values}), ["s"], "x")
        covered += found.low <= 0.5 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_without_repetitions_nothing_is_known():
    found = scatter(pd.DataFrame({"n": [1, 2], "loss": [1.0, 2.0]}), ["n"], "loss")
    assert np.isnan(found.deviation)
    assert found.freedom == 0
