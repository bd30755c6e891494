"""The policy shorthand and the rules that choose a policy by layer."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import pytest

from qat.formats import parse_format
from qat.policy import Policy, Rules
from qat.quantizer import Quantizer

SHORTHANDS = ["none", "w4", "a8", "kv4", "w4a8kv4", "we4m3ae5m2", "wternarya8", "w1kve2m1"]


def test_a_shorthand_names_the_format_of_each_operand():
    assert Policy.parse("w4ae4m3kv8") == Policy(
        weights=Quantizer("int4", "channel"),
        activations=Quantizer("e4m3", "tensor"),
        kv_cache=Quantizer("int8", "token"),
    )


@pytest.mark.parametrize(
    ("text", "weights", "activations", "kv_cache"),
    [
        ("none", "none", "none", "none"),
        ("w4", "int4", "none", "none"),
        ("w4a16", "int4", "none", "none"),
        ("kv2w3", "int3", "none", "int2"),
        ("wint16", "int16", "none", "none"),
        ("we4m3a8", "e4m3", "int8", "none"),
        ("we4m3fnuzae5m2fnuz", "e4m3fnuz", "e5m2fnuz", "none"),
        ("we3m4ieeea8", "e3m4ieee", "int8", "none"),
        ("wternarykvbf16", "ternary", "none", "bf16"),
        ("w1", "binary", "none", "none"),
    ],
)
def test_the_formats_of_a_shorthand(text, weights, activations, kv_cache):
    policy = Policy.parse(text)
    expected = {"weights": weights, "activations": activations, "kv_cache": kv_cache}
    for operand, name in expected.items():
        assert policy.format_name(operand) == name
        fmt = parse_format(name)
        assert policy.bits(operand) == (fmt.bits if fmt.quantizes else 16)


def test_what_a_shorthand_cannot_say_follows_after_commas():
    policy = Policy.parse("w4a8, gradients e5m2/token/stochastic, weights int4/channel/mse, native")
    assert policy == Policy(
        weights=Quantizer("int4", "channel", scale="mse"),
        activations=Quantizer("int8", "tensor"),
        kv_cache=Quantizer("none", "token"),
        gradients=Quantizer("e5m2", "token", rounding="stochastic"),
        mode="native",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w8a8, nativ", "'nativ' is neither operand nor mode"),
        ("w8a8, grads int8", "'grads int8' is neither"),
        ("w8a8, mode fake", "'mode fake' is neither"),
        ("w8a8, gradients int9x", "int9x"),
        ("w8a8,", "'' is neither"),
    ],
)
def test_what_follows_after_commas_is_checked(text, message):
    with pytest.raises(ValueError, match=message):
        Policy.parse(text)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        *((text, text) for text in ["none", "w4", "w4a8kv4", "we4m3ae5m2", "wternarya8", "kvbf16"]),
        ("wint4", "w4"),
        ("a8w4", "w4a8"),
        ("w16a16kv16", "none"),
        ("w1", "wbinary"),
        ("we4m3fn", "we4m3"),
    ],
)
def test_a_policy_is_written_as_it_is_read(text, canonical):
    assert str(Policy.parse(text)) == canonical
    assert Policy.parse(canonical) == Policy.parse(text)


@pytest.mark.parametrize("bits", range(1, 17))
def test_every_integer_survives_being_written_and_read(bits):
    policy = Policy.parse(f"wint{bits}")
    assert Policy.parse(str(policy)) == policy


def test_every_shorthand_has_one_structure():
    structures = {jax.tree.structure(Policy.parse(text).traced()) for text in SHORTHANDS}
    assert len(structures) == 1


def test_a_traced_policy_holds_numbers_and_no_names():
    policy = Policy.parse("w4a8kv4").traced()
    assert [leaf.shape for leaf in jax.tree.leaves(policy)] == [(6,)] * 3
    with pytest.raises(ValueError, match="named Format"):
        policy.format_name("weights")


def test_an_operand_set_to_none_stays_out_of_the_program():
    policy = Policy(weights=Quantizer("int4", "channel")).traced()
    assert len(jax.tree.leaves(policy)) == 1
    assert policy.activations is None
    assert (policy.bits("activations"), policy.format_name("kv_cache")) == (16, "none")


def test_a_policy_without_operands_is_not_one_with_unquantized_operands():
    assert str(Policy()) == "nothing"
    assert Policy.parse("nothing") == Policy() != Policy.parse("none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown policy '': it is empty"),
        ("w4w8", "the same operand twice at 'w8'.*nearest example is 'w4a8'"),
        ("w4x8", "unknown policy 'w4x8'.* at 'x8'.*nearest example is 'w4a8'"),
        ("4", "expected w, a, kv, q, p, grad and a format at '4'"),
        ("w", "at 'w'"),
        ("w4 a8", "at ' a8'"),
        ("w17", "'int17'.*nearest is 'int16'"),
        ("we9m1", "'e9m1'.*nearest is 'e8m1'"),
        ("nonea8", "unknown policy"),
        ("", "nearest example is 'none'"),
        ("int4", "nearest example is 'w4'"),
        ("mxfp4", "nearest example is 'wmxfp4'"),
        ("int4/token", "nearest example is 'weights int4/token'"),
        ("w 4", "nearest example is 'w4'"),
        ("weight int4/channel", "nearest example is 'weights int4/channel'"),
        ("w4 a8", "nearest example is 'w4a8'"),
        ("e4m3, native", "nearest example is 'we4m3'"),
        ("we4m33", "nearest is 'e4m3'"),
        ("w8a8, natve", "'natve' is neither.*weights, .*, native.*nearest is 'native'"),
        ("w8a8, gradient e5m2/token", "nearest is 'gradients e5m2/token'"),
        ("w8a8, gradients", "nearest is 'gradients int8/token'"),
    ],
)
def test_what_is_no_shorthand_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        Policy.parse(text)


W4, A8 = Policy.parse("w4"), Policy.parse("a8")


@pytest.mark.parametrize(
    ("path", "expected"),
    [("blocks/mlp/down", W4), ("blocks/mlp", A8), ("head", None), ("headless", A8)],
)
def test_the_first_pattern_that_matches_the_whole_path_decides(path, expected):
    rules = Rules([("head", None), (r".*/down", W4), (".*", A8), (".*", W4)])
    assert rules.policy_for(path) == expected


def test_a_layer_without_a_rule_is_an_error():
    rules = Rules([("blocks/.*", W4), ("embed", None)])
    with pytest.raises(ValueError, match=r"'head': expected one of 'blocks/\.\*', 'embed'"):
        rules.policy_for("head")


def test_a_broken_pattern_is_an_error():
    with pytest.raises(ValueError, match=r"rule '\(' is not a regular expression"):
        Rules([("(", None)])


@pytest.mark.usefixtures("unchecked_annotations")
def test_rules_in_no_order_are_an_error():
    with pytest.raises(ValueError, match=r"rules: expected pairs .* got \{'a'"):
        Rules({"a": "w4"})


QUANTIZERS = st.tuples(
    st.sampled_from(["int4", "int16", "uint4", "e4m3", "e2m1", "ternary", "int1", "nf4", "none"]),
    st.sampled_from(["tensor", "channel", "token", "block:32", "block:64", "block:8x8"]),
    st.sampled_from(["absmax", "mse", "absmean", "percentile:99.99", "fixed"]),
    st.sampled_from(["nearest", "stochastic"]),
    st.sampled_from(["identity", "trust"]),
).map("/".join) | st.sampled_from(["mxfp4", "nvfp4", "mxint8", "nf4", "int3/channel"])
OPERANDS = list(Policy().operands())


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(OPERANDS, QUANTIZERS)),
    st.sampled_from(["fake", "native"]),
    st.sampled_from(["none", "w4a8kv4", "bitnet", "wmxfp4gradnvfp4", "nothing"]),
)
def test_every_policy_survives_being_written_and_read(operands, mode, start):
    policy = dataclasses.replace(Policy.parse(start), **operands, mode=mode)
    assert Policy.parse(str(policy)) == policy


@pytest.mark.parametrize("text", ["none", "w4a8", "bitnet", "wnf4, gradients int8/stochastic"])
def test_a_traced_policy_is_written_too(text):
    traced = Policy.parse(text).traced()
    assert "traced" in str(traced) and repr(traced)
    assert ("16-level codebook" in traced.structure) == ("nf4" in text)
    assert str(traced.weights).startswith("traced/")


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (Policy.parse("w4a8, gradients e5m2/token"), "w4a8grade5m2"),
        (Policy.parse("w4g128a8qnf4"), "w4g128a8qnf4"),
        (Policy.parse("q16"), "q16"),
        (Policy.parse("a8, weights int8/channel/mse"), "a8, weights int8/channel/mse"),
        (Policy.parse("bitnet"), "bitnet"),
        (Policy.parse("bitnet, native"), "bitnet, native"),
        (Policy("int4/channel", "int8"), "weights int4/channel, activations int8/tensor"),
        (Policy(mode="native"), "native"),
    ],
)
def test_a_policy_is_written_in_the_shortest_way(policy, text):
    assert str(policy) == text


def test_without_a_shorthand_only_what_is_named_is_present():
    policy = Policy.parse("weights int4/channel, native")
    assert policy == Policy("int4/channel", mode="native")
