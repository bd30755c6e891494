"""The door: every method on NNX and Linen models, and what it refuses."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat
import qat.linen
import qat.nnx
from launch.timing import counting_compiles
from models.transformer import Transformer, TransformerConfig
from qat.ptq import Gptq, Method, Settings

WIDTHS = (24, 32, 16, 8)
CONVOLUTION = nnx.Conv(24, 8, (3,), rngs=nnx.Rngs(0))


class Mlp(nnx.Module):
    """Stock layers around inputs of which two are a hundred times as large as the rest."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        pairs = itertools.pairwise(WIDTHS)
        self.layers = nnx.List([nnx.Linear(n, m, rngs=rngs) for n, m in pairs])

    def __call__(self, x):
        *hidden, last = self.layers
        for layer in hidden:
            x = jax.nn.relu(layer(x))
        return last(x)


class LinenMlp(nn.Module):
    """The same, of Linen's layers."""

    @nn.compact
    def __call__(self, x):
        *hidden, last = WIDTHS[1:]
        for width in hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(last)(x)


def batches(seed=0, count=4):
    size = jnp.ones(24).at[jnp.array([3, 17])].set(100.0)
    mixing = jax.random.normal(jax.random.key(9), (24, 24)) / 5
    keys = jax.random.split(jax.random.key(seed), count)
    return [jax.random.normal(key, (64, 24)) @ mixing * size[None] for key in keys]


@pytest.fixture(scope="module")
def mlp():
    return Mlp()


@pytest.fixture(scope="module")
def linen(mlp):
    """The module, and the parameters of the NNX model."""
    params = {
        f"Dense_{i}": {"kernel": layer.kernel[...], "bias": layer.bias[...]}
        for i, layer in enumerate(mlp.layers)
    }
    return LinenMlp(), {"params": params}


def error(model, x, y):
    return float(jnp.linalg.norm(model(x) - y) / jnp.linalg.norm(y))


ALL = ["rtn", "gptq", "hqq", "awq", "smoothquant", "quarot", "llm_int8", "smoothquant+quarot+gptq"]


@pytest.mark.parametrize("method", ALL)
def test_sixteen_bits_leave_the_function(mlp, method):
    x = batches(seed=5)[0]
    quantized, report = qat.ptq.quantize(mlp, method, "int16/channel", batches())
    assert error(quantized, x, mlp(x)) < 1e-3
    assert sum(line.quantized for line in report) == 3


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "awq+gptq", "quarot+gptq"])
def test_methods_beat_rounding_to_nearest_on_text_they_have_not_seen(mlp, method):
    x = batches(seed=5)[0]
    nearest, _ = qat.ptq.quantize(mlp, "rtn", "int3/channel")
    better, report = qat.ptq.quantize(mlp, method, "int3/channel", batches())
    assert error(better, x, mlp(x)) < 0.95 * error(nearest, x, mlp(x))
    for line in report:
        if line.quantized and method == "gptq":
            assert line.output_errors < line.rtn_output_errors


@pytest.mark.parametrize("method", ["smoothquant", "quarot", "llm_int8"])
def test_outliers_of_activations_do_less_harm(mlp, method):
    x = batches(seed=5)[0]
    model, _ = qat.nnx.quantize_model(mlp, qat.Policy(activations="int8/token"))
    plain, _ = qat.ptq.quantize(model, "rtn", "int8/channel", batches())
    better, _ = qat.ptq.quantize(model, method, "int8/channel", batches())
    assert error(better, x, mlp(x)) < 0.8 * error(plain, x, mlp(x))


@pytest.mark.parametrize("method", ["gptq", "smoothquant", "quarot+gptq", "llm_int8"])
def test_linen_and_nnx_give_the_same_model(mlp, linen, method):
    x = batches(seed=5)[0]
    ours, report = qat.ptq.quantize(mlp, method, "int4/channel", batches())
    (module, variables), other = qat.ptq.quantize(linen, method, "int4/channel", batches())
    np.testing.assert_allclose(module.apply(variables, x), ours(x), rtol=2e-3, atol=2e-3)
    kernels = {line.path: line for line in other if line.quantized}
    assert set(kernels) == {f"Dense_{i}/kernel" for i in range(3)}
    of_nnx = {line.path: line for line in report if line.quantized}
    for i in range(3):
        a, b = of_nnx[f"layers/{i}/kernel"], kernels[f"Dense_{i}/kernel"]
        assert a.output_errors == pytest.approx(b.output_errors, rel=0.05)


