"""Other people's Linen models: what is converted, what is reported, and nothing else changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qat.linen
from qat.contractions import find_contractions
from qat.linen import quantize_model
from qat.policy import Policy
from tests.linen_checks import (
    KEY,
    SPELLED,
    W4A8,
    Stack,
    apply,
    assert_close,
    assert_equal,
    lines,
    normal,
    quantized,
    traced,
    variables_of,
)


class Mlp(nn.Module):
    """What a user may have written, with one product that no layer makes."""

    train: bool = False
    act: object = nn.relu

    @nn.compact
    def __call__(self, x):
        mixer = self.param("mixer", nn.initializers.normal(), (4, 4))
        x = x @ mixer
        x = self.act(nn.Dense(8)(x))
        x = nn.BatchNorm(use_running_average=not self.train)(x)
        return nn.Dense(3, name="head")(x)

    def decode(self, x):
        return 2 * self(x)


def test_a_model_is_converted_by_rules_and_every_contraction_reported():
    x, model = normal(2, 4), Mlp(train=True)
    converted, report = quantize_model(model, [("head", None), (".*", W4A8)], x)
    line = Mlp.__call__.__wrapped__.__code__.co_firstlineno + 3
    assert lines(report)[1:] == [
        ("Dense_0", SPELLED),
        ("head", "unquantized by rule 'head'"),
    ]
    assert report.lines[0].path == ""
    assert "outside any layer this knows, in Mlp at" in report.lines[0].reason
    assert f"test_linen_conversion.py:{line} (Mlp.__call__); use qat.dot_general or" in str(report)
    assert isinstance(converted, Mlp) and converted.train

    shapes = [jax.eval_shape(lambda m=m: m.init_with_output(KEY, x)) for m in (model, converted)]
    assert shapes[0] == shapes[1]
    variables, mutable = variables_of(model, x), ("batch_stats",)
    (expected, updates), (result, new) = (
        apply(module, variables, x, mutable=mutable) for module in (model, converted)
    )
    assert jax.tree.structure(new) == jax.tree.structure(updates)
    assert not np.array_equal(result, expected)


def test_every_way_to_run_a_converted_model_is_converted():
    x, model = normal(2, 4), Mlp()
    converted, _ = quantize_model(model, W4A8)
    variables = variables_of(model, x)

    class Outer(nn.Module):
        inner: nn.Module

        def __call__(self, x):
            return self.inner.decode(x)

    ways = [
        lambda: converted.apply(variables, x, method="decode"),
        lambda: converted.apply(variables, x, method=Mlp.decode),
        lambda: converted.apply(variables, x, method=lambda module, x: module.decode(x)),
        lambda: converted.apply(variables, x, method=converted.decode),
        lambda: converted.clone().bind(variables).decode(x),
        lambda: nn.remat(type(converted))().apply(variables, x, method="decode"),
        lambda: Outer(converted).init(KEY, x),
    ]
    for way in ways:
        found = find_contractions(way)
        assert [bool(contraction.quantized) for contraction in found] == [False, True, True]


class Pair(nn.Module, kw_only=True):
    first: nn.Module
    second: nn.Module

    def setup(self):
        self.third = nn.Dense(2)

    def __call__(self, x):
        return self.third(self.second(self.first(x)))


def test_a_converted_part_keeps_its_rules_inside_a_converted_whole():
    x = normal(2, 4)
    inner, _ = quantize_model(Mlp(), [("Dense_0", "w2"), (".*", None)])
    whole = Pair(first=inner, second=nn.Dense(4))
    converted, report = quantize_model(whole, [("first/.*", "w8"), (".*", "w4")], x)
    verdicts = [line.quantized for line in report]
    assert verdicts == [None, "weights int2/channel", None, *["weights int4/channel"] * 2]
    assert traced(converted, variables_of(whole, x), x) == verdicts
    assert "Pair Summary" in converted.tabulate(KEY, x)


def test_conversion_leaves_no_trace_in_the_model_or_the_process():
    x, model = normal(2, 4), Mlp()
    variables = variables_of(model, x)
    before = jax.make_jaxpr(model.apply)(variables, x)
    converted, _ = quantize_model(model, W4A8, x)
    assert traced(converted, variables, x)[1:] == [SPELLED, SPELLED]
    assert str(jax.make_jaxpr(lambda v, x: model.apply(v, x))(variables, x)) == str(before)
    assert type(model) is Mlp


def test_conversions_by_equal_rules_are_equal():
    first, again, other = (quantize_model(Mlp(), rules)[0] for rules in ("w4a8", W4A8, "w4"))
    assert first == again and hash(first) == hash(again)
    assert first != other
    back, _ = quantize_model(first, "w4")
    assert back == other


def test_attention_is_quantized_by_the_rule_of_its_path():
    x = normal(2, 6, 4)
    model = nn.MultiHeadDotProductAttention(2, precision="highest")
    policy = Policy.parse("q8kv4p6")
    converted, report = quantize_model(model, [("", policy), ("out", None), (".*", W4A8)], x)
    assert lines(report) == [
        ("query", SPELLED),
        ("key", SPELLED),
        ("value", SPELLED),
        ("", "kv_cache int4/token, queries int8/token"),
        ("", "kv_cache int4/token, probabilities int6/token"),
        ("out", "unquantized by rule 'out'"),
    ]
    variables = variables_of(model, x)

    def by_hand(query, key, value, **kwargs):
        query = quantized(query, "int8/token", -1) / jnp.sqrt(2).astype(jnp.float32)
        key, value = (quantized(a, "int4/token", -1) for a in (key, value))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key, precision="highest"))
        weights = quantized(weights, "int6/token", -1)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value, precision="highest")

    rules = [("out", None), (".*", W4A8)]
    expected, _ = quantize_model(model.clone(attention_fn=by_hand), [("", None), *rules])
    assert_close(apply(converted, variables, x), apply(expected, variables, x))


def test_attention_says_what_its_policy_lacks():
    x, model = normal(2, 6, 4), nn.MultiHeadDotProductAttention(2)
    _, report = quantize_model(model, "w4a8", x)
    lacks = "rule '.*' quantizes no queries, kv_cache, probabilities"
    assert [verdict for path, verdict in lines(report) if path == ""] == [lacks, lacks]
    _, report = quantize_model(model, "kv4", x)
    assert ("", "kv_cache int4/token") in lines(report)
    assert ("out", "rule '.*' quantizes no weights, activations, gradients") in lines(report)


def test_attention_that_takes_no_einsum():
    def attention_fn(query, key, value, mask=None):
        return jnp.einsum("bqhd,bkhd->bqhd", query, key) + value

    model = nn.MultiHeadDotProductAttention(2, attention_fn=attention_fn)
    _, report = quantize_model(model, "q8kv4", normal(2, 6, 4))
    assert ("", "kv_cache int4/token, queries int8/token") in lines(report)
    _, report = quantize_model(model, "q8kv4p8", normal(2, 6, 4))
    assert any("takes no einsum" in verdict for _, verdict in lines(report))


def test_a_scanned_and_rematerialized_stack():
    x = normal(2, 4)
    converted, report = quantize_model(Stack(), W4A8, x)
    (line,) = report
    assert (line.path, line.contraction.count) == ("blocks/Dense_0", 3)
    variables = variables_of(Stack(), x)
    assert_equal(apply(converted, variables, x), apply(Stack(W4A8), variables, x))


@pytest.mark.parametrize(
    ("cell", "quantizes"),
    [(nn.OptimizedLSTMCell, False), (nn.GRUCell, True), (nn.SimpleCell, True)],
)
def test_recurrent_cells(cell, quantizes):
    x, model = normal(2, 5, 4), nn.RNN(cell(3))
    converted, report = quantize_model(model, W4A8, x)
    assert len(report) > 1
    assert {line.contraction.count for line in report} == {5}
    variables = variables_of(model, x)
    gradients = jax.eval_shape(jax.grad(lambda v: converted.apply(v, x).sum()), variables)
    assert jax.tree.structure(gradients) == jax.tree.structure(variables)
    if quantizes:
        assert {verdict for _, verdict in lines(report)} == {SPELLED}
    else:
        assert len(report.quantized) == 0
        assert "in OptimizedLSTMCell at flax/linen/recurrent.py:" in report.skipped[0].reason


JitDense = nn.jit(nn.Dense)


class JitTwice(nn.Module):
    """Two equal layers under `nn.jit`, which would share a trace."""

    @nn.compact
    def __call__(self, x):
        return JitDense(4, name="a")(x), JitDense(4, name="b")(x)


def test_nn_jit_shares_no_trace_between_rules():
    x, model = normal(2, 4), JitTwice()
    variables = variables_of(model, x)
    for _ in range(2):
        assert traced(model, variables, x) == [None, None]
        for first, second in (("w4", None), (None, "w4"), ("w4", "w2")):
            expected = [text and f"weights int{text[1]}/channel" for text in (first, second)]
            converted, report = quantize_model(model, [("a", first), ("b", second)], x)
            assert [line.quantized for line in report] == expected
            assert traced(converted, variables, x) == expected
    policy = Policy.parse("w4").traced()
    run = jax.jit(lambda policy: quantize_model(model, policy)[0].apply(variables, x))
    for result, dense in zip(run(policy), "ab", strict=True):
        params = {"params": variables["params"][dense]}
        assert_close(result, apply(qat.linen.Dense(4, policy=Policy.parse("w4")), params, x))
    root, _ = quantize_model(nn.jit(Mlp)(), W4A8)
    assert traced(root, variables_of(Mlp(), x), x)[1:] == [SPELLED, SPELLED]


class Residual(nn.Dense):
    """A subclass that adds a product to what Flax's own layer makes."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(x) + x @ jnp.eye(4, 3)


