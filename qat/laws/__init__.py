"""Scaling laws: fit the loss to (N, D, precision), say how far to trust the fit, and plan by it.

A law is a function of (parameters, table); fitting, intervals, comparison and planning know no
particular one. `table` holds checked runs; `law` and `forms` the laws, `published` the constants of
papers; `fit` and `solver` the fit, `record` what it returns. How far to trust it: `uncertainty`
(bootstrap), `profile`, `sensitivity`, `diagnostics`, `checklist`. Which law: `compare`, `holdout`;
`equal_bits` asks without any. What to do: `planning`.
"""

from qat.laws.compare import Comparison, compare
from qat.laws.diagnostics import Diagnostics
from qat.laws.equal_bits import equal_bits
from qat.laws.fit import fit
from qat.laws.forms import LAWS, get_law
from qat.laws.forms.free import free, free_of, offset, quartet
from qat.laws.law import (
    Group,
    Law,
    Parameter,
    amplitude,
    exponent,
    irreducible,
    law,
    positive,
    power,
    signed,
)
from qat.laws.planning.cost import Cost, Hardware, Linear, get_cost
from qat.laws.planning.critical import critical_tokens
from qat.laws.planning.draws import Estimate
from qat.laws.planning.next_runs import next_runs
from qat.laws.planning.plan import Plan, plan
from qat.laws.profile import Profile, profile
from qat.laws.published import published
from qat.laws.record import Fit, Settings, load
from qat.laws.sensitivity import Sensitivity, sensitivity
from qat.laws.table import Table, as_table, read_table

__all__ = [
    "LAWS",
    "Comparison",
    "Cost",
    "Diagnostics",
    "Estimate",
    "Fit",
    "Group",
    "Hardware",
    "Law",
    "Linear",
    "Parameter",
    "Plan",
    "Profile",
    "Sensitivity",
    "Settings",
    "Table",
    "amplitude",
    "as_table",
    "compare",
    "critical_tokens",
    "equal_bits",
    "exponent",
    "fit",
    "free",
    "free_of",
    "get_cost",
    "get_law",
    "irreducible",
    "law",
    "load",
    "next_runs",
    "offset",
    "plan",
    "positive",
    "power",
    "profile",
    "published",
    "quartet",
    "read_table",
    "sensitivity",
    "signed",
]
