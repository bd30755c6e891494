"""Under stochastic rounding a zero point leaves no end to saturate, and wastes no code it needs."""

import jax
import numpy as np
import pytest

from qat.formats import parse_format
from qat.quantizer import Quantizer
from qat.scales import scale_for

SLACK = 1 + 2.0**-18  # of scales of 20 bits


@jax.jit
def shifted(x, quantizer):
    scale = scale_for(x, quantizer, 0)
    return scale.scale[0], scale.zero_point[0]


def ends():
    """(2, columns): low and high of many proportions, one-sided and empty ones too."""
    random = np.random.default_rng(0)
    low, high = -(random.random(400) ** 4), random.random(400) ** 4
    low[:50], high[50:100], low[100], high[100] = 0, 0, 0, 0
    return np.stack([low, high]).astype(np.float32)


@pytest.mark.parametrize("name", ["uint2", "uint4", "int3", "int4", "int8full"])
def test_no_end_saturates_and_few_codes_are_lost(name):
    low, high = ends()
    quantizer = Quantizer(name, "channel", zero_point=True, rounding="stochastic")
    scale, zero_point = (np.asarray(a, np.float64) for a in shifted(ends(), quantizer.traced()))
    fmt = parse_format(name)
    steps = fmt.max_value - fmt.lowest
    assert (zero_point == np.round(zero_point)).all()
    assert (zero_point >= fmt.lowest).all() and (zero_point <= fmt.max_value).all()
    assert (high <= (fmt.max_value - zero_point) * scale * SLACK).all()
    assert (-low <= (zero_point - fmt.lowest) * scale * SLACK).all()
    one_sided, some = (low == 0) | (high == 0), low < high
    expected = (high.astype(np.float64) - low) / np.where(one_sided, steps, steps - 1)
    assert (scale[some] <= expected[some] * SLACK).all()
    assert one_sided[some].sum() > 90 and (~one_sided).sum() > 200
