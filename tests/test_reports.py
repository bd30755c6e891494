"""Reports say what is known, and no more: with example inputs and without, in both doors."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import qat.linen
import qat.nnx
from qat.policy import Policy

X = jax.ShapeDtypeStruct((2, 6, 8), jnp.float32)
W = jnp.ones((8, 8))


def lines(model, rules, *inputs):
    door = qat.linen if isinstance(model, nn.Module) else qat.nnx
    return str(door.quantize_model(model, rules, *inputs)[1]).split("\n")


def attention():
    return nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=nnx.Rngs(0))


class Own(nnx.Linear):
    """A layer that contracts in its own way."""

    def __call__(self, inputs):
        return inputs @ self.kernel[...]


class Loose(nnx.Module):
    """Contractions of every kind outside any layer."""

    def __init__(self):
        self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        x = jnp.einsum("btd,de->bte", self.linear(x), W)
        x = jax.lax.conv_general_dilated(
            x, W[None], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )
        return jax.lax.ragged_dot(x[0], W[None], jnp.asarray([6], jnp.int32))


class LinenLoose(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x) @ W
        return nn.ConvTranspose(8, (3,))(x)


def test_without_inputs_the_layers_announce_what_they_will_do():
    assert lines(attention(), "w4a8kv4") == [
        *(
            f"{name}: LinearGeneral: will quantize weights int4/channel, activations int8/tensor"
            for name in ("key", "out", "query", "value")
        ),
        "(root): MultiHeadAttention: will quantize kv_cache int4/token",
        "(this is what the layers are; give example inputs to see what runs)",
    ]


def test_without_inputs_no_claim_is_made_for_code_that_is_not_known():
    own, _ = lines(Own(8, 8, rngs=nnx.Rngs(0)), "w4a8")
    assert own == "(root): Own: skipped: its __call__ is its own; give example inputs to see"
    (traced,) = lines(Own(8, 8, rngs=nnx.Rngs(0)), "w4a8", X)
    assert "skipped: outside any layer this knows" in traced and "qat.einsum" in traced


def test_linen_says_that_it_needs_inputs():
    assert lines(nn.Dense(3), "w4") == [
        "(Linen makes layers when they run: give example inputs to see them)"
    ]


@pytest.mark.parametrize("inputs", [(), (X,)], ids=["declared", "traced"])
@pytest.mark.parametrize("rules", ["none", "w16a16kv16", None])
@pytest.mark.parametrize("model", [attention(), nn.Dense(3)], ids=["nnx", "linen"])
def test_what_quantizes_nothing_is_unquantized(model, rules, inputs):
    verdicts = [line.rpartition(": ")[2] for line in lines(model, rules, *inputs) if ":" in line]
    if inputs or isinstance(model, nnx.Module):
        assert [v for v in verdicts if v[0] != "("]
    assert {v for v in verdicts if "give example" not in v} <= {"unquantized by rule '.*'"}


@pytest.mark.parametrize(
    ("rules", "scores", "mixed"),
    [
        (
            "w4kv4q8p2",
            "kv_cache int4/token, queries int8/token",
            "kv_cache int4/token, probabilities int2/token",
        ),
        ("kv4", "kv_cache int4/token", "kv_cache int4/token"),
        ("q4", "queries int4/token", None),
        ("p4", None, "probabilities int4/token"),
    ],
)
@pytest.mark.parametrize(
    "model", [attention(), nn.MultiHeadDotProductAttention(2)], ids=["nnx", "linen"]
)
def test_each_contraction_of_attention_has_its_own_operands(model, rules, scores, mixed):
    door = qat.linen if isinstance(model, nn.Module) else qat.nnx
    _, report = door.quantize_model(model, rules, X)
    own = [line for line in report if line.path == ""]
    assert [line.quantized for line in own] == [scores, mixed]
    assert all(line.reason for line in report if not line.quantized)
    if rules != "w4kv4q8p2":
        dense = [line for line in report if line.path != ""]
        assert dense and not any(line.quantized for line in dense)
        expected = "rule '.*' quantizes no weights, activations, gradients"
        assert {line.reason for line in dense} == {expected}


def test_the_advice_names_a_door_that_fits():
    _, einsum, convolution, ragged = lines(Loose(), "w4", X)
    assert einsum.endswith("; use qat.dot_general or qat.einsum there")
    assert convolution.endswith("; use qat.conv_general_dilated there")
    assert ragged.endswith("; which has no quantized counterpart")
    _, product, transposed = lines(LinenLoose(), "w4", X)
    assert product.endswith("; use qat.dot_general or qat.einsum there")
    assert transposed.endswith("; Flax's own code, which has no place for another contraction")


class Pair(nn.Module):
    """Two layers, of which one may be left out."""

    @nn.compact
    def __call__(self, x, both=True):
        x = nn.Dense(8, name="hidden")(x)
        return nn.Dense(4, name="out")(x) if both or self.is_initializing() else x

    @nn.compact
    def half(self, x):
        return nn.Dense(8, name="hidden")(x)


@pytest.mark.parametrize("rules", [[("hiden", "w1"), (".*", None)], [(".*", None), ("ou", "w4")]])
def test_linen_notices_a_rule_without_a_layer_when_it_runs(rules):
    model, _ = qat.linen.quantize_model(Pair(), rules)
    x = jnp.ones((2, 8))
    variables = Pair().init(jax.random.key(0), x)
    wrong = next(pattern for pattern, _ in rules if pattern != ".*")
    near = r"nearest paths are '(hidden|out)', '(hidden|out)'"
    for run in (
        lambda: model.init(jax.random.key(0), x),
        lambda: jax.jit(model.apply)(variables, x),
        lambda: model.bind(variables)(x),
    ):
        with pytest.raises(ValueError, match=f"rule '{wrong}' matches no layer; {near}"):
            run()


def test_linen_lets_a_rule_have_a_layer_that_does_not_run():
    model, _ = qat.linen.quantize_model(Pair(), [("out", "w1"), (".*", "w4")])
    x = jnp.ones((2, 8))
    variables = model.init(jax.random.key(0), x)
    model.apply(variables, x, both=False)
    model.apply(variables, x, method="half")
    model.init(jax.random.key(0), x, method="half")


def test_a_model_without_contractions_is_an_error():
    for model in (nn.LayerNorm(), nnx.LayerNorm(8, rngs=nnx.Rngs(0))):
        with pytest.raises(
            ValueError, match=r"rule '\.\*' matches no layer; nearest paths are none"
        ):
            lines(model, "w4", X)


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Sequential([nn.Dense(8), nn.Conv(8, (3,))], name="stack")(x)


class NnxNested(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stack = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Conv(8, 8, (3,), rngs=rngs)])

    def __call__(self, x):
        return self.stack[1](self.stack[0](x))


@pytest.mark.parametrize(
    ("policy", "layer", "message"),
    [
        (Policy("int4/block:7"), 0, "block size 7 does not divide"),
        (Policy("int4/channel/stochastic"), 0, "stochastic rounding needs"),
        (Policy("int8/channel", "int8", mode="native"), 1, "cannot run a convolution"),
    ],
)
def test_errors_name_the_layer(policy, layer, message):
    x = jnp.ones((2, 6, 8))
    variables = Nested().init(jax.random.key(0), x)
    model, _ = qat.linen.quantize_model(Nested(), policy)
    with pytest.raises(ValueError, match=f"^layer {('Dense_0', 'Conv_0')[layer]}: .*{message}"):
        model.apply(variables, x)
    with pytest.raises(ValueError, match=f"^layer stack/{layer}: .*{message}"):
        qat.nnx.quantize_model(NnxNested(), policy)[0](x)


class Scanned(nn.Module):
    """A recurrent cell whose scan splits no noise."""

    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.GRUCell(4))(x)


def test_noise_inside_a_scan_that_splits_none_is_explained():
    model, _ = qat.linen.quantize_model(Scanned(), Policy("int4/channel/stochastic"))
    x, key = jnp.ones((2, 6, 8)), jax.random.key(0)
    variables = Scanned().init(key, x)
    with pytest.raises(ValueError, match=r"split_rngs=\{'noise': True, …\} of an nn.scan"):
        model.apply(variables, x, rngs={"noise": key})
