"""Rotations: orthogonal, undone exactly, drawn from a seed, and flattening."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from qat.rotation import Rotation

SIZES = [1, 2, 3, 5, 64, 96, 128, 256, 576, 1536]


def matrix_of(rotation):
    """What multiplies a column vector, float64."""
    return np.asarray(rotation.apply(jnp.eye(rotation.signs_K.size), axis=0), np.float64)


@pytest.mark.parametrize("size", SIZES)
def test_orthogonal_and_undone(size):
    rotation = Rotation.of(size, seed=0)
    matrix = matrix_of(rotation)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=2e-6)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, size)), jnp.float32)
    np.testing.assert_allclose(rotation.apply(x), np.asarray(x) @ matrix.T, atol=1e-5)
    np.testing.assert_allclose(rotation.inverse(rotation.apply(x)), x, atol=2e-6)
    np.testing.assert_allclose(rotation.apply(rotation.inverse(x)), x, atol=2e-6)


@pytest.mark.parametrize("size", [2, 64, 96, 256, 576, 1024])
def test_a_kronecker_product_of_the_mix_and_a_walsh_hadamard_matrix(size):
    rotation = Rotation.of(size, seed=1)
    mix = np.asarray(rotation.mix_OO, np.float64)
    power = size // len(mix)
    expected = np.kron(mix, scipy.linalg.hadamard(power) / np.sqrt(power))
    np.testing.assert_allclose(
        matrix_of(rotation), expected * np.asarray(rotation.signs_K), atol=1e-6
    )


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_any_axis(axis):
    rotation = Rotation.of(12, seed=0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((12, 12, 12)), jnp.float32)
    expected = np.moveaxis(np.tensordot(matrix_of(rotation), x, (1, axis)), 0, axis)
    np.testing.assert_allclose(rotation.apply(x, axis), expected, atol=1e-5)
    np.testing.assert_allclose(rotation.inverse(rotation.apply(x, axis), axis), x, atol=1e-5)


def test_the_product_of_inputs_and_weights_stays():
    random = np.random.default_rng(0)
    x, weight = (jnp.asarray(random.standard_normal(s), jnp.float32) for s in ((9, 96), (96, 5)))
    rotation = Rotation.of(96, seed=3)
    product = np.asarray(rotation.apply(x)) @ np.asarray(rotation.apply(weight, axis=0))
    np.testing.assert_allclose(product, np.asarray(x) @ np.asarray(weight), atol=2e-5)


def test_a_seed_is_a_rotation():
    first, again, other = (Rotation.of(96, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first.signs_K != other.signs_K).any() and (first.mix_OO != other.mix_OO).any()


@pytest.mark.parametrize("size", SIZES)
def test_an_outlier_becomes_a_little_of_everything(size):
    """No entry is larger than sqrt(2) times what a perfectly flat matrix has."""
    matrix = matrix_of(Rotation.of(size, seed=0))
    assert np.abs(matrix).max() <= np.sqrt(2 / size) * (1 + 1e-5)


def test_half_precision_and_stacks():
    rotation = Rotation.of(24, seed=0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 24)), jnp.bfloat16)
    rotated = rotation.apply(x)
    assert rotated.dtype == jnp.bfloat16 and rotated.shape == x.shape
    exact = rotation.apply(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(rotated.astype(jnp.float32), exact.astype(jnp.float32))
    stack = jax.tree.map(lambda *a: jnp.stack(a), rotation, Rotation.of(24, seed=1))
    both = jax.vmap(lambda r, row: r.apply(row))(stack, x)
    np.testing.assert_array_equal(both[0].astype(jnp.float32), rotated[0].astype(jnp.float32))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="size of a rotation: expected an integer above 0, got 0"):
        Rotation.of(0, seed=0)
    with pytest.raises(ValueError, match=r"a rotation of size 4: axis 0 .* \(3, 4\) has 3"):
        Rotation.of(4, seed=0).apply(jnp.ones((3, 4)), axis=0)
