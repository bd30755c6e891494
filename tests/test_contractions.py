"""Every contraction of a program is found, counted, traced to its line and to its layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from qat.contractions import (
    Contraction,
    ContractionReport,
    ConversionReport,
    find_contractions,
    layer_scope,
    quantized_scope,
)

SQUARE = jax.ShapeDtypeStruct((4, 4), jnp.float32)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def marked(x, w):
    with layer_scope("blocks/0/up"), quantized_scope("weights int4/channel"):
        return x @ w


def only(contractions):
    (contraction,) = contractions
    return contraction


@pytest.mark.parametrize(
    ("equation", "lhs", "rhs", "expected"),
    [
        ("ab,bc->ac", (2, 3), (3, 4), "ab,bc->ac"),
        ("zxy,zyw->zxw", (2, 3, 4), (2, 4, 5), "abc,acd->abd"),
        ("xy,wy->xw", (2, 3), (4, 3), "ab,cb->ac"),
    ],
)
def test_a_product_is_spelled_as_an_einsum(equation, lhs, rhs, expected):
    found = only(
        find_contractions(lambda x, w: jnp.einsum(equation, x, w), shape(*lhs), shape(*rhs))
    )
    assert (found.operation, found.equation) == ("dot_general", expected)
    assert {found.lhs_shape, found.rhs_shape} == {lhs, rhs}
    assert (found.count, found.layer, found.quantized) == (1, None, None)


def test_a_convolution_is_spelled_in_xlas_letters():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    found = only(find_contractions(convolve, shape(2, 8, 8, 3), shape(3, 3, 3, 5)))
    assert (found.operation, found.equation) == ("conv_general_dilated", "b01f,01io->b01f")


def test_a_ragged_product_sums_over_no_group():
    sizes = jax.ShapeDtypeStruct((3,), jnp.int32)
    found = only(find_contractions(jax.lax.ragged_dot, shape(6, 4), shape(3, 4, 5), sizes))
    assert (found.equation, found.rhs_shape) == ("ab,cbd->ad", (3, 4, 5))


def in_scan(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=3)[0]


def in_nested_scan(x, w):
    return jax.lax.scan(lambda x, _: (in_scan(x, w), None), x, None, length=5)[0]


def in_while(x, w):
    return jax.lax.while_loop(lambda x: x[0, 0] < 3, lambda x: x @ w, x)


def in_both_branches(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: w @ x)


@jax.custom_vjp
def with_own_vjp(x, w):
    return x @ w


with_own_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@jax.custom_jvp
def with_own_jvp(x, w):
    return x @ w


with_own_jvp.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))


def in_shard_map(x, w):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))(x, w)


def in_a_kernel(x, w):
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    whole = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    return pl.pallas_call(kernel, whole, grid=(2, 3), interpret=True)(x, w)


@pytest.mark.parametrize(
    ("function", "counts"),
    [
        (in_scan, [3]),
        (in_nested_scan, [15]),
        (in_while, [None]),
        (in_both_branches, [1, 1]),
        (jax.checkpoint(lambda x, w: x @ w), [1]),
        (jax.jit(in_scan), [3]),
        (with_own_vjp, [1]),
        (with_own_jvp, [1]),
        (jax.vmap(jnp.dot, in_axes=(0, None)), [1]),
        (in_shard_map, [1]),
        (in_a_kernel, [6]),
        (jax.grad(lambda x, w: with_own_vjp(x, w).sum(), argnums=(0, 1)), [1, 1, 1]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_contractions_are_found_and_counted_wherever_they_are(function, counts):
    assert [found.count for found in find_contractions(function, SQUARE, SQUARE)] == counts


@pytest.mark.parametrize(
    "function",
    [
        jax.jit(marked),
        jax.checkpoint(marked),
        lambda x, w: jax.lax.scan(lambda x, _: (marked(x, w), None), x, None, length=2)[0],
        lambda x, w: jax.vmap(marked, in_axes=(0, None))(x[:, None], w),
        jax.grad(lambda x, w: marked(x, w).sum(), argnums=(0, 1)),
        jax.grad(jax.checkpoint(lambda x, w: jnp.tanh(marked(x, w)).sum()), argnums=(0, 1)),
        lambda x, w: jax.jvp(functools.partial(marked, w=w), (x,), (x,)),
    ],
    ids=["jit", "checkpoint", "scan", "vmap", "grad", "grad of checkpoint", "jvp"],
)
def test_marks_survive_transformations(function):
    found = find_contractions(function, SQUARE, SQUARE)
    assert found
    assert {(f.layer, f.quantized) for f in found} == {("blocks/0/up", "weights int4/channel")}


def test_a_layer_inside_a_quantized_one_speaks_for_itself():
    def nested(x, w):
        with layer_scope("outer"), quantized_scope("weights int4"), layer_scope("outer/inner"):
            return x @ w

    found = only(find_contractions(nested, SQUARE, SQUARE))
    assert (found.layer, found.quantized) == ("outer/inner", None)


def test_marks_hold_any_text():
    def odd(x, w):
        with layer_scope("a[0]/b (c)"), quantized_scope("weights [int4]"):
            return x @ w

    found = only(find_contractions(odd, SQUARE, SQUARE))
    assert (found.layer, found.quantized) == ("a(0)/b (c)", "weights (int4)")


def test_lookups_are_listed_where_they_are_quantized():
    def lookups(table, ids):
        with quantized_scope("weights int4/channel"):
            quantized = jnp.take(table, ids, axis=0)
        return quantized + jnp.take(table, ids, axis=0)

    ids = jax.ShapeDtypeStruct((2,), jnp.int32)
    found = only(find_contractions(lookups, SQUARE, ids))
    assert (found.operation, found.lhs_shape) == ("gather", (4, 4))


@jax.jit
def helper(x, w):
    return x @ w


def line_of(function, offset):
    return f"test_contractions.py:{function.__code__.co_firstlineno + offset} "


def test_the_source_is_the_users_line():
    def model(x, w):
        x = jnp.einsum("ab,bc->ac", x, w)
        x = jnp.einsum("ab,bc->ac", x, w)  # traced once, by JAX's own cache
        return helper(helper(x, w), w)

    sources = [found.source for found in find_contractions(model, SQUARE, SQUARE)]
    starts = [line_of(model, 1), line_of(model, 2), *[line_of(helper.__wrapped__, 2)] * 2]
    assert [start in s for s, start in zip(sources, starts, strict=True)] == [True] * 4
    assert sources[-1].endswith(" (helper)")


def test_the_source_of_a_jitted_library_function_is_its_call():
    def model(x):
        return jnp.convolve(x, x)

    (found,) = find_contractions(model, shape(4))
    assert line_of(model, 1) in found.source


def test_arguments_that_are_no_arrays_stay_what_they_are():
    def function(x, twice, *, mode, batch):
        assert (twice, mode) == (True, "fast")
        return batch["x"] @ x, "not an array", None

    found = find_contractions(
        function, np.ones((4, 4), np.float32), True, mode="fast", batch={"x": SQUARE}
    )
    assert len(found) == 1


def test_a_report_has_a_line_for_each():
    first = Contraction(
        "dot_general", "ab,bc->ac", (2, 3), (3, 4), 12, "", "m.py:1 (f)", "up", "weights int4"
    )
    second = Contraction("dot_general", "a,a->", (3,), (3,), None, "", "m.py:2 (f)", None, None)
    report = ConversionReport((ContractionReport(first), ContractionReport(second, "no layer")))
    assert str(report).splitlines() == [
        "up: dot_general ab,bc->ac (2×3, 3×4, 12 times): weights int4",
        "(root): dot_general a,a-> (3, 3, unknown times): skipped: no layer",
    ]
    assert len(report) == 2
    assert [line.path for line in report] == ["up", None]
    assert report.quantized == report.lines[:1]
    assert report.skipped == report.lines[1:]
    assert str(ConversionReport()) == "no contraction"
