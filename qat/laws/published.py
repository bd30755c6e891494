"""Laws with the constants their papers print, as fits without a table.

To check a claim, to plan before there are runs of one's own, to compare. They carry no draws, so
whatever is derived from them has no interval (NaN), and they were measured on other data, models
and tokenizers: between papers only their shapes can be compared, not their losses.

Two papers print a term and leave the law of size and data to the reader. Their fits are of that
term alone, in nats added; together with constants of Chinchilla's law from the same data as one's
own runs they are a whole law:

    constants = fit("chinchilla", table).params | published("ouyang").params
    LAWS["ouyang"].predict(constants, runs)
"""

import dataclasses

import numpy as np

from qat.laws.diagnostics import Diagnostics
from qat.laws.forms import LAWS
from qat.laws.forms.rounding import chen_term, ouyang_term
from qat.laws.law import Law
from qat.laws.record import Fit, Settings
from qat.spelling import expected_one_of


@dataclasses.dataclass(frozen=True)
class Published:
    """Constants of a paper.

    Attributes:
        reference: arXiv number and where in the paper.
        law: the law they are of.
        params: value by name.
    """

    reference: str
    law: Law
    params: dict[str, float]


def _chen(formats: str, k: float, gamma_D: float, gamma_N: float, gamma_G: float) -> Published:
    return Published(
        f"Chen et al. 2025, arXiv 2505.14302, {formats}, the added term alone",
        chen_term,
        {"k": k, "gamma_D": gamma_D, "gamma_N": gamma_N, "gamma_G": gamma_G},
    )


PUBLISHED = {
    # The paper also prints an offset b = 1.1277 in the exponent of P_post, whose sign its text
    # leaves open; the law has none. C_w, C_a and C_kv of its unified law are not printed.
    "kumar": Published(
        "Kumar et al. 2024, arXiv 2411.04330, Table 2",
        LAWS["precision"],
        {
            "A": 4.299e3,
            "B": 1.806e4,
            "E": 2.7648,
            "alpha": 0.4965,
            "beta": 0.4965,
            "gamma_w": 2.6745,
            "n_w": 0.3037,
            "gamma_a": 2.2102,
            "n_a": 1.4072,
            "gamma_kv": 0.9578,
            "n_kv": 2.4185,
            "C_T": 0.0598,
            "gamma_D": 0.5068,
            "gamma_N": 0.3439,
            "gamma_post": 0.5907,
        },
    ),
    "besiroglu": Published(
        "Besiroglu et al. 2024, arXiv 2404.10102, Chinchilla's law on the runs of Hoffmann et al.",
        LAWS["chinchilla"],
        {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658},
    ),
    "sun": Published(
        "Sun et al. 2025, arXiv 2501.02423, floating-point training",
        LAWS["sun"],
        {
            "n": 69.2343,
            "d": 68973.0621,
            "E": 1.9061,
            "alpha": 0.2368,
            "beta": 0.5162,
            "gamma": 11334.5197,
            "delta": 3.1926,
            "nu": 2.9543,
        },
    ),
    "ouyang": Published(
        "Ouyang et al. 2024, arXiv 2411.17691, the added term alone",
        ouyang_term,
        {"k": 0.017, "gamma_D": 0.5251, "gamma_N": 0.2261, "gamma_P": 5.4967},
    ),
    "chen_w4a4": _chen("W4A4", 0.1582, 0.0745, 0.2186, 0.7779),
    "chen_w4a16": _chen("W4A16", 0.2522, 0.1610, 0.3589, 0.3533),
    "chen_w16a4": _chen("W16A4", 0.1004, 0.0331, 0.1816, 0.9812),
}


def published(name: str) -> Fit:
    """The fit of a paper: its law, its constants, no draws and no intervals.

    Args:
        name: one of `PUBLISHED`, which also holds the references: "kumar", "besiroglu", "sun"; of
            terms alone "ouyang", "chen_w4a4", "chen_w4a16", "chen_w16a4".

    Raises:
        ValueError: for an unknown name; the message gives the nearest known one.
    """
    if name not in PUBLISHED:
        raise ValueError(expected_one_of("published law", name, PUBLISHED))
    paper = PUBLISHED[name]
    return Fit(
        law=paper.law,
        params=dict(paper.params),
        samples={},
        diagnostics=_NOTHING_KNOWN,
        settings=_SETTINGS,
        checklist={"form": paper.law.formula, "source": paper.reference},
    )


# The papers' own fits; nothing of ours made these numbers.
_SETTINGS = Settings("huber", 1e-3, "equal", "runs", bootstrap=0, starts=1, seed=0)
_NOTHING_KNOWN = Diagnostics(
    objective=np.nan,
    gradient_norm=np.nan,
    condition_number=np.nan,
    share_at_best=np.nan,
    bootstrap_converged=np.nan,
    parameters=0,
    rows=0,
    runs=0,
    sizes=0,
    rows_left_out=0,
    rows_outside_domain=0,
    duplicates=0,
    r2=np.nan,
    median_relative_error=np.nan,
    ignored=(),
    no_data=(),
    few_values=(),
    at_bound=(),
    flat=(),
    unidentified=(),
)
