"""Prices against arithmetic, steps of chips, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from qat.laws.planning.cost import COSTS, Hardware, Linear, get_cost


def bits(weight=16.0, activation=16.0, kv=16.0):
    columns = {"weight_bits": weight, "activation_bits": activation, "kv_bits": kv}
    return {name: jnp.asarray(value) for name, value in columns.items()}


def test_linear_is_the_papers_rule():
    assert float(Linear().training(1e9, 2e10, bits())) == pytest.approx(6 * 1e9 * 2e10)
    price = Linear().training(1e9, 2e10, bits(4.0, 8.0, 12.0))
    assert float(price) == pytest.approx(6 / 16 * 1e9 * 2e10 * 8)
    assert float(Linear().inference(1e9, 2e10, bits(4.0))) == pytest.approx(2e9 * 2e10 * 12 / 16)


@pytest.mark.parametrize(
    ("weight", "activation", "speed"),
    [(4, 4, 3.0), (4, 5, 2.0), (8, 4, 2.0), (2, 2, 3.0), (8, 8.01, 1.0), (16, 4, 1.0)],
)
def test_hardware_runs_the_narrowest_width_that_holds_both(weight, activation, speed):
    chip = Hardware({8: 2.0, 4: 3.0}, quantized_share=0.5)
    widths = bits(float(weight), float(activation), 2.0)
    assert float(chip.inference(10.0, 3.0, widths)) == pytest.approx(60 / speed)
    assert float(chip.training(10.0, 3.0, widths)) == pytest.approx(180 * (0.5 + 0.5 / speed))


def test_only_a_third_of_training_is_forward():
    eight = bits(8.0, 8.0)
    price = float(get_cost("v5e").training(1.0, 1.0, eight))
    assert price == pytest.approx(4 + 2 / 1.99)
    assert float(Hardware({8: 1.99}, 1.0).training(1.0, 1.0, eight)) == pytest.approx(6 / 1.99)


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_elementwise_and_unquantized_is_one(name):
    cost = get_cost(name)
    columns = {each: jnp.asarray([16.0, 8.0, 4.0]) for each in bits()}
    prices = np.asarray(cost.training(jnp.ones(3), jnp.ones(3), columns))
    assert prices[0] == pytest.approx(6)
    assert (np.diff(prices) <= 0).all()
    assert prices[1] < 6


def test_equal_chips_are_one_key():
    assert len({Hardware({8: 2, 4: 3}), Hardware({4: 3, 8: 2}), Hardware({8: 2})}) == 2
    speedups = {8: 2.0}
    chip = Hardware(speedups)
    speedups[4] = 3.0
    assert chip == Hardware({8: 2.0})


@pytest.mark.parametrize(
    ("door", "words"),
    [
        (lambda: get_cost("v5"), "nearest is 'v5"),
        (lambda: get_cost(8), "got 8"),
        (lambda: Hardware(1.99), "such as {8: 1.99}"),
        (lambda: Hardware({16: 1.0}), "of 16"),
        (lambda: Hardware({8: 0}), "positive, not 0"),
        (lambda: Hardware({8: 2}, 1.5), "1.5"),
    ],
)
def test_refuses(door, words):
    with pytest.raises(ValueError) as caught:
        door()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