def test_a_subclass_of_a_layer_keeps_what_it_adds():
    x = normal(2, 4)
    converted, report = quantize_model(Residual(3), W4A8, x)
    assert [line.quantized for line in report] == [SPELLED, None]
    assert "outside any layer this knows, in Residual at" in report.skipped[0].reason
    variables = variables_of(nn.Dense(3), x)
    expected = apply(qat.linen.Dense(3, policy=W4A8), variables, x) + x @ jnp.eye(4, 3)
    assert_close(apply(converted, variables, x), expected)


def test_layers_that_cannot_be_converted_say_why():
    own = functools.partial(jax.lax.dot_general)
    cases = [
        (nn.Dense(3, dot_general=own), normal(2, 4), "it has a dot_general of its own"),
        (nn.ConvLocal(3, (2,)), normal(2, 5, 4), "its kernel differs from place to place"),
        (
            nn.ConvTranspose(3, (2,)),
            normal(2, 5, 4),
            "outside any layer this knows, in ConvTranspose",
        ),
        (qat.linen.Dense(3, policy=Policy()), normal(2, 4), "it has a policy of its own"),
    ]
    for model, x, reason in cases:
        converted, report = quantize_model(model, W4A8, x)
        assert all(reason in line.reason for line in report) and len(report)
        assert not any(traced(converted, variables_of(model, x), x))


def test_a_report_needs_inputs_which_may_be_abstract():
    assert len(quantize_model(Mlp(), W4A8)[1]) == 0
    _, concrete = quantize_model(Mlp(), W4A8, normal(2, 4))
    _, abstract = quantize_model(Mlp(), W4A8, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    _, decode = quantize_model(Mlp(), W4A8, normal(2, 4), method="decode")
    assert lines(abstract) == lines(concrete) == lines(decode)
    assert lines(concrete)


def test_rules_must_meet_layers_and_layers_rules():
    x = normal(2, 4)
    with pytest.raises(ValueError, match=r"rule 'Dens_0' matches no layer; nearest .*'Dense_0'"):
        quantize_model(Mlp(), [("Dens_0", W4A8), (".*", None)], x)
    with pytest.raises(ValueError, match="no rule matches the layer 'head'"):
        quantize_model(Mlp(), [("Dense_0", W4A8)], x)
    converted, _ = quantize_model(Mlp(), [("Dense_0", W4A8)])
    with pytest.raises(ValueError, match="no rule matches the layer 'head'"):
        jax.eval_shape(lambda: converted.init(KEY, x))
    with pytest.raises(ValueError, match="unbound"):
        quantize_model(nn.Dense(3).bind({}), W4A8)
