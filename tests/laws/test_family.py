"""Every law of the literature, and every composition and shape, against its formula in NumPy."""

import numpy as np
import pandas as pd
import pytest

from qat.laws import as_table, get_law
from qat.laws.forms.free import free, free_of, offset, quartet

SIZE = {"A": 480.0, "B": 2100.0, "E": 1.8, "alpha": 0.35, "beta": 0.37}
N, D = np.array([1e7, 3e8, 7e9, 7e9]), np.array([2e9, 1e10, 1.4e12, 1e11])
W, ACT, KV = np.array([2.0, 3.0, 5.0, 16]), np.array([4.0, 16, 6, 8]), np.array([16.0, 3, 4, 8])
POST = np.array([3.0, 4.0, 2.0, 16.0])
FRAME = pd.DataFrame(
    {"params": N, "tokens": D, "weight_bits": W, "activation_bits": ACT, "kv_bits": KV}
)
GAMMAS = {"gamma_w": 2.0, "gamma_a": 1.5, "gamma_kv": 1.1}
POWERS = {"k_w": 0.7, "k_a": 1.4, "k_kv": 2.0}
OFFSETS = {"n_w": 0.3, "n_a": 1.0, "n_kv": -0.4}
COSTS = {"c_w": 0.7, "c_a": 0.4, "c_kv": 0.2}
ROUNDING = {"C_T": 0.0598, "gamma_D": 0.5068, "gamma_N": 0.3439, "gamma_post": 0.5907}
TAILS = {
    "exponential": lambda x, k: np.exp(-x),
    "weibull": lambda x, k: np.exp(-(x**k)),
    "power": lambda x, k: (1 + x) ** -k,
    "logistic": lambda x, k: 1 / (1 + np.exp(x)),
}
BITS = {"w": W, "a": ACT, "kv": KV}


def size(n, d):
    return SIZE["A"] * n ** -SIZE["alpha"] + SIZE["B"] * d ** -SIZE["beta"] + SIZE["E"]


def tail(shape, x):
    return TAILS[shape](BITS[x] / GAMMAS[f"gamma_{x}"], POWERS[f"k_{x}"])


def worth(shape, offset):
    """The product of efficiencies of all operands."""
    product = np.ones(4)
    for x in BITS:
        n = OFFSETS[f"n_{x}"] if offset else 0.0
        if shape == "logistic" and offset:
            product *= 1 / (1 + np.exp(n - BITS[x] / GAMMAS[f"gamma_{x}"]))
        else:
            product *= 1 - np.exp(n) * tail(shape, x)
    return product


def name(composition, shape, offset):
    words = [composition, "" if shape == "exponential" else shape, "" if offset else "plain"]
    return "_".join(filter(None, words))


def predict(law, params, frame=FRAME):
    law = get_law(law)
    every = SIZE | GAMMAS | POWERS | OFFSETS | COSTS | ROUNDING | {"a": 0.2, "b": 0.1} | params
    return law.predict({key: every[key] for key in law.names}, frame)


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("shape", TAILS)
@pytest.mark.parametrize("composition", ["precision", "tokens", "both", "untied"])
def test_few_bits_act_like_fewer_parameters_or_tokens(composition, shape, offset):
    data = {f"{key}_D": value for key, value in (GAMMAS | POWERS | OFFSETS).items()}
    factor = worth(shape, offset)
    n = N if composition == "tokens" else N * factor
    d = D if composition == "precision" else D * factor
    expected = size(n, d)
    predicted = predict(name(composition, shape, offset), data)
    # Below its zero an offset efficiency has no meaning.
    inside = factor > 1e-3
    np.testing.assert_allclose(predicted[inside], expected[inside], rtol=1e-12)


@pytest.mark.parametrize("shape", TAILS)
def test_few_bits_add_to_the_loss(shape):
    added = sum(COSTS[f"c_{x}"] * tail(shape, x) for x in BITS)
    factor = np.prod([1 + COSTS[f"c_{x}"] * tail(shape, x) for x in BITS], axis=0)
    plain = size(N, D)
    for composition, expected in {
        "additive": plain + added,
        "scaled": plain + added * N**-0.2 * D**0.1,
        "multiplicative": plain * factor,
    }.items():
        np.testing.assert_allclose(predict(name(composition, shape, True), {}), expected, 1e-12)


def test_the_unified_law_is_equation_nine():
    frame = FRAME.assign(ptq_bits=POST)
    robust = {"C_w": 0.4, "C_a": 0.3, "C_kv": 0.6}
    n_eff = N * worth("exponential", True)
    cost = ROUNDING["C_T"] * np.exp(-POST / ROUNDING["gamma_post"])
    cost *= D ** ROUNDING["gamma_D"] / n_eff ** ROUNDING["gamma_N"]
    for x in BITS:
        cost *= 1 - np.exp(-robust[f"C_{x}"] * np.maximum(BITS[x] - POST, 0))
    cost[POST == 16] = 0.0
    assert cost[0] == 0.0  # trained with no more bits than it is rounded to
    predicted = predict("precision_unified", robust, frame)
    np.testing.assert_allclose(predicted, size(n_eff, D) + cost, rtol=1e-12)


