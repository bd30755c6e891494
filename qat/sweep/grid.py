"""Grids as data: every run of a sweep is a small dict of config keys and their values.

A grid is a tuple of such dicts, in the order the runs are to start. Combinators take grids and give
grids, so that designs are built from small parts and looked at like any other tuple:

    product(axis("model.width", (16, 32)), axis("policy", ("none", "w4", "w2")))  # 6 runs

No part of a grid is text to be evaluated, and what depends on two keys at once is a `where`. Keys
and types are checked against a config only by `apply`, since a grid knows no config.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from qat.spelling import expected_instead, nearest
from qat.training.results import hash_of

Overrides = Mapping[str, Any]
Grid = tuple[Overrides, ...]


def axis(key: str, values: Iterable[Any]) -> Grid:
    """One run a value.

    Args:
        key: dotted path of a config's key, such as "model.width".
        values: numbers, text, truth values, None, or lists of them; NumPy's are taken too.

    Raises:
        ValueError: no values, or something else.
    """
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise ValueError(
            expected_instead(f"axis {key!r}", "several values, such as (1, 2)", values)
        )
    grid = tuple({key: _plain(key, value)} for value in values)
    if not grid:
        raise ValueError(f"axis {key!r} has no values: expected at least one")
    return grid


def product(*grids: Grid) -> Grid:
    """Every run of one grid with every run of the others; the last grid varies fastest.

    Without grids there is one run without overrides.

    Raises:
        ValueError: two grids set the same key.
    """
    _check_disjoint("product", grids)
    return tuple(map(_merged, itertools.product(*grids)))


def zipped(*grids: Grid) -> Grid:
    """The first runs of all grids as one run, then the second ones, and so on.

    Raises:
        ValueError: the grids have different lengths, or two set the same key.
    """
    _check_disjoint("zipped", grids)
    if len({len(grid) for grid in grids}) > 1:
        lengths = ", ".join(str(len(grid)) for grid in grids)
        raise ValueError(f"zipped: expected grids of one length, got {lengths} runs")
    return tuple(map(_merged, zip(*grids, strict=True)))


def chain(*grids: Grid) -> Grid:
    """The runs of all grids, one grid after another; they need not set the same keys."""
    return tuple(itertools.chain(*grids))


def where(grid: Grid, keep: Callable[[Overrides], bool]) -> Grid:
    """The runs for which `keep` is true."""
    return tuple(filter(keep, grid))


def subsample(grid: Grid, count: int, seed: int = 0) -> Grid:
    """That many runs, chosen at random by their content, in the grid's order.

    Which runs are chosen depends on them and the seed alone, not on their places, and a larger
    count keeps all that a smaller one chose: a sweep can grow without losing a run.

    Raises:
        ValueError: the grid has fewer runs.
    """
    if not 0 <= count <= len(grid):
        raise ValueError(f"subsample: expected a count of 0 to {len(grid)} runs, got {count}")
    lots = [hash_of({"seed": seed, "run": _plain_run(run)}) for run in grid]
    chosen = sorted(range(len(grid)), key=lots.__getitem__)[:count]
    return tuple(grid[index] for index in sorted(chosen))


def apply(config: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """A config with other values, as a new nested dict that shares nothing mutable with the old.

    A whole number is taken where the config has a float; lists and tuples stand for each other and
    become what the config has.

    Args:
        config: nested mappings from names to values.
        overrides: dotted keys of the config and their values.

    Raises:
        ValueError: the config has no such key, or a value of another type.
    """
    changed: dict[str, Any] = _copied(config)
    for key, value in overrides.items():
        *path, name = key.split(".")
        group: Any = changed
        for part in path:
            group = group.get(part) if isinstance(group, dict) else None
        if not isinstance(group, dict) or name not in group:
            near = nearest(key, _keys(config))
            raise ValueError(f"the config has no key {key!r}; nearest is {near!r}")
        group[name] = _fitted(key, value, group[name])
    return changed


def _merged(runs: Iterable[Overrides]) -> Overrides:
    return {key: value for run in runs for key, value in run.items()}


def _check_disjoint(what: str, grids: Iterable[Grid]) -> None:
    """Raises ValueError where two grids set one key: neither value could be meant."""
    seen: set[str] = set()
    for grid in grids:
        keys = {key for run in grid for key in run}
        if twice := sorted(seen & keys):
            raise ValueError(f"{what}: expected a key in one grid alone, {twice[0]!r} is in two")
        seen |= keys


def _plain(key: str, value: Any) -> Any:
    """The value in Python's own types, lists as tuples.

    Raises:
        ValueError: it is nothing that JSON can hold.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list | tuple):
        return tuple(_plain(key, part) for part in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    expected = "a number, text, a truth value, None, or a list of them"
    raise ValueError(expected_instead(key, expected, value))


def _plain_run(run: Overrides) -> dict[str, Any]:
    return {key: _plain(key, value) for key, value in run.items()}


def _fitted(key: str, value: Any, old: Any) -> Any:
    """The value in the type of the one that it replaces."""
    if isinstance(old, dict):
        below = f"{key}.{next(iter(old), '…')}"
        raise ValueError(f"{key!r} is a group of keys: expected one of its own, such as {below!r}")
    new = _plain(key, value)
    if isinstance(old, list | tuple) and isinstance(new, tuple):
        return type(old)(new)
    if type(old) is float and type(new) is int:
        return float(new)
    if type(new) is not type(old):
        raise ValueError(expected_instead(key, f"{type(old).__name__} such as {old!r}", value))
    return new


def _copied(value: Any) -> Any:
    """Mappings as new dicts and lists as new lists, at every depth."""
    if isinstance(value, Mapping):
        return {key: _copied(part) for key, part in value.items()}
    return list(value) if isinstance(value, list) else value


def _keys(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of all values."""
    paths: list[str] = []
    for key, value in config.items():
        paths += _keys(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return paths
