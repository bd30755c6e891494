"""A sweep checks itself when it is made."""

import types

import pytest

from qat.sweep.grid import axis, product
from qat.sweep.sweep import Sweep

CONFIG = {"policy": "none", "tokens": 10, "rate": 0.1, "model": {"width": 8, "sizes": (1,)}}
GRID = product(axis("policy", ("none", "w4")), axis("model.width", (8, 16)))


def test_a_sweep_gives_every_runs_config_in_order():
    sweep = Sweep(CONFIG, GRID)
    runs = [(config["policy"], config["model"]["width"]) for config in sweep.configs()]
    assert runs == [("none", 8), ("none", 16), ("w4", 8), ("w4", 16)]
    assert all(config["tokens"] == 10 for config in sweep.configs())


def test_lists_stand_for_tuples_and_mappings_for_dicts():
    sweep = Sweep(types.MappingProxyType(CONFIG), list(GRID), ["rtn"], ["int4"], [0.5, 1])
    assert sweep == Sweep(CONFIG, GRID, ("rtn",), ("int4",), (0.5, 1))
    assert next(sweep.configs()) == CONFIG


PTQ = {"ptq_methods": ("rtn",), "ptq_formats": ("int4",)}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"config": "tiny.py"}, r"config: expected a nested dict.*to_dict.*'tiny\.py'"),
        ({"config": CONFIG | {"path": object}, "grid": ({},)}, "config: expected what JSON.*type"),
        ({"grid": ()}, "the grid is empty"),
        ({"grid": {"policy": "w4"}}, "grid: expected a tuple"),
        ({"grid": (*GRID, GRID[1])}, "runs 2 and 5 .* the same: {'policy': 'none', .* 16}"),
        ({"grid": ({}, {"rate": 0.1})}, "runs 1 and 2"),
        ({"grid": ({"rate": 1}, {"rate": 1.0})}, "runs 1 and 2"),
        ({"grid": ({"model.sizes": [2]}, {"model.sizes": (2,)})}, "runs 1 and 2"),
        ({"grid": axis("model.widht", [1])}, r"nearest is 'model\.width'"),
        ({"grid": axis("tokens", [1.5])}, "tokens: expected int"),
        (PTQ | {"ptq_methods": ("rtm",)}, "unknown ptq method 'rtm'.*nearest is 'rtn'"),
        (PTQ | {"ptq_methods": "rtn"}, "ptq_methods: expected a tuple, got 'rtn'"),
        (PTQ | {"ptq_methods": ()}, "expected both or neither"),
        (PTQ | {"ptq_formats": ()}, "expected both or neither"),
        (PTQ | {"ptq_formats": ("imt4",)}, "unknown format 'imt4'.*'int4'"),
        (PTQ | {"ptq_formats": (4,)}, "ptq_formats: expected a Quantizer or its spelling.*4"),
        (PTQ | {"ptq_formats": ("int4", "INT4/tensor")}, "'int4' and 'INT4/tensor' are the same"),
        (PTQ | {"ptq_formats": ("none",)}, "'none' quantizes nothing"),
        (PTQ | {"ptq_methods": ("rtn", "rtn")}, "ptq_methods: 'rtn' and 'rtn'"),
        (PTQ | {"ptq_at": (0.0,)}, r"ptq_at: expected a share .* got 0\.0"),
        (PTQ | {"ptq_at": (1.01,)}, r"got 1\.01"),
        (PTQ | {"ptq_at": (float("nan"),)}, "got nan"),
        (PTQ | {"ptq_at": (True,)}, "got True"),
        (PTQ | {"ptq_at": ("half",)}, "got 'half'"),
        (PTQ | {"ptq_at": (1, 1.0)}, r"ptq_at: 1 and 1\.0"),
        (PTQ | {"ptq_at": ()}, "ptq_at is empty"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_line(fields, words):
    with pytest.raises(ValueError, match=words) as caught:
        Sweep(**{"config": CONFIG, "grid": GRID, **fields})
    assert "\n" not in str(caught.value)