def test_kaplan():
    params = {"N_c": 8.8e13, "D_c": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095}
    expected = ((8.8e13 / N) ** (0.076 / 0.095) + 5.4e13 / D) ** 0.095
    np.testing.assert_allclose(predict("kaplan", params), expected, rtol=1e-12)


def test_ouyang():
    params = {"k": 0.017, "gamma_D": 0.5251, "gamma_N": 0.2261, "gamma_P": 5.4967}
    cost = 0.017 * D**0.5251 / (N**0.2261 * POST**5.4967)
    expected = size(N, D) + np.where(POST == 16, 0, cost)
    np.testing.assert_allclose(
        predict("ouyang", params, FRAME.assign(ptq_bits=POST)), expected, rtol=1e-12
    )


def test_chen():
    params = {"k": 0.1582, "gamma_D": 0.0745, "gamma_G": 0.7779, "gamma_N": 0.2186}
    group = np.array([32.0, 64.0, 128.0, 128.0])
    cost = 0.1582 * D**0.0745 * np.log2(group) ** 0.7779 / N**0.2186
    expected = size(N, D) + np.where(W == 16, 0, cost)
    predicted = predict("chen", params, FRAME.assign(weight_group=group))
    np.testing.assert_allclose(predicted, expected, rtol=1e-12)


def test_sun():
    constants = {"n": 69.2343, "alpha": 0.2368, "d": 68973.0621, "beta": 0.5162, "E": 1.9061}
    constants |= {"gamma": 11334.5197, "delta": 3.1926, "nu": 2.9543}
    e, m, block = np.array([8.0, 4, 2, 4]), np.array([7.0, 3, 1, 3]), np.array([128.0, 128, 32, 64])
    expected = 69.2343 / N**0.2368 + 68973.0621 / D**0.5162 + 1.9061
    harm = D**0.5162 / N**0.2368 * np.log2(block)
    expected += harm / (11334.5197 * (e + 0.5) ** 3.1926 * (m + 0.5) ** 2.9543)
    frame = FRAME.assign(exponent_bits=e, mantissa_bits=m, scale_group=block)
    np.testing.assert_allclose(predict("sun", constants, frame), expected, rtol=1e-12)


def test_capacity_is_one_without_rounding_and_a_power_of_the_error_with():
    errors = {"weight_error": np.array([0.0115, 0.0, 1e-4, 0.3]), "activation_error": 0.0}
    frame = FRAME.assign(**errors, kv_error=0.0)
    bits = np.log(1 / np.array([0.0115, 1.0, 1e-4, 0.3])) / np.log(4)
    rho = np.where(bits > 0, np.tanh(0.5 * bits**1.2), 1.0)
    predicted = predict("capacity", {"F": 0.5, "C": 1.2}, frame)
    np.testing.assert_allclose(predicted, size(N * rho, D), rtol=1e-12)


def test_an_efficiency_for_every_width():
    law = free_of(as_table(FRAME.assign(loss=2.0)))
    assert law.name == "free_w2_w3_w5_a4_a6_a8_kv3_kv4_kv8"
    assert get_law(law.name).names == law.names
    factors = {f"eff_{x}": 0.1 * (i + 1) for i, x in enumerate(law.name.split("_")[1:])}
    product = np.array([0.1 * 0.4, 0.2 * 0.7, 0.3 * 0.5 * 0.8, 0.6 * 0.9])
    np.testing.assert_allclose(predict(law, factors), size(N * product, D), rtol=1e-12)
    assert np.isnan(predict(law, factors, FRAME.assign(weight_bits=7.0))).all()


def test_nats_added_for_every_width():
    law = offset({"weight_bits": FRAME.weight_bits, "kv_bits": (3, 4, 8)})
    assert law.name == "offset_w2_w3_w5_kv3_kv4_kv8"
    assert get_law(law.name).names == law.names
    added = {f"add_{x}": 0.1 * (i + 1) for i, x in enumerate(law.name.split("_")[1:])}
    nats = np.array([0.1, 0.2 + 0.4, 0.3 + 0.5, 0.6])
    np.testing.assert_allclose(predict(law, added), size(N, D) + nats, rtol=1e-12)
    assert np.isnan(predict(law, added, FRAME.assign(weight_bits=7.0))).all()


def test_quartet_has_an_exponent_around_and_reduces_data_by_gradients():
    law = quartet({"weight_bits": (4,), "gradient_bits": (4, 8)})
    assert get_law(law.name).names == law.names == (*SIZE, "eff_w4", "eff_g4", "eff_g8", "gamma")
    frame = pd.DataFrame({"params": N, "tokens": D}).assign(
        weight_bits=[4, 16, 4, 16], gradient_bits=[4, 8, 16, 16]
    )
    params = {"eff_w4": 0.6, "eff_g4": 0.9, "eff_g8": 0.95, "gamma": 0.3}
    n, d = N * np.array([0.6, 1, 0.6, 1]), D * np.array([0.9, 0.95, 1, 1])
    expected = (size(n, d) - 1.8) ** 0.3 + 1.8
    np.testing.assert_allclose(predict(law, params, frame), expected, rtol=1e-12)


def test_an_unknown_width_is_no_law():
    with pytest.raises(ValueError, match="unknown law 'free_x3'"):
        get_law("free_x3")
    assert get_law("free").names == free({}).names
