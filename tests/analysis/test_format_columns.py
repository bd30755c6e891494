"""Errors of formats on normal values against integrals, tables and random numbers."""

import itertools

import ml_dtypes
import numpy as np
import pandas as pd
import pytest
from scipy import integrate, optimize, stats

from qat.analysis.format_columns import best_clip, gaussian_error, with_format_columns


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_errors_are_those_of_uniform_quantizers_of_an_odd_number_of_levels(bits):
    """2^b - 1 evenly spaced levels with zero among them, the best step found by scipy."""
    levels = 2 ** (bits - 1) - 1

    def mean_square(step):
        edges = [-10, *((np.arange(-levels, levels) + 0.5) * step), 10]
        parts = zip(itertools.pairwise(edges), np.arange(-levels, levels + 1) * step, strict=True)
        return sum(
            integrate.quad(lambda x, q=q: (x - q) ** 2 * stats.norm.pdf(x), *part)[0]
            for part, q in parts
        )

    best = optimize.minimize_scalar(
        mean_square, bounds=(0.2 / levels, 5 / levels), method="bounded"
    )
    assert gaussian_error(f"int{bits}") == pytest.approx(best.fun, rel=2e-3)
    assert best_clip(f"int{bits}") == pytest.approx(best.x * levels, rel=0.02)


def test_binary_error_is_the_closed_form():
    """±c with c = sqrt(2/π): 1 - 2/π."""
    assert best_clip("binary") == pytest.approx(np.sqrt(2 / np.pi), rel=0.01)
    assert gaussian_error("binary") == pytest.approx(1 - 2 / np.pi, rel=1e-4)


def test_error_of_a_float_is_that_of_random_values():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(400_000).astype(np.float32)
    scale = best_clip("e2m1") / 6
    rounded = np.clip(values / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    error = np.mean((rounded * scale - values) ** 2)
    assert gaussian_error("e2m1") == pytest.approx(error, rel=0.01)


def test_more_bits_are_nearer_and_none_is_exact():
    errors = [gaussian_error(f"int{bits}") for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert gaussian_error("none") == 0.0


def test_columns_of_rows():
    rows = pd.DataFrame(
        {
            "weight_format": ["e4m3", "int4", "none"],
            "activation_format": ["none", "int8", None],
            "loss": [1.0, 2.0, 3.0],
        }
    )
    found = with_format_columns(rows)
    assert found.exponent_bits.tolist() == [4, 0, 8]
    assert found.mantissa_bits.tolist() == [3, 3, 7]
    assert found.weight_error.tolist() == [gaussian_error("e4m3"), gaussian_error("int4"), 0.0]
    assert found.activation_error.tolist() == [0.0, gaussian_error("int8"), 0.0]
    assert "kv_error" not in found
    kept = with_format_columns(rows.assign(exponent_bits=1.0))
    assert kept.exponent_bits.tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="unknown format 'e4n3'"):
        with_format_columns(rows.assign(weight_format="e4n3"))
