"""Sweeps: many runs described as data, and their results gathered into one table."""

from qat.sweep.grid import Grid, Overrides, apply, axis, chain, product, subsample, where, zipped
from qat.sweep.sweep import Sweep

__all__ = [
    "Grid",
    "Overrides",
    "Sweep",
    "apply",
    "axis",
    "chain",
    "product",
    "subsample",
    "where",
    "zipped",
]
