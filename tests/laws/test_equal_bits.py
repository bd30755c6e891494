"""Widths at equal total bits on curves that cross where a closed form says."""

import numpy as np
import pandas as pd
import pytest

from qat.laws import equal_bits


def runs():
    """Loss = 5 N^-0.1 + cost of the width: 4 bits are worth it from the smallest models on."""
    cost = {16: 0.0, 8: 0.001, 4: 0.02, 2: 1.0}
    grid = [(n, bits) for n in np.geomspace(1e6, 1e9, 13) for bits in cost]
    frame = pd.DataFrame(grid, columns=["params", "ptq_bits"])
    return frame.assign(tokens=1e9, loss=5 * frame.params**-0.1 + frame.ptq_bits.map(cost))


def test_the_best_width_is_that_of_the_closed_form():
    found = equal_bits(runs())
    for row in found.itertuples():
        expected = {}
        for bits, cost in {16: 0.0, 8: 0.001, 4: 0.02, 2: 1.0}.items():
            if row.total_bits / bits * (1 + 1e-9) >= 1e6 and row.total_bits / bits <= 1e9 * 1.0001:
                expected[bits] = 5 * (row.total_bits / bits) ** -0.1 + cost
        best = min(expected, key=expected.get)
        assert row.bits == best
        assert row.loss == pytest.approx(expected[best], rel=2e-3)  # between sizes it is straight
        assert row.margin == pytest.approx(sorted(expected.values())[1] - expected[best], abs=5e-3)
    assert set(found.bits) == {4.0, 8.0}


def test_total_bits_of_the_rows_count_scales():
    frame = runs()
    heavy = frame.assign(total_bits=frame.params * (frame.ptq_bits + 8))
    assert equal_bits(heavy).total_bits.min() > equal_bits(frame).total_bits.min()


def test_widths_without_overlap_are_refused():
    with pytest.raises(ValueError, match="no two values of ptq_bits have models of overlapping"):
        equal_bits(runs().query("ptq_bits == 16"))
    with pytest.raises(ValueError, match="each needs at least two sizes"):
        equal_bits(runs().query("params == 1e6"))