@pytest.mark.parametrize("method", ["rtn", "gptq", "smoothquant+gptq", "quarot"])
def test_a_transformed_model_is_what_is_rounded(mlp, method):
    """It computes what the original does, and rounding it to nearest is all that is left of rtn."""
    (x, *_), calibration = batches(1), batches()
    transformed = qat.ptq.transform(mlp, method, "int4/channel", calibration)
    np.testing.assert_allclose(transformed(x), mlp(x), rtol=1e-4, atol=1e-2)
    kernels = [np.asarray(layer.kernel[...]) for layer in transformed.layers]
    same = [
        np.array_equal(k, layer.kernel[...]) for k, layer in zip(kernels, mlp.layers, strict=True)
    ]
    assert all(same) if "+" not in method and method != "quarot" else not any(same)
    names = method if "gptq" not in method else method.replace("gptq", "rtn")
    rounded, _ = qat.ptq.quantize(mlp, names, "int4/channel", calibration)
    for kernel, layer in zip(kernels, rounded.layers, strict=True):
        expected = qat.fake_quant(jnp.asarray(kernel), "int4/channel", 0)
        np.testing.assert_array_equal(layer.kernel[...], expected)


def test_what_is_stored_is_what_the_model_multiplies(mlp):
    quantized, report = qat.ptq.quantize(mlp, "gptq", "int4/block:8/zero_point", batches())
    for line in report:
        if line.quantized:
            layer = quantized.layers[int(line.path.split("/")[1])]
            np.testing.assert_array_equal(line.stored.dequantize(), layer.kernel[...])
            np.testing.assert_array_equal(
                line.stored.pack().unpack().dequantize(), layer.kernel[...]
            )


@pytest.mark.parametrize(
    "spelling",
    ["int3/block:8", "mxfp4", "nvfp4", "nf4/block:16", "ternary/absmean", "int4/mse", "e2m1"],
)
def test_gptq_takes_every_kind_of_quantizer(spelling):
    layer = nnx.Linear(64, 48, rngs=nnx.Rngs(1))
    mixing = jax.random.normal(jax.random.key(3), (64, 64)) / 8
    data = [jax.random.normal(jax.random.key(i), (200, 64)) @ mixing for i in range(2)]
    _, report = qat.ptq.quantize(layer, "gptq", spelling, data)
    (line,) = [line for line in report if line.quantized]
    assert line.output_errors[0] < line.rtn_output_errors[0]


def test_formats_of_one_structure_share_the_programs_of_layers():
    model = nnx.Sequential(nnx.Linear(20, 12, rngs=nnx.Rngs(0)), jnp.tanh)
    model.layers.append(nnx.Linear(12, 4, rngs=nnx.Rngs(1)))
    data = [jax.random.normal(jax.random.key(i), (64, 20)) for i in range(2)]
    qat.ptq.quantize(model, "gptq", "int3/channel", data)
    again = nnx.merge(*nnx.split(model))
    with counting_compiles() as compiled:
        for spelling in ("int4/channel", "e2m1/channel"):
            qat.ptq.quantize(again, "gptq", spelling, data)
    assert set(compiled) <= {"pack_codes"}  # whose layout is the format's


def test_batches_that_differ_tenfold_do_no_harm(mlp):
    uneven = [batch * 10.0 ** (i % 2) for i, batch in enumerate(batches())]
    model, _ = qat.nnx.quantize_model(mlp, qat.Policy(activations="int8/token"))
    for method in ("smoothquant+gptq", "awq", "quarot+gptq"):
        quantized, _ = qat.ptq.quantize(model, method, "int8/channel", uneven)
        for x in batches(seed=5, count=1), [batches(seed=5, count=1)[0] * 10]:
            assert error(quantized, x[0], mlp(x[0])) < 0.05


def test_outlier_rows_stay_exact(mlp):
    quantized, report = qat.ptq.quantize(
        mlp, "llm_int8", "int2/channel", batches(), settings=Settings(outliers=50.0)
    )
    first = next(line for line in report if line.path == "layers/0/kernel")
    rows = np.flatnonzero(np.any(np.asarray(first.exact_rows) != 0, axis=1))
    assert rows.tolist() == [3, 17]
    kernel, exact = quantized.layers[0].kernel[...], mlp.layers[0].kernel[...]
    np.testing.assert_allclose(kernel[rows], exact[rows], rtol=2**-10)
    assert not np.any(np.asarray(first.stored.dequantize())[rows])


