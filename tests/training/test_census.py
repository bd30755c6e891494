"""Products and collectives of programs whose numbers are known, or that XLA counts itself."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from qat.training.census import Collectives, Dots, census


def program(*instructions, computation="ENTRY %main (a: f32[8]) -> f32[8]"):
    lines = "\n".join(f"  {line}" for line in instructions)
    return f"HloModule one, num_partitions=16\n\n{computation} {{\n{lines}\n}}\n"


@pytest.mark.parametrize(
    ("types", "low"),
    [
        (("bf16", "bf16"), False),
        (("s8", "bf16"), False),
        (("f32", "f8e4m3fn"), False),
        (("f8e5m2", "f8e4m3fn"), True),
        (("s4", "s4"), True),
        (("f4e2m1fn", "f8e4m3fn"), True),
    ],
)
def test_a_product_is_of_low_precision_if_both_operands_are(types, low):
    lhs, rhs = types
    found = census(
        program(
            f"%a = {lhs}[4,8]{{1,0}} parameter(0)",
            f"%b = {rhs}[8,2]{{1,0}} parameter(1)",
            "ROOT %c = f32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}",
        )
    )
    assert found.dots == (Dots(lhs, rhs, 1, 128),)
    assert found.dots[0].low_precision is low
    assert found.low_precision_share == low


# As a TPU's compiler writes them: plain; heads in the window; batched by dilation; and a gradient
# of weights, with the batch of 8 in the window.
@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "attributes", "multiply_adds"),
    [
        ("16,32", "32,8", "16,8", "dim_labels=bf_io->bf", 16 * 32 * 8),
        (
            "64,16,32",
            "32,8,1",
            "64,16,8",
            "window={size=1}, dim_labels=0bf_io0->0bf",
            64 * 16 * 32 * 8,
        ),
        (
            "2,9,5,1,1",
            "4,3,6,5,1",
            "2,9,4,3,6",
            "window={size=1x4x3 pad=0_0x3_3x2_2 rhs_reversal=0x1x1}, dim_labels=0bf12_12oi0->0b12f",
            2 * 9 * 5 * 4 * 3 * 6,
        ),
        (
            "4,3,10,5",
            "4,3,5,7",
            "4,3,10,7",
            "window={size=4x3 stride=3x2 lhs_dilate=4x3}, dim_labels=01bf_01io->01bf",
            4 * 3 * 10 * 5 * 7,
        ),
        ("8,10,6", "8,10,7", "6,7,1", "window={size=8}, dim_labels=0fb_0io->bf0", 8 * 10 * 6 * 7),
    ],
)
def test_products_in_the_guise_of_convolutions_cost_what_the_products_do(
    lhs, rhs, out, attributes, multiply_adds
):
    found = census(
        program(
            f"%a = bf16[{lhs}] parameter(0)",
            f"%b = bf16[{rhs}] parameter(1)",
            f"ROOT %c = bf16[{out}]{{1,0:T(8,128)(2,1)}} convolution(%a, %b), {attributes}",
        )
    )
    assert found.flops == 2 * multiply_adds


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_cost_what_xla_says(groups):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (2, 1),
            ((1, 2), (0, 3)),
            (3, 1),
            (2, 2),
            ("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    shapes = (jnp.zeros((2, 9, 8, 4)), jnp.zeros((3, 2, 4 // groups, 6)))
    compiled = jax.jit(convolve).lower(*shapes).compile()
    assert census(compiled.as_text()).flops == compiled.cost_analysis()["flops"]


def test_scanned_products_cost_their_turns():
    def layers(x, w_LDD):
        return jax.lax.scan(lambda x, w_DD: (jnp.tanh(x @ w_DD), None), x, w_LDD)[0]

    compiled = jax.jit(layers).lower(jnp.zeros((16, 32)), jnp.zeros((7, 32, 32))).compile()
    assert census(compiled.as_text()).dots == (Dots("f32", "f32", 7, 7 * 2 * 16 * 32 * 32),)


@pytest.mark.parametrize(
    ("exchange", "kind", "payload"),
    [
        (lambda x: jax.lax.psum(x, "a"), "all-reduce", 1),
        (lambda x: jax.lax.all_gather(x, "a"), "all-gather", 4),
        (lambda x: jax.lax.psum_scatter(x, "a", tiled=True), "reduce-scatter", 1),
        (lambda x: jax.lax.all_to_all(x, "a", 0, 0, tiled=True), "all-to-all", 1),
    ],
)
def test_collectives_of_a_scan_are_counted_with_their_groups_and_bytes(exchange, kind, payload):
    """Six turns of a scan among 4 of 8 devices, of 12 × 16 float32 each."""
    mesh = jax.make_mesh((2, 4), ("b", "a"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def turns(x_6XY):
        return jax.lax.scan(lambda total, x: (total, exchange(x)), 0.0, x_6XY)[1]

    mapped = jax.shard_map(turns, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    compiled = jax.jit(mapped).lower(jnp.zeros((6, 12, 16))).compile()
    found = census(compiled.as_text()).collectives
    assert found == (Collectives(kind, 4, 6, 6 * payload * 12 * 16 * 4),)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups={}", 16),
        ("replica_groups=[2,8]<=[4,4]T(1,0)", 8),
        ("replica_groups=mesh['x'=2,'y'=4,'z'=2] {'x','z'}", 4),
        ("replica_groups=mesh['x'=2,'y'=8], device_ids=([2,8]T(1,0)) {'y':(1)4}", 4),
    ],
)
def test_every_notation_of_groups_is_read(groups, size):
    found = census(
        program(
            "%a = f32[8]{0} parameter(0)",
            f"ROOT %b = f32[8]{{0}} all-gather-start(%a), channel_id=1, {groups}, dimensions={{0}}",
        )
    )
    assert found.collectives == (Collectives("all-gather", size, 1, size * 32),)


def test_the_pieces_of_one_collective_are_one():
    """What starts, goes on and ends in other instructions counts once, but others of it do not."""
    gather = "f32[16]{0} all-gather(%a), channel_id=7, replica_groups=[8,2]<=[16]"
    piece = gather + ', frontend_attributes={chain_id="3"}'
    found = census(
        program(
            "%a = f32[8]{0} parameter(0)",
            *(f"%b{index} = {piece}" for index in range(3)),
            *(f"%c{index} = {gather}" for index in range(2)),
            "%start = (f32[8]{0}, f32[8]{0}) collective-permute-start(%a), "
            "source_target_pairs={{0,1},{1,0}}",
            "ROOT %done = f32[8]{0} collective-permute-done(%start)",
        )
    )
    assert found.collectives == (
        Collectives("all-gather", 2, 3, 3 * 64),
        Collectives("collective-permute", 2, 1, 32),
    )


def test_a_sum_of_which_each_keeps_a_share_is_a_reduce_scatter():
    inner = program(
        "%a = (f32[8]{0}) parameter(0)",
        "%x = f32[8]{0} get-tuple-element(%a), index=0",
        "%y = bf16[6]{0} get-tuple-element(%a), index=1",
        "ROOT %sum = (f32[8]{0}, bf16[6]{0}) all-reduce(%x, %y), replica_groups=[4,4]<=[16]",
        computation="%all-reduce-scatter.1 (a: f32[8]) -> f32[8]",
    )
    outer = program("ROOT %f = f32[2]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1")
    found = census(inner + outer.partition("\n\n")[2])
    assert found.collectives == (Collectives("reduce-scatter", 4, 1, 8 * 4 + 6 * 2),)
