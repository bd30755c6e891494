"""Rounding to nearest on stock layers and on the transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat
from models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(vocabulary=32, width=16, layers=2, heads=4, kv_heads=2)


class Mlp(nnx.Module):
    """Somebody else's model, of stock layers."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(10, 6, rngs=rngs)
        self.first = nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=rngs)
        self.last = nnx.Linear(20, 7, rngs=rngs)

    def __call__(self, x_B23):
        return self.last(jax.nn.relu(self.first(x_B23)).reshape(-1, 20))


@pytest.fixture(scope="module")
def mlp():
    return Mlp(nnx.Rngs(0))


def test_kernels_are_rounded_along_their_contraction_axes(mlp):
    quantizer = qat.Quantizer.parse("int3/channel")
    quantized, _ = qat.ptq.quantize(mlp, method="rtn", quantizer=quantizer)
    first = np.asarray(mlp.first.kernel[...], np.float64)
    scale = np.abs(first).max(axis=(0, 1), keepdims=True) / 3
    expected = np.clip(np.rint(first / scale), -3, 3) * scale
    np.testing.assert_allclose(quantized.first.kernel[...], expected, rtol=1e-6)
    by_hand = qat.fake_quant(mlp.last.kernel[...], quantizer, axis=0)
    np.testing.assert_array_equal(quantized.last.kernel[...], by_hand)


def test_the_model_itself_stays_as_it_is_and_the_copy_is_called_as_before(mlp):
    before = nnx.clone(mlp)
    quantized, _ = qat.ptq.quantize(mlp, method="rtn", quantizer=qat.Quantizer.parse("int2"))
    for old, new in zip(
        jax.tree.leaves(nnx.state(before)), jax.tree.leaves(nnx.state(mlp)), strict=True
    ):
        np.testing.assert_array_equal(old, new)
    assert quantized(jnp.ones((3, 2, 3))).shape == (3, 7)


def test_the_report_names_every_parameter(mlp):
    _, report = qat.ptq.quantize(
        mlp, method="rtn", quantizer=qat.Quantizer.parse("int4/channel"), skip="last"
    )
    by_path = {line.path: line for line in report}
    assert set(by_path) == {
        "embed/embedding",
        "first/kernel",
        "first/bias",
        "last/kernel",
        "last/bias",
    }
    assert [path for path, line in by_path.items() if line.quantized] == ["first/kernel"]
    assert by_path["last/kernel"].reason == "skipped by 'last'"
    assert 0 < by_path["first/kernel"].relative_error < 0.2
    assert by_path["first/kernel"].nbytes == 2 * 3 * 20 // 2 + 4 * 20  # codes, float32 scales


@pytest.mark.parametrize("spelling", ["int3/channel", "e2m1/tensor"])
def test_stacked_layers_are_quantized_one_by_one_as_a_weights_policy_does(spelling):
    """RTN is the quantizer of training applied once: the same logits, bit for bit."""
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 8), 0, 32)
    quantizer = qat.Quantizer.parse(spelling)
    model = Transformer(CONFIG, None, rngs=nnx.Rngs(0))
    rounded, _ = qat.ptq.quantize(model, method="rtn", quantizer=quantizer, skip="embed|head")
    policy = Transformer(CONFIG, qat.Policy(weights=quantizer), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(rounded(tokens_BT), policy(tokens_BT))


def test_a_lone_layer_is_a_model_too():
    layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    _, report = qat.ptq.quantize(layer, method="rtn", quantizer=qat.Quantizer.parse("int4"))
    assert [line.quantized for line in report] == [False, True]


@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 100.0])
def test_the_error_of_half_precision_weights_is_that_of_float32(size):
    layer = nnx.Linear(64, 64, param_dtype=jnp.float16, rngs=nnx.Rngs(0))
    layer.kernel.set_value(layer.kernel[...] * jnp.float16(size))
    quantizer = qat.Quantizer.parse("int8/channel")
    _, report = qat.ptq.quantize(layer, method="rtn", quantizer=quantizer)
    error = next(line.relative_error for line in report if line.quantized)
    assert error == 0 if size == 0 else 1e-3 < error < 3e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rnt"}, "unknown method 'rnt'.*nearest is 'rtn'"),
        ({"skip": ".*"}, "nothing to quantize"),
        ({"skip": "("}, r"skip '\(' is not a regular expression"),
    ],
)
def test_bad_input_is_named(mlp, options, message):
    arguments = {"method": "rtn", "quantizer": qat.Quantizer.parse("int4"), **options}
    with pytest.raises(ValueError, match=message):
        qat.ptq.quantize(mlp, **arguments)
