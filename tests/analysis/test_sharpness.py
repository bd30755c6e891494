"""Second derivatives against closed forms, dense Hessians and differences of the real decoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import optimize

from models.transformer import Transformer, TransformerConfig, split
from qat.analysis import sharpness
from qat.training.step import cross_entropy

KEY = jax.random.key(0)
SPECTRUM = np.array([-3.0, -0.5, 0.0, 0.1, 0.2, 1.0, 4.0, 7.0, 7.5, 20.0])


def symmetric(values_K, seed=0):
    """A matrix with these eigenvalues."""
    noise = np.random.default_rng(seed).standard_normal((len(values_K), len(values_K)))
    basis, _ = np.linalg.qr(noise)
    return (basis * values_K) @ basis.T


def bowl(params, matrix_NN):
    """½ xᵀAx + the sum of x, of all parameters x."""
    x_N = jnp.concatenate([params["a"].ravel(), params["b"]["c"]])
    return x_N @ (matrix_NN @ x_N) / 2 + jnp.sum(x_N)


def in_bowl(values_K=SPECTRUM, count=1):
    """Parameters of ten numbers in two leaves, and batches whose mean has a spectrum."""
    rng = np.random.default_rng(1)
    params = {"a": jnp.float32(rng.standard_normal((2, 3))), "b": {"c": jnp.float32(rng.random(4))}}
    noise = [symmetric(rng.standard_normal(10), seed) for seed in range(count)]
    mean = np.mean(noise, axis=0)
    return params, [jnp.float32(symmetric(values_K) + each - mean) for each in noise]


def mlp(params, batch):
    """A loss with all kinds of curvature."""
    x_BI, y_B = batch
    hidden_BH = jnp.tanh(x_BI @ params["in"] + params["bias"][None])
    return jnp.mean((hidden_BH @ params["out"] - y_B) ** 2) + jnp.mean(jnp.sin(hidden_BH))


@pytest.fixture(scope="module")
def of_mlp():
    rng = np.random.default_rng(2)
    params = {
        "in": jnp.float32(rng.standard_normal((3, 4))),
        "bias": jnp.float32(rng.standard_normal(4)),
        "out": jnp.float32(rng.standard_normal(4)),
    }
    batches = [
        (jnp.float32(rng.standard_normal((5, 3))), jnp.float32(rng.standard_normal(5)))
        for _ in range(3)
    ]
    flat_N, unravel = jax.flatten_util.ravel_pytree(params)

    def mean(x_N):
        return jnp.mean(jnp.stack([mlp(unravel(x_N), each) for each in batches]))

    dense_NN = np.asarray(jax.jit(jax.hessian(mean))(flat_N), np.float64)
    return params, batches, mean, dense_NN


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def test_products_are_those_of_the_dense_hessian(of_mlp):
    params, batches, _, dense_NN = of_mlp
    rng = np.random.default_rng(3)
    vector = jax.tree.map(lambda x: np.float32(rng.standard_normal(x.shape)), params)
    found = sharpness.product(mlp, params, batches, vector)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    np.testing.assert_allclose(flat(found), dense_NN @ flat(vector), rtol=1e-5, atol=1e-5)


def test_the_slope_is_the_gradients_norm_and_its_noise_that_of_means(of_mlp):
    params, batches, _, _ = of_mlp
    found = sharpness.slope(mlp, params, batches)
    gradients_BN = np.stack([flat(jax.grad(mlp)(params, each)) for each in batches])
    expected = np.linalg.norm(gradients_BN.mean(axis=0))
    np.testing.assert_allclose(found.norm, expected, rtol=1e-5)
    noise = np.sqrt((gradients_BN.var(axis=0, ddof=1) / 3).sum())
    np.testing.assert_allclose(found.noise, noise, rtol=1e-4)
    assert np.isnan(sharpness.slope(mlp, params, batches[:1]).noise)


def test_a_quadratic_has_nothing_beyond_second_order():
    params, batches = in_bowl(count=3)
    change = {"a": jnp.full((2, 3), 0.1, jnp.float32), "b": {"c": jnp.full(4, -0.2, jnp.float32)}}
    found = sharpness.expand(bowl, params, change, batches, blocks=True)
    x_N, dx_N, matrices = flat(params), flat(change), np.asarray(batches, np.float64)
    quadratic_B = np.array([dx_N @ each @ dx_N / 2 for each in matrices])
    linear_B = np.array([dx_N @ (each @ x_N + 1) for each in matrices])
    for estimate, values_B in [
        (found.quadratic, quadratic_B),
        (found.linear, linear_B),
        (found.change, linear_B + quadratic_B),
    ]:
        np.testing.assert_allclose(estimate.mean, values_B.mean(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(estimate.se, values_B.std(ddof=1) / 3**0.5, rtol=1e-3)
    assert abs(found.remaining.mean) < 2e-5
    assert found.remaining.se < 2e-5
    assert found.squared_norm == pytest.approx(dx_N @ dx_N)
    of_a, of_c = (np.where(np.arange(10) < 6, dx_N, 0), np.where(np.arange(10) < 6, 0, dx_N))
    assert list(found.blocks) == ["a", "b/c"]
    mean_NN = matrices.mean(axis=0)
    for name, dx_N in (("a", of_a), ("b/c", of_c)):
        np.testing.assert_allclose(found.blocks[name].mean, dx_N @ mean_NN @ dx_N / 2, rtol=1e-4)


def test_what_remains_is_of_third_order(of_mlp):
    params, batches, _, _ = of_mlp
    direction = jax.tree.map(
        lambda x: jnp.float32(np.sin(1 + np.arange(x.size))).reshape(x.shape), params
    )

    def remaining(size):
        change = jax.tree.map(lambda x: size * x, direction)
        return sharpness.expand(mlp, params, change, batches).remaining.mean

    assert remaining(0.2) / remaining(0.1) == pytest.approx(8, rel=0.35)


@pytest.mark.parametrize(
    "values_K",
    [
        SPECTRUM,
        -SPECTRUM,
        np.array([2.0] * 4 + [5.0] * 3 + [-1.0] * 3),  # each several times
        np.ones(10),
        np.array([1e-3, 2e-3, 4e-3, 0, 0, 0, 0, 0, 0, 30.0]),
    ],
)
def test_eigenvalues_are_those_of_the_matrix(values_K):
    params, batches = in_bowl(values_K, count=2)
    found = sharpness.extremes(bowl, params, batches, KEY, largest=4, smallest=3)
    expected_K = np.linalg.eigvalsh(np.mean(np.asarray(batches, np.float64), axis=0))
    largest, smallest = ([e.value for e in each] for each in (found.largest, found.smallest))
    tolerance = 1e-2 * np.abs(values_K).max()
    np.testing.assert_allclose(largest, expected_K[::-1][:4], atol=tolerance)
    np.testing.assert_allclose(smallest, expected_K[:3], atol=tolerance)
    assert all(each.converged for each in (*found.largest, *found.smallest))
    assert found.products <= 10


def large(params, diagonal_N):
    return jnp.sum(diagonal_N * params["x"] ** 2) / 2


def test_lanczos_ends_when_what_is_asked_for_has_converged():
    values_N = np.concatenate([np.random.default_rng(0).random(493), [-4, -1, 5, 6, 8, 9, 12]])
    batch, params = [jnp.float32(values_N)], {"x": jnp.zeros(500)}
    found = sharpness.extremes(large, params, batch, KEY, largest=3, smallest=1)
    assert 4 < found.products < 60
    assert [e.value for e in found.largest] == pytest.approx([12, 9, 8], rel=1e-2)
    assert found.smallest[0].value == pytest.approx(-4, abs=0.12)
    expected = [12, 9, 8, -4]
    for each, value in zip((*found.largest, *found.smallest), expected, strict=True):
        assert each.converged
        assert abs(each.value - value) <= each.bound + 1e-5
        assert each.bound <= 1e-2 * found.largest[0].value
    few = sharpness.extremes(large, params, batch, KEY, largest=3, products=6)
    assert few.products == 6
    assert not all(each.converged for each in few.largest)
    close = sharpness.extremes(large, params, batch, KEY, largest=3, tolerance=1e-5)
    assert close.products > found.products
    assert [e.value for e in close.largest] == pytest.approx([12, 9, 8], rel=1e-5)


def test_the_trace_of_a_diagonal_is_exact_and_of_leaves_it_is_their_own():
    params, batches = in_bowl(count=1)
    diagonal = [jnp.diag(jnp.arange(10.0))]
    found = sharpness.trace(bowl, params, diagonal, KEY, probes=2)
    assert (found.whole.mean, found.whole.se) == pytest.approx((45, 0), abs=1e-4)
    assert {name: each.mean for name, each in found.leaves.items()} == pytest.approx(
        {"a": 15, "b/c": 30}
    )
    many = sharpness.trace(bowl, params, batches, KEY, probes=2000)
    matrix_NN = np.asarray(batches[0], np.float64)
    for estimate, part in [
        (many.whole, slice(None)),
        (many.leaves["a"], slice(6)),
        (many.leaves["b/c"], slice(6, 10)),
    ]:
        expected = np.trace(matrix_NN[part, part])
        assert abs(estimate.mean - expected) < 4 * estimate.se
    squares = 2 * ((matrix_NN**2).sum() - (np.diag(matrix_NN) ** 2).sum())
    assert many.whole.se == pytest.approx((squares / 2000) ** 0.5, rel=0.1)


def test_the_standard_error_of_the_trace_covers_probes_and_text():
    """Of 200 estimates of 8 batches, about 68% are within one standard error."""
    rng = np.random.default_rng(0)
    params = {"a": jnp.zeros((2, 3)), "b": {"c": jnp.zeros(4)}}
    truth = symmetric(SPECTRUM)
    inside = 0
    for seed in range(200):
        shift_B = 2 * rng.standard_normal(8)  # of text
        batches = [jnp.float32(truth + np.eye(10) * shift) for shift in shift_B]
        found = sharpness.trace(bowl, params, batches, jax.random.key(seed), probes=8).whole
        inside += abs(found.mean - np.trace(truth)) < found.se
    assert 0.55 < inside / 200 < 0.75  # 65% by Student's t with 7 degrees of freedom


def test_a_restriction_is_the_block_of_what_is_chosen():
    params, batches = in_bowl(count=2)
    loss, chosen = sharpness.restrict(bowl, params, lambda name: name == "b/c")
    assert list(chosen) == ["b/c"]
    assert float(loss(chosen, batches[0])) == pytest.approx(float(bowl(params, batches[0])))
    block = np.mean(np.asarray(batches, np.float64), axis=0)[6:, 6:]
    found = sharpness.extremes(loss, chosen, batches, KEY, largest=2, smallest=2)
    values_K = np.linalg.eigvalsh(block)
    assert [e.value for e in found.largest] == pytest.approx(values_K[::-1][:2], abs=0.3)
    assert [e.value for e in found.smallest] == pytest.approx(values_K[:2], abs=0.3)
    trace = sharpness.trace(loss, chosen, [jnp.diag(jnp.arange(10.0))], KEY, probes=2)
    assert trace.whole.mean == pytest.approx(30)
    vector = {"b/c": np.float32([1, 2, 3, 4])}
    along = sharpness.product(loss, chosen, batches, vector)["b/c"]
    np.testing.assert_allclose(along, block @ [1, 2, 3, 4], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"a leaf at least, got \['a', 'b/c'\]"):
        sharpness.restrict(bowl, params, lambda name: False)


@pytest.fixture(scope="module")
def decoder():
    """The real decoder, with norms and attention that have reverse rules of their own."""
    config = TransformerConfig(vocabulary=11, width=8, layers=1, heads=4, kv_heads=2)
    model = Transformer(config, None, rngs=nnx.Rngs(0))
    graph, params, rest = split(model)
    tokens_BS = np.random.default_rng(0).integers(0, 11, (2, 3, 8)).astype(np.int32)

    def loss(params, tokens_BS):
        logits_BTV = nnx.merge(graph, params, rest)(tokens_BS[:, :-1])
        return jnp.mean(cross_entropy(logits_BTV, tokens_BS))

    return loss, params, [jnp.asarray(each) for each in tokens_BS]


def test_products_of_the_decoder_are_differences_of_its_gradients(decoder):
    loss, params, batches = decoder
    rng = np.random.default_rng(1)
    vector = jax.tree.map(lambda x: jnp.float32(rng.standard_normal(x.shape)), params)
    gradient = jax.jit(jax.grad(loss))

    def at(step):
        moved = jax.tree.map(lambda x, dx: x + np.float32(step) * dx, params, vector)
        return np.mean([flat(gradient(moved, each)) for each in batches], axis=0)

    def difference(step):
        return (at(step) - at(-step)) / (2 * step)

    expected_N = (4 * difference(0.001) - difference(0.002)) / 3  # Richardson: fourth order
    found_N = flat(sharpness.product(loss, params, batches, vector))
    error = np.linalg.norm(found_N - expected_N) / np.linalg.norm(expected_N)
    assert error < 2e-4


def test_products_of_the_decoder_are_symmetric_and_those_of_reverse_over_reverse(decoder):
    loss, params, batches = decoder
    rng = np.random.default_rng(2)
    one, two = (
        jax.tree.map(lambda x: jnp.float32(rng.standard_normal(x.shape)), params) for _ in "ab"
    )
    of_one, of_two = (sharpness.product(loss, params, batches[:1], each) for each in (one, two))
    assert flat(one) @ flat(of_two) == pytest.approx(flat(two) @ flat(of_one), rel=1e-4)

    def along(params):
        gradient = jax.grad(loss)(params, batches[0])
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(one), strict=True)
        return functools.reduce(jnp.add, [jnp.vdot(g, v) for g, v in pairs])

    twice_N = flat(jax.jit(jax.grad(along))(params))
    np.testing.assert_allclose(flat(of_one), twice_N, atol=1e-5 * np.abs(twice_N).max())


def test_the_decoders_loss_grows_as_expanded_along_a_small_change(decoder):
    loss, params, batches = decoder
    rng = np.random.default_rng(3)
    vector = jax.tree.map(lambda x: jnp.float32(rng.standard_normal(x.shape)), params)
    for _ in range(4):  # towards where the loss bends most
        vector = sharpness.product(loss, params, batches, vector)
        length = np.linalg.norm(flat(vector))
        vector = jax.tree.map(lambda x, length=length: jnp.float32(0.02 * x / length), vector)
    found = sharpness.expand(loss, params, vector, batches)
    assert found.quadratic.mean > 5e-4
    assert abs(found.remaining.mean) < 0.1 * found.quadratic.mean
    parts = found.linear.mean + found.quadratic.mean + found.remaining.mean
    assert found.change.mean == pytest.approx(parts, abs=1e-9)


def test_one_program_serves_all_models_of_a_shape(decoder, monkeypatch):
    _, params, _ = decoder
    traced = []

    def counted(params, batch):
        traced.append(1)
        return jnp.sum(params["head"]["kernel"] ** 2) * jnp.sum(batch)

    for factor in (1.0, 2.0):
        scaled = jax.tree.map(lambda x, factor=factor: x * np.float32(factor), params)
        loss, chosen = sharpness.restrict(counted, scaled, lambda name: name == "head/kernel")
        trace = sharpness.trace(loss, chosen, [jnp.ones(3)], KEY, probes=2)
        assert trace.whole.mean == pytest.approx(6 * 8 * 11)
        sharpness.slope(loss, chosen, [jnp.ones(3)])
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (sharpness.trace, {"probes": 1}, "probes: expected at least 2, got 1"),
        (sharpness.extremes, {"largest": 9, "smallest": 2}, "no more than the 10 parameters"),
        (sharpness.extremes, {"largest": 3, "products": 3}, "parameters and 3 products"),
        (sharpness.extremes, {"largest": 0, "smallest": 0}, "expected one at least"),
        (sharpness.extremes, {"largest": -1, "smallest": 2}, "largest = -1, smallest = 2"),
    ],
)
def test_numbers_out_of_range_are_refused(function, options, message):
    params, batches = in_bowl()
    with pytest.raises(ValueError, match=message):
        function(bowl, params, batches, KEY, **options)


def test_the_bottom_of_a_bowl_is_found_flat():
    """The oracle of the slope is a minimiser's."""
    values_K = np.abs(SPECTRUM) + 1
    params, batches = in_bowl(values_K)
    matrix_NN = np.asarray(batches[0], np.float64)
    bottom = optimize.minimize(lambda x: x @ matrix_NN @ x / 2 + x.sum(), flat(params), tol=1e-12).x
    there = {"a": jnp.float32(bottom[:6].reshape(2, 3)), "b": {"c": jnp.float32(bottom[6:])}}
    assert sharpness.slope(bowl, there, batches).norm < 1e-4
    assert sharpness.extremes(bowl, there, batches, KEY, largest=1).smallest[0].value > 0.9
