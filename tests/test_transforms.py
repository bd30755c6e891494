"""Transforms of inputs: products stay, quantizers see other numbers, exact features stay exact."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat
from qat.rotation import Rotation
from qat.transforms import InputTransform, Rotating, Scaling

SIZES = st.sampled_from([(6,), (8,), (2, 3), (3, 4)])


def steps(size, seed):
    scale_K = jnp.exp(jax.random.normal(jax.random.key(seed), (size,)))
    return Scaling(scale_K), Rotating(Rotation.of(size, seed))


@hypothesis.given(SIZES, st.integers(0, 5), st.permutations([0, 1]))
@hypothesis.settings(max_examples=20)
def test_products_stay_what_they_were(features, seed, order):
    """Whatever the steps and their order, contraction axes in front, behind or several."""
    size = int(np.prod(features))
    x = jax.random.normal(jax.random.key(seed + 10), (5, *features))
    weight_KN = jax.random.normal(jax.random.key(seed + 20), (size, 7))
    chosen = [steps(size, seed)[i] for i in order]
    transform = InputTransform((chosen[0],)).followed_by(InputTransform((chosen[1],)))
    changed_KN = weight_KN
    for step in transform.steps:
        changed_KN = step.weights(changed_KN)
    axes = tuple(range(1, x.ndim))
    for moved, moved_axes in ((x, axes), (jnp.moveaxis(x, 0, -1), tuple(a - 1 for a in axes))):
        inputs = transform.inputs(moved, moved_axes)
        product = jnp.tensordot(
            inputs, changed_KN.reshape(*features, 7), (moved_axes, tuple(range(len(features))))
        )
        expected = x.reshape(5, size) @ weight_KN
        np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-4)


def test_exact_features_pass_and_the_rest_is_quantized_without_them():
    x = jax.random.normal(jax.random.key(0), (4, 6)).at[:, 2].mul(1000)
    exact_K = jnp.arange(6) == 2
    policy = qat.Policy(activations="int4/token")
    inputs, left = InputTransform((), exact_K).around_exact(x, (1,), policy, None)
    assert left.activations is None
    np.testing.assert_array_equal(inputs[:, 2], x[:, 2])
    rest = qat.fake_quant(x.at[:, 2].set(0), policy.activations, axis=1)
    np.testing.assert_array_equal(jnp.delete(inputs, 2, 1), jnp.delete(rest, 2, 1))


def test_native_products_have_no_exact_features():
    policy = qat.Policy.parse("w8a8, native")
    with pytest.raises(ValueError, match="mode 'native' with features that stay unquantized"):
        InputTransform((), jnp.ones(6, bool)).around_exact(jnp.ones((4, 6)), (1,), policy, None)
