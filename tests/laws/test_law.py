"""A law of one function: what the decorator reads, and what it refuses."""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from jax import Array

from qat import laws
from qat.laws.checklist import checklist
from qat.laws.law import (
    amplitude,
    exponent,
    float64_on_cpu,
    irreducible,
    law,
    positive,
    signed,
)

pytestmark = pytest.mark.usefixtures("optimized")


@law("A N^-alpha + c width + E")
def by_width(
    params: Array,
    width: Array,
    *,
    A: Annotated[Array, amplitude("amplitude, nats · params^alpha", per={"params": "alpha"})],
    alpha: Annotated[Array, exponent("of the model term")],
    c: Annotated[Array, signed("nats a unit of width", (-5.0, 5.0), (-1.0, 1.0))],
    E: Annotated[Array, irreducible()],
) -> Array:
    """A law of one's own, of a column nobody here knows."""
    return A * params**-alpha + c * width + E


def runs():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"params": np.geomspace(1e6, 1e9, 60), "width": rng.uniform(0, 1, 60)})
    loss = 300 * frame.params**-0.3 - 0.25 * frame.width + 2
    return frame.assign(loss=loss, tokens=1e9)


def test_its_declaration_is_read_from_the_signature():
    assert by_width.name == "by_width"
    assert by_width.columns == ("params", "width")
    assert by_width.names == ("A", "alpha", "c", "E")
    assert by_width.parameters[0].powers == (("params", "alpha", -1),)
    assert by_width.centred == ("params",)


def test_it_is_fitted_saved_and_loaded(tmp_path):
    fit = laws.fit(by_width, runs(), bootstrap=20, starts=32)
    expected = {"A": 300, "alpha": 0.3, "c": -0.25, "E": 2}
    assert fit.params == pytest.approx(expected, rel=1e-6)
    fit.save(tmp_path / "fit.json")
    assert laws.load(tmp_path / "fit.json", law=by_width) == fit
    with pytest.raises(ValueError, match="no column width"):
        laws.fit(by_width, runs().drop(columns="width"))


def test_coordinates_of_values_decode_to_them():
    for each in (by_width, laws.get_law("precision"), laws.get_law("kaplan")):
        params = {p.name: 0.7 * sum(p.starts) for p in each.parameters}
        mean_log = dict.fromkeys(each.centred, 3.0)
        with float64_on_cpu():
            u_P = jnp.asarray(each.encode(params, mean_log))
            found = each.decode(u_P, mean_log, jnp.full(len(each.names), jnp.nan))
        assert {name: float(x) for name, x in found.items()} == pytest.approx(params, rel=1e-12)


def test_what_is_not_declared_is_refused():
    with pytest.raises(ValueError, match="law 'bare': parameter E is annotated with"):

        @law("E")
        def bare(params: Array, *, E: Array) -> Array:
            return E

    with pytest.raises(ValueError, match=r"law 'lost': unknown column 'param'.*'params'"):

        @law("A")
        def lost(
            params: Array, *, A: Annotated[Array, amplitude("x", per={"param": 1.0})]
        ) -> Array:
            return A

    with pytest.raises(ValueError, match="law 'wrong': unknown exponent 'alpa'"):

        @law("A")
        def wrong(
            params: Array, *, A: Annotated[Array, amplitude("x", per={"params": "alpa"})]
        ) -> Array:
            return A


def test_the_checklist_says_what_is_known_and_what_is_missing():
    frame = runs().assign(run_id=np.arange(60) // 2, learning_rate=0.01, weight_bits=4.0)
    fit = laws.fit(by_width, frame, bootstrap=10, starts=8, seed=3)
    said = fit.checklist
    assert said["form"] == by_width.formula
    assert "params 1e+06…1e+09" in said["runs"]
    assert "weight_bits 4" in said["runs"]
    assert said["hyper-parameters"] == "learning_rate 0.01"
    assert said["seeds"] is None
    assert said["held-out validation"] is None
    assert "0 of 30 runs" in said["checkpoints"]
    assert "10 resamples" in said["uncertainty"]
    other = checklist(by_width, laws.as_table(frame.assign(loss=frame.loss + 1e-9)), fit.settings)
    assert other["data"] != said["data"]


def test_a_law_named_like_another_is_not_taken_for_it(tmp_path):
    mine = dataclasses.replace(by_width, name="kaplan")
    laws.fit(mine, runs(), bootstrap=0, starts=8).save(tmp_path / "fit.json")
    with pytest.raises(ValueError, match="a fit of another law 'kaplan', A N"):
        laws.load(tmp_path / "fit.json")
    assert laws.load(tmp_path / "fit.json", law=mine).law is mine


def test_impossible_declarations_are_refused():
    for bounds, starts in (((10.0, 1.0), (2.0, 3.0)), ((-1.0, 1.0), (0.1, 1.0))):
        with pytest.raises(ValueError, match="expected 0 < bounds"):
            positive("a width", bounds, starts)
    with pytest.raises(ValueError, match=r"bounds \(0, 1\) and starts \(0, 2\)"):
        signed("a width", (0, 1), (0, 2))
    with pytest.raises(ValueError, match="takes the formula first"):
        law(lambda params: params)
    with pytest.raises(ValueError, match="law 'nothing' reads no column"):

        @law("E")
        def nothing(*, E: Annotated[Array, irreducible()]) -> Array:
            return E