@pytest.mark.slow
def test_the_transformer_is_calibrated_layer_by_layer_and_rotated_offline():
    config = TransformerConfig(vocabulary=32, width=24, layers=2, heads=4, kv_heads=2)
    model = Transformer(config, qat.Policy(activations="int8/token"), rngs=nnx.Rngs(0))
    plain = Transformer(config, None, rngs=nnx.Rngs(0))
    scales = iter(range(100))
    for _, node in nnx.iter_graph((model, plain)):
        if isinstance(node, nnx.Param) and node.ndim <= 2 and node.shape[-1] in (24, 64):
            node.set_value(
                1 + 0.3 * jax.random.normal(jax.random.key(next(scales) % 5), node.shape)
            )
    tokens = [jax.random.randint(jax.random.key(i), (4, 16), 0, 32) for i in range(3)]
    rotated = nnx.clone(plain)
    rotated.rotate_residual(3)
    np.testing.assert_allclose(rotated(tokens[0]), plain(tokens[0]), atol=1e-3)
    quantized, report = qat.ptq.quantize(
        model, "quarot+gptq", "int4/channel", tokens, skip="embed|head"
    )
    lines = {line.path: line for line in report if line.quantized}
    assert {len(line.output_errors) for line in lines.values()} == {2}
    for line in lines.values():
        assert np.less(line.output_errors, line.rtn_output_errors).all()
    assert quantized.blocks.attention.qkv.dot_general.transform is None  # its norm's input is
    assert quantized.blocks.mlp.down.dot_general.transform is not None
    assert jnp.isfinite(quantized(tokens[0])).all()


def test_weights_of_a_quantized_model_are_rounded_once(mlp):
    trained, _ = qat.nnx.quantize_model(mlp, "w2a8")
    quantized, _ = qat.ptq.quantize(trained, "rtn", "int8/channel", batches())
    by_hand = qat.fake_quant(mlp.layers[0].kernel[...], "int8/channel", axis=0)
    np.testing.assert_array_equal(quantized.layers[0].kernel[...], by_hand)
    x = batches(seed=5)[0]
    other, _ = qat.nnx.quantize_model(mlp, "w8a8")
    np.testing.assert_allclose(quantized(x), other(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 4])
def test_outlier_rows_of_two_contracted_axes_stay_exact(heads):
    """The output projection of attention contracts heads and channels."""
    attention = nnx.MultiHeadAttention(heads, 24, 32, decode=False, rngs=nnx.Rngs(0))
    data = [batch.reshape(4, 16, 24) for batch in batches()]
    quantized, report = qat.ptq.quantize(
        attention, "llm_int8", "int2/channel", data, settings=Settings(outliers=100.0)
    )
    (line,) = [line for line in report if line.path == "out/kernel"]
    rows = np.any(np.asarray(line.exact_rows) != 0, axis=-1)
    assert rows.shape == (heads, 32 // heads)
    assert 0 < rows.sum() < 32
    kernel, exact = quantized.out.kernel[...], attention.out.kernel[...]
    np.testing.assert_allclose(kernel[rows], exact[rows], rtol=2**-10)
    assert not np.any(np.asarray(line.stored.dequantize())[rows])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "gtpq"}, "unknown method 'gtpq'.*nearest is 'gptq'"),
        (
            {"method": "gptq+quarot"},
            r"'gptq\+quarot': one rounding comes last; nearest is 'quarot\+gptq'",
        ),
        ({"method": "awq+awq"}, "names 'awq' twice"),
        (
            {"method": "llm_int8+quarot"},
            r"follows what moves inputs; nearest is 'quarot\+llm_int8'",
        ),
        ({"method": "gptq", "calibration": ()}, "'gptq' looks at the inputs of layers"),
        ({"quantizer": "none"}, "leaves weights as they are"),
        ({"quantizer": "int4/learned"}, "'int4/tensor/learned': a learned scale is trained"),
        ({"quantizer": "uint4"}, "every negative weight 0; nearest is 'uint4/tensor/zero_point'"),
        ({"quantizer": "int4/stochastic"}, "trained weights are rounded to nearest"),
        ({"quantizer": "int4/block:7"}, "layer layers/0: block size 7 .* is 'int4/block:8'"),
        ({"quantizer": "int4/block:12"}, r"layers/1: .* \(32, 16\); nearest .* is 'int4/block:8'"),
        ({"quantizer": "int4/block:24x3"}, r"layers/0: .* is 'int4/block:8x2'"),
        (
            {"skip": "layer/.*"},
            "skip 'layer/.*' matches no dense layer; nearest paths are 'layers/",
        ),
        ({"skip": ".*"}, "nothing to quantize"),
        (
            {"calibration": [jnp.full((4, 24), jnp.nan)]},
            "layer layers/0: its inputs are not finite",
        ),
        ({"calibration": batches()[0]}, r"calibration is an array of shape \(64, 24\)"),
        ({"settings": {"seed": 1}}, "settings: expected a qat.ptq.Settings"),
        (
            {
                "model": nnx.Conv(24, 8, (3,), rngs=nnx.Rngs(0)),
                "calibration": [jnp.ones((2, 9, 24))],
            },
            "nothing to quantize: .*; kernel: used by conv_general_dilated",
        ),
        ({"model": {"w": 1}}, "an NNX module or a pair"),
    ],
)
def test_bad_input_is_named(mlp, arguments, message):
    given = {"model": mlp, "method": "gptq", "quantizer": "int4/channel", "calibration": batches()}
    with pytest.raises(ValueError, match=message):
        qat.ptq.quantize(**{**given, **arguments})


