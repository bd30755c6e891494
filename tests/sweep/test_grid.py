"""Combinators against plain sets and sequences, and what each refuses."""

import copy
import json
import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.sweep.grid import apply, axis, chain, product, subsample, where, zipped

CONFIG = {
    "policy": "none",
    "tokens": 1000,
    "rate": 1e-3,
    "on": False,
    "model": {"width": 32, "sizes": (1, 2)},
    "data": {"deep": {"names": ["a"]}},
}


def grids(*keys):
    """Grids whose runs set some of these keys."""
    return st.lists(st.dictionaries(st.sampled_from(keys), st.integers()), max_size=4).map(tuple)


@given(st.lists(st.integers(), min_size=1))
def test_an_axis_has_one_run_a_value_in_order(values):
    assert [run["k"] for run in axis("k", values)] == values


@given(grids("a", "b"), grids("c"), grids("d", "e"))
def test_a_product_has_every_combination_once_the_last_fastest(a, b, c):
    runs = product(a, b, c)
    assert len(runs) == len(a) * len(b) * len(c)
    assert list(runs) == [{**x, **y, **z} for x in a for y in b for z in c]


@given(grids("a", "b"), grids("c"), grids("d", "e"))
def test_product_and_chain_are_associative_and_have_neutral_grids(a, b, c):
    for combine, neutral in ((product, ({},)), (chain, ())):
        assert combine(combine(a, b), c) == combine(a, combine(b, c)) == combine(a, b, c)
        assert combine(a, neutral) == combine(neutral, a) == combine(a) == a
        assert combine() == neutral


@given(grids("a"), grids("a", "b"), grids("c"))
def test_a_product_distributes_over_a_chain(a, b, c):
    assert product(chain(a, b), c) == chain(product(a, c), product(b, c))


@given(st.lists(st.tuples(st.integers(), st.text()), min_size=1))
def test_zipped_sets_keys_together(pairs):
    first, second = zip(*pairs, strict=True)
    runs = zipped(axis("a", first), axis("b", second))
    assert [(run["a"], run["b"]) for run in runs] == pairs


@given(grids("a", "b"))
def test_where_keeps_order_and_splits_a_grid(grid):
    def keep(run):
        return run.get("a", 0) > 0

    kept, dropped = where(grid, keep), where(grid, lambda run: not keep(run))
    assert all(map(keep, kept))
    assert not any(map(keep, dropped))
    assert len(kept) + len(dropped) == len(grid)
    assert kept == tuple(run for run in grid if run in kept)


SAMPLED = st.tuples(st.sets(st.integers(), min_size=1).map(sorted), st.integers(0, 9), st.data())


@given(SAMPLED)
def test_a_larger_sample_keeps_a_smaller_one_and_the_order(case):
    values, seed, data = case
    grid = axis("a", values)
    counts = st.integers(0, len(grid))
    small, large = sorted((data.draw(counts), data.draw(counts)))
    few, many = (subsample(grid, count, seed) for count in (small, large))
    assert (len(few), len(many)) == (small, large)
    assert few == tuple(run for run in many if run in few)
    assert many == tuple(run for run in grid if run in many)


@given(SAMPLED)
def test_a_sample_depends_on_content_not_on_places(case):
    values, seed, data = case
    count = data.draw(st.integers(0, len(values)))
    shuffled = data.draw(st.permutations(values))
    one, other = (subsample(axis("a", each), count, seed) for each in (values, shuffled))
    assert {run["a"] for run in one} == {run["a"] for run in other}
    if one:  # others that were not chosen are not missed
        fewer = tuple(run for run in axis("a", values) if run in one or run["a"] % 2)
        assert {run["a"] for run in subsample(fewer, count, seed)} == {run["a"] for run in one}


