"""Scaling laws: fit the loss to (N, D, precision) and say how far to trust the fit.

A law is a function of (parameters, table); fitting, intervals and prediction know no particular
one. Four files: `table` (checked runs), `forms` (the laws), `fit` (the solver), `uncertainty`
(intervals, diagnostics, the record that is saved).
"""

from qat.laws.fit import fit
from qat.laws.forms import LAWS, Group, Law, Parameter, get_law
from qat.laws.table import Table, as_table, read_table
from qat.laws.uncertainty import Diagnostics, Fit, Settings, load

__all__ = [
    "LAWS",
    "Diagnostics",
    "Fit",
    "Group",
    "Law",
    "Parameter",
    "Settings",
    "Table",
    "as_table",
    "fit",
    "get_law",
    "load",
    "read_table",
]