def test_a_dead_input_is_rounded_to_nearest_and_few_tokens_are_named(mlp):
    dead = [batch.at[:, 5].set(0) for batch in batches()]
    quantized, _ = qat.ptq.quantize(mlp, "gptq", "int4/channel", dead)
    nearest, _ = qat.ptq.quantize(mlp, "rtn", "int4/channel")
    np.testing.assert_array_equal(quantized.layers[0].kernel[5], nearest.layers[0].kernel[5])
    undamped = dataclasses.replace(Settings(), gptq=Gptq(damping=0.0))
    with pytest.raises(ValueError, match=r"layer layers/0: .*singular with damping 0\.0"):
        qat.ptq.quantize(mlp, "gptq", "int4", [batches()[0][:4]], settings=undamped)


class HalfMine(nnx.Module):
    """A layer of Flax, and a product of its own."""

    def __init__(self):
        self.first = nnx.Linear(24, 16, rngs=nnx.Rngs(0))
        self.mine = nnx.Param(jax.random.normal(jax.random.key(1), (16, 8)))

    def __call__(self, x):
        return jax.nn.relu(self.first(x)) @ self.mine[...]


@pytest.mark.parametrize("method", ["smoothquant", "quarot", "awq"])
def test_inputs_of_a_product_that_no_layer_holds_stay_as_they_are(method):
    model, x = HalfMine(), batches(seed=5)[0]
    quantized, report = qat.ptq.quantize(model, method, "int16/channel", batches())
    assert error(quantized, x, model(x)) < 1e-3
    reasons = {line.path: line.reason for line in report if line.quantized}
    assert "inputs not transformed: no dense layer" in reasons["mine"]
    assert "not transformed" not in reasons["first/kernel"]


class Block(nn.Module):
    """A layer that is scanned."""

    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(24)(x)), None


class ScannedMlp(nn.Module):
    """A stack whose scan hands no transform to its layers, and a layer behind it."""

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(8)(scanned()(x, None)[0])


@pytest.mark.parametrize("method", ["smoothquant", "quarot"])
def test_a_linen_scan_keeps_its_function(method):
    module, x = ScannedMlp(), batches(seed=5)[0]
    variables = module.init(jax.random.key(0), x)
    (other, changed), report = qat.ptq.quantize(
        (module, variables), method, "int16/channel", batches()
    )
    expected = module.apply(variables, x)
    np.testing.assert_allclose(other.apply(changed, x), expected, rtol=2e-3, atol=2e-2)
    reasons = {line.path: line.reason for line in report if line.quantized}
    assert "an nn.scan keeps the transform" in reasons["ScanBlock_0/Dense_0/kernel"]
    assert "not transformed" not in reasons["Dense_0/kernel"]


def test_quantizers_of_weights_that_are_not_rounded_stay():
    class Lookup(nnx.Module):
        def __init__(self):
            self.embed = qat.nnx.Embed(10, 24, policy="w2", rngs=nnx.Rngs(0))
            self.out = nnx.Linear(24, 8, rngs=nnx.Rngs(1))

        def __call__(self, tokens):
            return self.out(self.embed(tokens))

    model = Lookup()
    quantized, _ = qat.ptq.quantize(model, "gptq", "int8/channel", [jnp.arange(10)])
    np.testing.assert_array_equal(quantized.embed(jnp.arange(10)), model.embed(jnp.arange(10)))


def test_methods_are_spelled_in_one_way():
    assert str(Method.parse(" QuaRot+GPTQ")) == "quarot+gptq"
    assert str(Method.parse("awq")) == "awq+rtn"
