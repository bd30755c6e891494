"""The numbers that a quantizer is given are checked where Python knows them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.quantization import fake_quant
from qat.quantizer import Quantizer

X = jnp.linspace(-3, 3, 16)


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": "fixed", "value": -1.0}, "expected finite numbers above 0, got -1.0"),
        ({"scale": "fixed", "value": 0}, "expected finite numbers above 0, got 0"),
        ({"scale": "fixed", "value": float("nan")}, "expected finite numbers above 0, got nan"),
        ({"scale": "fixed", "value": np.asarray([1.0, -2.0])}, "expected finite numbers above 0"),
        ({"scale": "learned", "value": -0.5}, "value of a learned scale: expected finite"),
        ({"scale": "learned", "value": "a"}, "expected a number, or an array of them, got 'a'"),
        ({"scale": "absmax", "value": 1.0}, "value with scale 'absmax'"),
        ({"scale": "absmax", "value": jnp.ones(())}, "value with scale 'absmax'"),
        ({"scale": "mse", "percentile": 50.0}, "percentile 50.0 with scale 'mse'"),
        ({"scale": "percentile", "percentile": "99"}, "percentile: expected a number"),
        ({"granularity": None}, "unknown granularity None: expected one of tensor"),
        ({"zero_point": "yes"}, "zero_point: expected True or False, got 'yes'"),
        ({"zero_point": 1}, "zero_point: expected True or False, got 1"),
        ({"granularity": "block", "block_size": (16,)}, r"block_size: expected .*, got \(16,\)"),
        ({"granularity": "block", "block_size": [16, 16]}, r"block_size: .*, got \[16, 16\]"),
        ({"granularity": "block", "block_size": True}, "block_size: .*, got True"),
        ({"granularity": "block", "block_size": 16.0}, "block_size: .*, got 16.0"),
    ],
)
def test_a_number_without_meaning_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        Quantizer("int4", **fields)


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("value", [2.0, (1.0,), (1.0, 2.0, 3.0), (2.0, -2.0), (1.0, 1.0), "ab"])
def test_a_range_is_a_rising_pair(value):
    with pytest.raises(ValueError, match="value of a fixed scale: expected"):
        Quantizer("int4", scale="fixed", zero_point=True, value=value)


@pytest.mark.parametrize("name", ["none", "bf16", "e8m3"])
def test_a_format_without_a_scale_takes_no_value(name):
    with pytest.raises(ValueError, match=f"value with format {name}, which has no scale"):
        Quantizer(name, scale="fixed", value=2.0)


def test_numbers_that_mean_something_are_kept():
    ranges = Quantizer("uint4", scale="fixed", zero_point=True, value=(-1.0, 2.0))
    assert jnp.ptp(fake_quant(X, ranges, 0)) == pytest.approx(3, rel=1e-4)
    wide = Quantizer("int4", "channel", scale="fixed", value=[[1.0, 2.0]])
    assert jnp.max(fake_quant(jnp.full((3, 2), 9.0), wide, 0)) == pytest.approx(2, rel=1e-4)
    assert Quantizer("int4", scale="gaussian", value=2.5).value == 2.5


def test_jax_arrays_are_not_looked_at():
    unseen = Quantizer("int4", scale="fixed", value=jnp.float32(jnp.nan))
    assert jnp.isnan(fake_quant(X, unseen, 0)).all()

    @jax.jit
    def run(value):
        return fake_quant(X, dataclasses.replace(unseen, value=value), 0)

    assert jnp.max(run(jnp.float32(2))) == pytest.approx(2, rel=1e-4)


def test_constants_of_a_trace_are_not_looked_at():
    class Constant(np.ndarray):
        """As JAX has them."""

    unseen = np.asarray(np.nan, np.float32).view(Constant)
    assert Quantizer("int4", scale="fixed", value=unseen).value is unseen


@pytest.mark.parametrize("percentile", [99.99999, 1e-7, 100.0, 50, 1 / 3])
def test_a_percentile_is_written_exactly(percentile):
    quantizer = Quantizer("int4", scale="percentile", percentile=percentile)
    assert Quantizer.parse(str(quantizer)) == quantizer
