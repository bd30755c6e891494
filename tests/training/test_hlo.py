"""How often the parts of a program run: loops stated, loops to be found out, and loops unclear."""

import jax
import jax.numpy as jnp
import pytest

from qat.training.hlo import bits, count_runs, nbytes, parse, shape_of

LOOPS = """HloModule step, is_scheduled=true, num_partitions=8

%add_two (q.1: u32[]) -> u32[] {
  %q.1 = u32[]{:T(128)} parameter(0)
  %two.1 = u32[]{:T(128)} constant(2)
  ROOT %sum = u32[]{:T(128)} add(%q.1, %two.1)
}

%inner (q: (u32[], f32[8])) -> (u32[], f32[8]) {
  %q = (u32[]{:T(128)}, f32[8]{0:T(512)S(1)}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%q), index=0
  %y = f32[8]{0} get-tuple-element(%q), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = NEXT
  ROOT %turned = (u32[]{:T(128)}, f32[8]{0}) tuple(%next, %y)
}

%until (r: (u32[], f32[8])) -> pred[] {
  %r = (u32[]{:T(128)}, f32[8]{0}) parameter(0)
  %k = u32[]{:T(128)} get-tuple-element(%r), index=0
  %limit = u32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%k, %limit), direction=DIRECTION
}

%outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], /*index=1*/f32[8]{0}) parameter(0)
  %zero = u32[] constant(START)
  %begin = u32[]{:T(128)} copy(%zero)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %state = (u32[], f32[8]{0}) tuple(%begin, %x)
  ROOT %loop = (u32[], f32[8]{0}) while(%state), condition=%until, body=%inner, metadata={}
}

%never (n: f32[8]) -> f32[8] {
  ROOT %n = f32[8]{0} parameter(0)
}

ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]{0}) parameter(0)
  ROOT %five = (s32[], f32[8]{0}) while(%a), condition=%until, body=%outer, STATED
}
"""
STATED = 'backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}'


def runs(start="0", direction="LT", following="u32[]{:T(128)} add(%j, %two)"):
    text = LOOPS.replace("START", start).replace("DIRECTION", direction)
    return count_runs(parse(text.replace("NEXT", following).replace("STATED", STATED)))


@pytest.mark.parametrize(("start", "turns"), [("0", 4), ("1", 3), ("5", 1)])
def test_turns_follow_from_start_step_and_limit(start, turns):
    """From 0, 1 or 5 by two to 7, five times."""
    counted, unknown = runs(start)
    assert (counted["outer"], counted["inner"]) == (5, 5 * turns)
    assert "never" not in counted
    assert not unknown


def test_the_step_may_be_in_a_fusion():
    counted, unknown = runs(following="u32[] fusion(%j), kind=kLoop, calls=%add_two")
    assert counted["inner"] == counted["add_two"] == 20
    assert not unknown


@pytest.mark.parametrize(
    "changes",
    [
        {"direction": "GT"},
        {"following": "u32[] multiply(%j, %two)"},
        {"following": "u32[] add(%j, %j)"},
    ],
)
def test_a_loop_of_unknown_turns_is_named_and_counted_once(changes):
    counted, unknown = runs(**changes)
    assert counted["inner"] == 5
    assert unknown == ("loop",)


def test_both_sides_of_a_condition_and_shared_functions_count():
    def step(x, _):
        return jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), None

    def both(x):
        return jax.lax.scan(step, x, length=6)[0]

    module = parse(jax.jit(both).lower(jnp.zeros(8)).compile().as_text())
    counted, _ = count_runs(module)
    sines = [
        counted[name]
        for name, computation in module.computations.items()
        for each in computation.values()
        if each.opcode in ("sine", "cosine")
    ]
    assert sorted(sines) == [6, 6]


def test_types_are_read():
    assert shape_of("bf16[8,1024]{1,0:T(8,128)(2,1)S(1)}") == ("bf16", (8, 1024))
    assert shape_of("f32[]{:T(128)}") == ("f32", ())
    assert nbytes("(f32[2,3]{1,0}, /*index=1*/s4[8]{0}, pred[])") == 24 + 4 + 1
    assert [bits(dtype) for dtype in ("f8e4m3fn", "s4", "pred", "bf16")] == [8, 4, 8, 16]


def test_what_is_not_a_program_is_refused():
    with pytest.raises(ValueError, match="expected the text of an HLO module"):
        parse("module @jit_f {}")