def test_samples_of_other_seeds_differ_and_are_fair():
    grid = axis("a", range(50))
    samples = [{run["a"] for run in subsample(grid, 10, seed)} for seed in range(200)]
    assert len(set(map(frozenset, samples))) == 200
    times = [sum(value in sample for sample in samples) for value in range(50)]
    sigma = math.sqrt(200 * 0.2 * 0.8)
    assert max(abs(time - 40) for time in times) < 5 * sigma


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: axis("a", ()), "axis 'a' has no values"),
        (lambda: axis("policy", "w4"), "axis 'policy': expected several values.*'w4'"),
        (lambda: axis("a", 3), "several values.*3"),
        (lambda: axis("a", [{"b": 1}]), "a: expected a number.*{'b': 1}"),
        (lambda: product(axis("a", [1]), axis("b", [1]), axis("a", [2])), "product.*'a' is in two"),
        (lambda: zipped(axis("a", [1]), axis("a", [2])), "zipped.*'a' is in two"),
        (lambda: zipped(axis("a", [1, 2]), axis("b", [1, 2, 3])), "one length, got 2, 3 runs"),
        (lambda: subsample(axis("a", [1, 2]), 3), "0 to 2 runs, got 3"),
        (lambda: subsample(axis("a", [1, 2]), -1), "got -1"),
        (lambda: apply(CONFIG, {"model.widht": 1}), r"no key 'model\.widht'.*'model\.width'"),
        (lambda: apply(CONFIG, {"width": 1}), r"nearest is 'model\.width'"),
        (lambda: apply(CONFIG, {"tokens.more": 1}), r"no key 'tokens\.more'"),
        (lambda: apply(CONFIG, {"": 1}), "no key ''"),
        (lambda: apply(CONFIG, {"model": 1}), r"'model' is a group.*'model\.width'"),
        (lambda: apply(CONFIG, {"tokens": 1e3}), r"tokens: expected int such as 1000, got 1000\.0"),
        (lambda: apply(CONFIG, {"tokens": True}), "expected int"),
        (lambda: apply(CONFIG, {"rate": "1e-3"}), "expected float"),
        (lambda: apply(CONFIG, {"rate": True}), "expected float"),
        (lambda: apply(CONFIG, {"on": 1}), "expected bool"),
        (lambda: apply(CONFIG, {"policy": 4}), "expected str such as 'none', got 4"),
        (lambda: apply(CONFIG, {"policy": None}), "expected str"),
        (lambda: apply(CONFIG, {"model.sizes": 3}), "expected tuple"),
    ],
)
def test_refusals_name_the_value(make, words):
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "policy": st.text(),
        "tokens": st.integers(),
        "rate": st.floats(allow_nan=False) | st.integers(-(2**53), 2**53),
        "on": st.booleans(),
        "model.width": st.integers(),
        "model.sizes": st.lists(st.integers()) | st.lists(st.integers()).map(tuple),
        "data.deep.names": st.lists(st.text()) | st.lists(st.text()).map(tuple),
    },
)


def flat(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@given(OVERRIDES)
def test_apply_sets_what_it_is_told_in_the_configs_types_and_nothing_else(overrides):
    before, old = copy.deepcopy(CONFIG), dict(flat(CONFIG))
    new = apply(CONFIG, overrides)
    assert before == CONFIG
    for key, value in flat(new):
        expected = overrides.get(key, old[key])
        sequence = isinstance(expected, list | tuple)
        assert value == (type(old[key])(expected) if sequence else expected)
        assert type(value) is type(old[key])
    assert dict(flat(new)).keys() == old.keys()
    new["data"]["deep"]["names"].append("mutable")
    new["model"]["width"] = -1
    assert before == CONFIG


def test_numpys_numbers_become_pythons():
    (run,) = axis("rate", np.array([0.1], np.float32))
    assert type(run["rate"]) is float
    assert run["rate"] == np.float32(0.1)
    new = apply(CONFIG, {"tokens": np.int64(5), "on": np.bool_(True), "model.sizes": [np.int8(1)]})
    assert json.loads(json.dumps(new)) == new | {"model": {"width": 32, "sizes": [1]}}


def test_ten_thousand_runs_are_built_fast_and_small():
    axes = [axis(f"key{index}", range(10)) for index in range(4)]
    tracemalloc.start()
    start = time.process_time()
    grid = product(*axes)
    taken = time.process_time() - start
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(grid) == 10_000
    assert taken < 0.5
    assert held < 10e6
