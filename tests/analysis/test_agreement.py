"""Agreement against float64 NumPy, whole and in parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat.analysis import agreement, agreement_of_states
from qat.analysis.agreement import _parts

B, T, D, V = 3, 12, 8, 50
RANDOM = np.random.default_rng(0)
TARGETS_BT = RANDOM.integers(0, V, (B, T))
ORIGINAL_BTV = (4 * RANDOM.standard_normal((B, T, V))).astype(np.float32)
NOISE_BTV = RANDOM.standard_normal((B, T, V)).astype(np.float32)
NAMES = ("original_loss_BT", "loss_BT", "divergence_BT", "agrees_BT")


def oracle(original_BTV, quantized_BTV, targets_BT):
    """The definitions, in float64."""

    def log_softmax(x_BTV):
        x_BTV = x_BTV.astype(np.float64)
        x_BTV = x_BTV - x_BTV.max(axis=-1, keepdims=True)
        return x_BTV - np.log(np.exp(x_BTV).sum(axis=-1, keepdims=True))

    def largest(x_BTV):
        return x_BTV >= np.sort(x_BTV, axis=-1)[..., -1:]

    log_p_BTV, log_q_BTV = log_softmax(original_BTV), log_softmax(quantized_BTV)
    rows, columns = np.indices(targets_BT.shape)
    return (
        -log_p_BTV[rows, columns, targets_BT],
        -log_q_BTV[rows, columns, targets_BT],
        (np.exp(log_p_BTV) * (log_p_BTV - log_q_BTV)).sum(axis=-1),
        (largest(original_BTV) & largest(quantized_BTV)).any(axis=-1).astype(np.float64),
    )


def assert_close(found, expected, **tolerance):
    for name, each in zip(NAMES, expected, strict=True):
        assert getattr(found, name).dtype == jnp.float32
        np.testing.assert_allclose(getattr(found, name), each, err_msg=name, **tolerance)


@pytest.mark.parametrize("noise", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_agreement_is_what_its_definition_says(noise, shift):
    quantized_BTV = ORIGINAL_BTV + np.float32(noise) * NOISE_BTV + np.float32(shift)
    found = agreement(ORIGINAL_BTV, quantized_BTV, TARGETS_BT)
    expected = oracle(ORIGINAL_BTV, quantized_BTV, TARGETS_BT)
    assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert expected[3].mean() < 1


def test_divergences_of_millionths_are_resolved():
    quantized_BTV = ORIGINAL_BTV + np.float32(2e-3) * NOISE_BTV
    found = agreement(ORIGINAL_BTV, quantized_BTV, TARGETS_BT).divergence_BT
    expected_BT = oracle(ORIGINAL_BTV, quantized_BTV, TARGETS_BT)[2]
    assert expected_BT.mean() < 3e-6
    np.testing.assert_allclose(np.mean(found), expected_BT.mean(), rtol=0.02)
    np.testing.assert_allclose(found, expected_BT, atol=2e-7)


def test_a_model_agrees_with_itself_exactly_and_its_first_token_may_tie():
    found = agreement(ORIGINAL_BTV, ORIGINAL_BTV, TARGETS_BT)
    assert (found.divergence_BT == 0).all()
    assert (found.agrees_BT == 1).all()
    tied = agreement(
        jnp.zeros((1, 1, 4)), jnp.asarray([[[0.0, 2.0, 1.0, 2.0]]]), jnp.zeros((1, 1), jnp.int32)
    )
    assert tied.agrees_BT.item() == 1


def test_logits_of_half_precision_are_compared_in_float32():
    half_BTV = jnp.asarray(ORIGINAL_BTV, jnp.bfloat16)
    found = agreement(half_BTV, ORIGINAL_BTV, TARGETS_BT)
    expected = oracle(np.asarray(half_BTV, np.float32), ORIGINAL_BTV, TARGETS_BT)
    assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_what_went_wrong_stays_wrong_but_where_a_mask_leaves_it_out():
    quantized_BTV = ORIGINAL_BTV.copy()
    quantized_BTV[0, 0, 3] = np.nan
    found = agreement(ORIGINAL_BTV, quantized_BTV, TARGETS_BT)
    assert np.isnan(found.loss_BT[0, 0]) and np.isnan(found.divergence_BT[0, 0])
    assert found.agrees_BT[0, 0] == 0
    mask_BT = np.ones((B, T), bool)
    mask_BT[0, 0] = mask_BT[2, 5:] = False
    masked = agreement(ORIGINAL_BTV, quantized_BTV, TARGETS_BT, mask_BT)
    for name in NAMES:
        expected_BT = np.where(mask_BT, getattr(found, name), 0)
        np.testing.assert_array_equal(getattr(masked, name), expected_BT)


@pytest.mark.parametrize("at_once", [1, B * V, 5 * B * V, 1 << 30])
@pytest.mark.parametrize("masked", [False, True])
def test_parts_of_a_sequence_give_what_the_whole_gives(at_once, masked):
    keys = jax.random.split(jax.random.key(0), 4)
    states_BTD, other_BTD = (jax.random.normal(key, (B, T, D)) for key in keys[:2])
    head_DV, other_DV = (jax.random.normal(key, (D, V)) for key in keys[2:])
    mask_BT = jnp.arange(T)[None] < jnp.asarray([[12], [7], [0]]) if masked else None

    def in_parts(states_BTD, other_BTD):
        def head(x_BTD):
            return x_BTD @ head_DV

        def other(x_BTD):
            return x_BTD @ other_DV

        return agreement_of_states(
            head, other, states_BTD, other_BTD, jnp.asarray(TARGETS_BT), mask_BT, at_once
        )

    found = jax.jit(in_parts)(states_BTD, other_BTD)
    whole = agreement(states_BTD @ head_DV, other_BTD @ other_DV, TARGETS_BT, mask_BT)
    for field in dataclasses.fields(whole):
        np.testing.assert_allclose(
            getattr(found, field.name), getattr(whole, field.name), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("tokens", "most", "parts"),
    [(12, 100, 1), (12, 12, 1), (12, 11, 2), (12, 5, 3), (12, 1, 12), (12, 0, 12), (7, 6, 7)],
)
def test_parts_are_few_and_equal(tokens, most, parts):
    assert _parts(tokens, most) == parts


def test_no_array_of_all_logits_is_made():
    """The largest array of the compiled program is a part's logits."""

    def in_parts(states_BTD, head_DV):
        def head(x_BTD):
            return x_BTD @ head_DV

        return agreement_of_states(
            head, head, states_BTD, states_BTD, jnp.zeros((2, 256), jnp.int32), None, 2 * 16 * 4096
        )

    shapes = (
        jax.ShapeDtypeStruct((2, 256, D), "float32"),
        jax.ShapeDtypeStruct((D, 4096), "float32"),
    )
    memory = jax.jit(in_parts).lower(*shapes).compile().memory_analysis()
    logits = 2 * 256 * 4096 * 4
    assert memory.temp_size_in_bytes < logits
