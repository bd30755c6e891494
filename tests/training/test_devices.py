"""Peaks and memory, against the vendors' own statements about whole systems and ratios."""

import jax.numpy as jnp
import pytest

from qat.training.devices import DEVICES, peak


def test_a_pod_of_v5e_has_the_peak_that_its_page_states():
    """256 chips: 50.63 PFLOP/s of bfloat16 and 100 POP/s of int8, rounded."""
    assert 256 * peak("TPU v5 lite", jnp.bfloat16) == pytest.approx(50.63e15, rel=0.005)
    assert 256 * peak("TPU v5 lite", jnp.int8) == pytest.approx(100e15, rel=0.01)


def test_a_chip_of_tpu7x_is_two_devices():
    device = DEVICES["TPU7x"]
    assert device.per_chip == 2
    assert 2 * device.bfloat16 == 2307e12
    assert 2 * peak("TPU7x", jnp.float8_e4m3fn) == 4614e12
    assert 2 * device.memory == 192 * 2**30


def test_an_h100_is_dense_and_eight_bits_are_twice_as_fast():
    assert 2 * peak("NVIDIA H100 80GB HBM3", "bfloat16") == peak("NVIDIA H100 80GB HBM3", "int8")
    assert 2 * peak("NVIDIA H100 80GB HBM3", jnp.float8_e5m2) == 3958e12  # with sparsity


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("cpu", jnp.bfloat16),
        ("TPU v5 lite", jnp.float8_e4m3fn),
        ("NVIDIA A100-SXM4-80GB", jnp.float8_e5m2),
        ("TPU v4", jnp.float32),
    ],
)
def test_what_is_not_on_a_data_sheet_has_no_peak(kind, dtype):
    assert peak(kind, dtype) is None


def test_spellings_of_one_device_agree():
    assert DEVICES["TPU v5e"] is DEVICES["TPU v5 lite"]
    assert peak("TPU v5", "float16") == peak("TPU v5p", jnp.bfloat16)
