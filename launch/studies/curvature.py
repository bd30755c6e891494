"""Is the cost of rounding the second order of the loss, does curvature grow, what does rotation do?

Of `launch.analyze` on unquantized runs of the grid: gradient and Hessian of the validation loss in
the weights that are rounded, in their own basis and in the rotated one.
"""

from pathlib import Path

import pandas as pd

from launch.studies.answer import Answer, between
from launch.studies.rows import NoRowsError, Study, groups
from qat.analysis.powers import power_law

TABLES = ("spectra", "expansions")
_SHOWN = (2.0, 3.0, 4.0, 5.0, 6.0)


def answer(study: Study) -> Answer:
    """Powers of D and N, and what of the cost is first, second and higher order."""
    spectra, expansions = (_read(study.folder / f"{name}.csv") for name in TABLES)
    expansions = expansions[(expansions.status == "ok") & expansions.ptq_bits.isin(_SHOWN)]
    return Answer(
        tables={
            "Curvature as a power of tokens and size": _growth(spectra, expansions),
            "Shares of what rounding costs, medians over models": _orders(expansions),
        }
    )


def _read(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise NoRowsError(f"{path} is missing")
    return pd.read_csv(path)


def _growth(spectra: pd.DataFrame, expansions: pd.DataFrame) -> pd.DataFrame:
    """Exponents of D and N of everything that measures curvature."""
    lines = []
    for basis, own in groups(spectra, "basis"):
        for name, column in (("trace", "trace"), ("largest eigenvalue", "eigenvalue.1")):
            lines.append(_line(f"{name}, {_named(basis)}", own, column))
    for method, bits, own in groups(expansions, "ptq_method", "ptq_bits"):
        if bits in (3.0, 4.0):
            what = f"{method}, {bits:g} bits"
            lines.append(_line(f"½ΔᵀHΔ, {what}", own[own.quadratic > 0], "quadratic"))
            lines.append(_line(f"‖Δ‖², {what}", own, "squared_norm"))
    return pd.DataFrame(lines)


def _line(name: str, rows: pd.DataFrame, column: str) -> dict[str, object]:
    columns = {"D": rows.tokens.to_numpy(), "N": rows.params.to_numpy()}
    found = power_law(rows[column].to_numpy(), columns)
    powers = {f"power of {x}": between(*found.exponents.loc[x]) for x in columns}
    return {"what": name, "models": found.rows} | powers | {"R²": found.r2}


def _orders(expansions: pd.DataFrame) -> pd.DataFrame:
    lines = []
    for method, bits, own in groups(expansions, "ptq_method", "ptq_bits"):
        shares = {x: (own[x] / own.change).median() for x in ("linear", "quadratic", "remaining")}
        line = {"method": method, "bits": int(bits), "models": len(own)}
        line |= {"δ, nats per byte": own.change.median()}
        lines.append(line | {name: f"{share:.0%}" for name, share in shares.items()})
    return pd.DataFrame(lines)


def _named(basis: str) -> str:
    return "as trained" if basis == "none" else "rotated"
