"""The zooming grid on valleys whose lowest point is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from qat.laws.law import float64_on_cpu
from qat.laws.planning.search import minimise


def lowest(objective, dimensions):
    with float64_on_cpu():
        return [np.asarray(each) for each in minimise(objective, dimensions)]


@pytest.mark.parametrize("target", [0.0, 0.123456, 0.5, 0.97, 1.0])
def test_one_dimension(target):
    place, value = lowest(lambda x: jnp.abs(x[0] - target), 1)
    np.testing.assert_allclose(place, [target], atol=1e-8)
    assert value == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("narrow", [1.0, 30.0, 300.0])
def test_a_slanted_valley(narrow):
    """Much narrower across than along, and at 45 degrees to the grid."""

    def valley(x):
        along, across = x[0] + x[1] - 0.9, x[0] - x[1] - 0.3
        return along**2 + (narrow * across) ** 2

    place, _ = lowest(valley, 2)
    np.testing.assert_allclose(place, [0.6, 0.3], atol=3e-5)


def test_a_wall_and_a_cliff():
    """Undefined below 0.25, and a jump at 0.7, left of which it is lowest."""

    def step(x):
        fallen = jnp.where(x[0] <= 0.7, 1 - x[0], 2 - x[0])
        return jnp.where(x[0] < 0.25, jnp.inf, fallen)

    place, value = lowest(step, 1)
    assert place[0] <= 0.7
    np.testing.assert_allclose([place[0], value], [0.7, 0.3], atol=1e-8)


def test_nothing_is_defined():
    _, value = lowest(lambda x: jnp.where(x[0] > 2, 0.0, jnp.inf), 1)
    assert value == np.inf
