"""What is saved of a quantized model makes another of its code compute the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat
import qat.linen
import qat.nnx
from models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(vocabulary=16, width=16, layers=2, heads=2, kv_heads=1, mlp_width=24)


def net(seed):
    rngs = nnx.Rngs(seed)
    layers = nnx.Linear(24, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 8, rngs=rngs)
    model, _ = qat.nnx.quantize_model(nnx.Sequential(*layers), "w8a8")
    return model


def inputs(seed=0):
    x = jax.random.normal(jax.random.key(seed), (64, 24))
    return x * jnp.ones(24).at[5].set(50.0)[None]


@pytest.mark.parametrize("method", ["gptq", "smoothquant+quarot", "llm_int8"])
def test_a_model_made_anew_computes_the_same(tmp_path, method):
    quantized, report = qat.ptq.quantize(net(0), method, "int4/channel", [inputs()])
    other = net(1)
    before = other(inputs(2))
    qat.ptq.save(tmp_path / "model.safetensors", quantized, report)
    loaded = qat.ptq.load(tmp_path / "model.safetensors", other)
    np.testing.assert_array_equal(loaded(inputs(2)), quantized(inputs(2)))
    np.testing.assert_array_equal(other(inputs(2)), before)


@pytest.mark.parametrize("method", ["smoothquant+quarot", "llm_int8"])
def test_of_linen_too(tmp_path, method):
    module, x = nn.Dense(8), inputs()
    made = [module.init(jax.random.key(seed), x) for seed in range(2)]
    quantized, report = qat.ptq.quantize((module, made[0]), method, "int4/channel", [x])
    qat.ptq.save(tmp_path / "model", quantized, report)
    loaded, variables = qat.ptq.load(tmp_path / "model", (module, made[1]))
    expected = quantized[0].apply(quantized[1], x)
    np.testing.assert_array_equal(loaded.apply(variables, x), expected)


@pytest.mark.slow
def test_a_rotated_residual_and_cache_come_back(tmp_path):
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 16)
    models = [Transformer(CONFIG, qat.Policy.parse("a8kv4"), rngs=nnx.Rngs(i)) for i in range(2)]
    quantized, report = qat.ptq.quantize(
        models[0], "quarot+gptq", "int4/channel", [tokens], skip="embed|head"
    )
    qat.ptq.save(tmp_path / "model", quantized, report)
    loaded = qat.ptq.load(tmp_path / "model", models[1])
    np.testing.assert_array_equal(loaded(tokens), quantized(tokens))


class Normed(nnx.Module):
    """Statistics of batches, a range that calibration found, and a key that is the code's."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(24, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(self.norm(self.first(x))))


def test_statistics_and_ranges_come_back_bit_for_bit(tmp_path):
    policy = qat.Policy(activations="int8/fixed")
    models = [qat.nnx.quantize_model(Normed(seed), policy)[0] for seed in range(2)]
    models[0].train()
    qat.nnx.calibrate(models[0], [inputs()])
    models[0](inputs())
    for model in models:
        model.eval()
    quantized, report = qat.ptq.quantize(models[0], "gptq", "int4/channel", [inputs()])
    qat.ptq.save(tmp_path / "model", quantized, report)
    loaded = qat.ptq.load(tmp_path / "model", models[1])
    np.testing.assert_array_equal(loaded.norm.mean[...], quantized.norm.mean[...])
    assert np.isfinite(quantized(inputs(2))).all()
    np.testing.assert_array_equal(loaded(inputs(2)), quantized(inputs(2)))
    keys = [nnx.to_pure_dict(nnx.state(model, nnx.RngState)) for model in (loaded, models[1])]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), *keys))
    models[1].norm.mean = nnx.BatchStat(jnp.zeros(4))
    with pytest.raises(ValueError, match=r"norm/mean is \(16,\) there, \(4,\) here"):
        qat.ptq.load(tmp_path / "model", models[1])


class LinenNormed(nn.Module):
    """Statistics of batches, and a range that calibration finds."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(8)(x)


def test_collections_of_linen_come_back_bit_for_bit(tmp_path):
    module, _ = qat.linen.quantize_model(LinenNormed(), qat.Policy(activations="int8/fixed"))
    made = [module.init(jax.random.key(seed), inputs()) for seed in range(2)]
    variables = qat.linen.calibrate(module, made[0], [inputs()])
    _, changed = module.apply(variables, inputs(), train=True, mutable=["batch_stats"])
    quantized, report = qat.ptq.quantize(
        (module, {**variables, **changed}), "smoothquant", "int4/channel", [inputs()]
    )
    qat.ptq.save(tmp_path / "model", quantized, report)
    loaded, restored = qat.ptq.load(tmp_path / "model", (module, made[1]))
    assert {"params", "batch_stats", "ranges"} <= set(restored)
    expected = quantized[0].apply(quantized[1], inputs(2))
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(loaded.apply(restored, inputs(2)), expected)
    with pytest.raises(ValueError, match=r"ranges/Dense_0/activations is \(\) there, None here"):
        qat.ptq.load(tmp_path / "model", (module, {**made[1], "ranges": {}}))


def test_codes_are_packed(tmp_path):
    layer = nnx.Linear(256, 512, use_bias=False, rngs=nnx.Rngs(0))
    quantized, report = qat.ptq.quantize(layer, "rtn", "int3/channel")
    qat.ptq.save(tmp_path / "model.safetensors", quantized, report)
    codes = 256 * 512 * 3 // 8 + 512 * 4
    assert codes < (tmp_path / "model.safetensors").stat().st_size < codes + 2000


def test_what_does_not_fit_is_named(tmp_path):
    quantized, report = qat.ptq.quantize(net(0), "gptq", "int4/channel", [inputs()])
    narrow = nnx.Sequential(nnx.Linear(24, 16, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="the report is of another model"):
        qat.ptq.save(tmp_path / "model", narrow, report)
    qat.ptq.save(tmp_path / "model", quantized, report)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        qat.ptq.save(tmp_path / "model", quantized, report)
    with pytest.raises(ValueError, match=r"is \(32,\) there, \(16,\) here"):
        qat.ptq.load(tmp_path / "model", narrow)
    turned, of_turned = qat.ptq.quantize(net(0), "quarot", "int4/channel", [inputs()])
    qat.ptq.save(tmp_path / "turned", turned, of_turned)
    for place in ("turned", "model"):
        with pytest.raises(ValueError, match=r"inputs are transformed already: .* made anew"):
            qat.ptq.load(tmp_path / place, turned)
    qat.storage.save(tmp_path / "other", {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="holds something else"):
        qat.ptq.load(tmp_path / "other", net(0))
