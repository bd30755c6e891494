"""Which variants a command line asks for."""

import pytest

from launch.rounding.grid import ORIGINAL, Variant, listed, spelled, variants


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int2…int4", ["int2", "int3", "int4"]),
        ("int2-int4", ["int2", "int3", "int4"]),
        ("INT2..4", ["int2", "int3", "int4"]),
        (
            "uint3...uint4/block:32/zero_point",
            ["uint3/block:32/zero_point", "uint4/block:32/zero_point"],
        ),
        ("int8–int8", ["int8"]),
        ("e2m1", ["e2m1"]),
        ("int2…uint4", ["int2…uint4"]),  # which the parser refuses
    ],
)
def test_ranges(text, expected):
    assert spelled(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int4,codebook(-1,0,1)/block:8,e2m1", ["int4", "codebook(-1,0,1)/block:8", "e2m1"]),
        ("codebook(1,-1),codebook(-1,2)", ["codebook(1,-1)", "codebook(-1,2)"]),
        ("int4", ["int4"]),
        ("", []),
    ],
)
def test_lists_are_cut_outside_parentheses(text, expected):
    assert listed(text) == expected


def test_codebooks_are_named_by_their_levels():
    book = ",".join(str(level / 100) for level in range(-50, 50))
    short, long, other = variants(
        ["rtn"], ["codebook(1,0,-1.0)", f"codebook({book})", f"codebook({book},7)"], ["w"]
    )
    assert short.spellings[1] == "codebook(-1,0,1)/channel"
    assert max(len(each.file_name) for each in (short, long, other)) < 200
    assert long.file_name != other.file_name


def test_methods_times_formats_under_each_policy():
    found = variants(
        ["rtn"], ["int3", "int4/block:32/mse", "mxfp4", "nf4", "int4/tensor"], ["w", "wa", "kv"]
    )
    assert [each.spellings for each in found] == [
        ("rtn", "int3/channel", "none", "none"),
        ("rtn", "int4/block:32/mse", "none", "none"),
        ("rtn", "mxfp4", "none", "none"),
        ("rtn", "nf4", "none", "none"),
        ("rtn", "int4/tensor", "none", "none"),
        ("rtn", "int3/channel", "int3/token", "none"),
        ("rtn", "int4/block:32/mse", "int4/token", "none"),
        ("rtn", "mxfp4", "mxfp4", "none"),
        ("rtn", "nf4", "nf4/token", "none"),
        ("rtn", "int4/tensor", "int4/token", "none"),
        ("rtn", "none", "none", "int3/token"),
        ("rtn", "none", "none", "int4/token"),
        ("rtn", "none", "none", "mxfp4"),
        ("rtn", "none", "none", "nf4/token"),
    ]
    assert len({each.file_name for each in found}) == len(found)


def test_an_unsigned_format_keeps_its_zero_point_everywhere():
    (variant,) = variants(["rtn"], ["uint4/zero_point"], ["wa"])
    assert variant.spellings[1:3] == ("uint4/channel/zero_point", "uint4/token/zero_point")


def test_what_is_asked_for_twice_is_there_once():
    assert len(variants(["rtn", "rtn"], ["int2…int4", "int3", "int4/channel"], ["w", "w"])) == 3


def test_which_methods_see_text():
    assert not Variant("hqq", variants(["rtn"], ["int4"], ["w"])[0].weights).needs_text
    assert Variant("quarot+gptq", variants(["rtn"], ["int4"], ["w"])[0].weights).needs_text
    assert not ORIGINAL.needs_text
    assert str(ORIGINAL) == "original"


@pytest.mark.parametrize(
    ("methods", "formats", "policies", "message"),
    [
        (["rnt"], ["int4"], ["w"], "unknown method 'rnt'.*nearest is 'rtn'"),
        (["rtn+rnt"], ["int4"], ["w"], "unknown method 'rnt'"),
        (["rtn"], ["imt4"], ["w"], "unknown format.*'imt4'.*nearest is 'int4'"),
        (["rtn"], ["int8…int2"], ["w"], "range 'int8…int2' falls: expected int2…int8"),
        (["rtn"], ["int4/blok:32"], ["w"], "unknown option 'blok:32'"),
        (["rtn"], ["none"], ["w"], "quantizer 'none/channel' leaves weights as they are"),
        (["rtn"], ["int4", "int4/learned"], ["w"], "scale is trained.* 'int4/channel/mse'"),
        (["rtn"], ["int4/fixed"], ["kv"], "needs its value; nearest is 'int4/channel/mse'"),
        (["rtn"], ["int4/stochastic"], ["w"], "rounded to nearest; expected 'int4/channel'"),
        (
            ["rtn"],
            ["uint2…uint4/block:8"],
            ["w"],
            "every negative weight 0; nearest is 'uint2/block:8/zero_point'",
        ),
        (
            ["rtn"],
            ["codebook(0,1,2)"],
            ["wa"],
            "every negative weight 0; nearest is 'int2/channel'",
        ),
        (["rtn"], ["int4"], ["vk"], "unknown policy 'vk': expected one of w, wa, kv"),
        ([], ["int4"], ["w"], "--methods is empty"),
        (["rtn"], [], ["w"], "--formats is empty"),
        (["rtn"], ["int4"], [], "--policy is empty"),
    ],
)
def test_what_is_misspelt_is_named(methods, formats, policies, message):
    with pytest.raises(ValueError, match=message):
        variants(methods, formats, policies)
