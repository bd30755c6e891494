"""Do weights, activations and KV cache act on the loss independently, on this table?

Kumar et al. 2024 (arXiv 2411.04330) multiply: a model of few bits in several operands is worth the
product of what each would leave alone. Here nothing is assumed of the curve over bits. Every width
of every operand has an efficiency of its own, and the null hypothesis is that a joint run has the
product of its marginals'; the alternative gives every joint setting a factor of its own on top.

The statistic is the fall of the objective from one to the other. Its distribution under the null
comes from tables made anew: the null's losses with residuals drawn from the alternative's, by run,
widened for the parameters it has. That assumes that residuals are alike across settings, as any
test of settings with one run each must.

The map says where it breaks: the factor of every joint setting with its interval, 1 being the
product, below 1 when together they hurt more.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array
from numpy.typing import NDArray

from qat.laws import solver
from qat.laws.diagnostics import held_parameters
from qat.laws.fit import fit
from qat.laws.forms.free import FREE_COLUMNS, free_of
from qat.laws.law import Law, Parameter, float64_on_cpu
from qat.laws.record import Fit
from qat.laws.solver import Rows
from qat.laws.table import UNQUANTIZED_BITS, Table, as_table
from qat.laws.uncertainty import runs_of

# Arrays end in their axes: S tables made anew, R rows.
Floats = NDArray[np.float64]
Setting = tuple[float, ...]

_COLUMNS = tuple(FREE_COLUMNS.values())


@dataclasses.dataclass(frozen=True)
class Independence:
    """The test of a table.

    Attributes:
        p_value: chance of a fall of the objective as large as this one, were they independent.
        settings: a row for each joint setting, by its bits: ``runs``, ``factor`` on the product of
            the marginals' efficiencies, ``low`` and ``high`` of its 95% interval, ``excess`` (nats
            per token that the factor costs its runs, on average), ``breaks`` (whether 1
            is outside the interval at a level divided by the number of settings).
        product: the fit of the null.
        joint: the fit of the alternative.
        without_marginal: joint settings left out, because no run has one of their widths alone.
    """

    p_value: float
    settings: pd.DataFrame
    product: Fit
    joint: Fit
    without_marginal: tuple[Setting, ...]


def independence(
    table: Table | pd.DataFrame, *, resamples: int = 400, starts: int = 64, seed: int = 0
) -> Independence:
    """Tests whether joint quantization costs what the product of the marginals says.

    Args:
        table: runs with params, tokens, loss (nats per token), weight_bits, activation_bits and
            kv_bits; some quantized in one operand, some in several. Rows rounded after training are
            left out.
        resamples: tables made anew for the p-value, and bootstrap resamples.
        starts: of each fit.
        seed: of everything.

    Raises:
        ValueError: if no run is quantized in several operands at widths that others have alone, or
            as `qat.laws.fit` does.
    """
    table, missing = _usable(as_table(table))
    joint_settings = sorted({setting for setting in _settings(table) if _quantized(setting) > 1})
    if not joint_settings:
        raise ValueError(
            "no run is quantized in two operands or more, at widths that other runs have alone"
        )
    null = free_of(table)
    alternative = _with_factors(null, joint_settings)
    fitted = functools.partial(fit, table=table, loss="l2", starts=starts, seed=seed)
    product = fitted(null, bootstrap=0)
    joint = fitted(alternative, bootstrap=resamples, resampling="wild")
    fall = product.diagnostics.objective - joint.diagnostics.objective
    falls_S = _falls_under_null(table, product, joint, resamples, seed)
    p_value = (1 + int((falls_S >= fall * (1 - 1e-9)).sum())) / (1 + len(falls_S))
    shown = _map(table, joint_settings, joint)
    return Independence(p_value, shown, product, joint, missing)


def is_testable(table: Table) -> bool:
    """Whether some run is quantized in several operands, at widths that others have alone."""
    try:
        usable, _ = _usable(table)
    except ValueError:
        return False
    return any(_quantized(setting) > 1 for setting in _settings(usable))


def _usable(table: Table) -> tuple[Table, tuple[Setting, ...]]:
    """Rows as trained whose widths all occur alone, and the joint settings that were left out."""
    frame = table.frame[table.frame["ptq_bits"] == UNQUANTIZED_BITS]
    settings = _settings(dataclasses.replace(table, frame=frame))
    alone = {setting for setting in settings if _quantized(setting) == 1}
    missing = tuple(
        sorted({s for s in settings if _quantized(s) > 1 and not _marginals(s) <= alone})
    )
    kept = np.array([setting not in missing for setting in settings], bool)
    if not kept.any():
        raise ValueError("the table has no row that was not rounded after training")
    return dataclasses.replace(table, frame=frame[kept]), missing


def _settings(table: Table) -> list[Setting]:
    return [tuple(row) for row in table.frame[list(_COLUMNS)].to_numpy().tolist()]


def _quantized(setting: Setting) -> int:
    """How many operands have fewer than 16 bits."""
    return sum(bits < UNQUANTIZED_BITS for bits in setting)


def _marginals(setting: Setting) -> set[Setting]:
    """The settings that quantize one operand alone as this one does."""
    none = (UNQUANTIZED_BITS,) * len(setting)
    alone = {(*none[:i], bits, *none[i + 1 :]) for i, bits in enumerate(setting)}
    return alone - {none}


def _with_factors(null: Law, settings: list[Setting]) -> Law:
    """The law with a factor on N for every joint setting."""
    names = {_name(setting): setting for setting in settings}

    def loss(p: Mapping[str, Array], c: Mapping[str, Array]) -> Array:
        params = c["params"]
        for name, setting in names.items():
            bits = dict(zip(_COLUMNS, setting, strict=True))
            matches = [c[column] == bits[column] for column in _COLUMNS if column in c]
            params = params * jnp.where(jnp.all(jnp.stack(matches), axis=0), p[name], 1.0)
        return null.loss(p, {**c, "params": params})

    factors = tuple(
        Parameter(name, "factor on the product of efficiencies", (1e-3, 1e3), (0.5, 2.0))
        for name in names
    )
    return dataclasses.replace(
        null, name=f"{null.name}_joint", loss=loss, parameters=(*null.parameters, *factors)
    )


def _name(setting: Setting) -> str:
    parts = zip(FREE_COLUMNS, setting, strict=True)
    return "joint_" + "".join(f"{x}{bits:g}" for x, bits in parts if bits < UNQUANTIZED_BITS)


def _falls_under_null(table: Table, product: Fit, joint: Fit, resamples: int, seed: int) -> Floats:
    """Falls of the objective on tables made anew under the null, shape (S,)."""
    rng = np.random.default_rng((seed, 1))
    log_loss_R, run_R = np.log(table.frame["loss"].to_numpy()), runs_of(table)
    predicted_R = np.log(product.predict(table))
    freedom = max(len(table) - joint.diagnostics.parameters, 1)
    residual_R = (log_loss_R - np.log(joint.predict(table))) * np.sqrt(len(table) / freedom)
    drawn_SR = rng.choice(residual_R, (resamples, run_R.max() + 1))[:, run_R]
    rows = Rows(np.ones_like(drawn_SR), predicted_R + drawn_SR)
    params = dict.fromkeys(joint.law.names, 1.0) | product.params
    with float64_on_cpu():
        product_S, joint_S = (
            _objectives(each.law, table, params, rows) for each in (product, joint)
        )
    return product_S - joint_S


def _objectives(law: Law, table: Table, params: Mapping[str, float], rows: Rows) -> Floats:
    """Least squares of every lane, from one start, shape (S,)."""
    problem = solver.pose(law, table, held_parameters(law, table, {}))
    start_SP = np.tile(solver.coordinates_of(law, problem, params), (len(rows.weight), 1))
    found: Floats = solver.minimise(law, problem, np.inf, start_SP, rows).objective
    return found


def _map(table: Table, settings: list[Setting], joint: Fit) -> pd.DataFrame:
    """The row of every joint setting."""
    setting_R = _settings(table)
    excess_R = joint.predict(table) - joint.law.predict(
        joint.params | {_name(setting): 1.0 for setting in settings}, table
    )
    found = []
    for setting in settings:
        name, own_R = _name(setting), np.array([row == setting for row in setting_R])
        low, high = joint.interval(name, level=1 - 0.05 / len(settings))
        numbers = (joint.params[name], *joint.interval(name), excess_R[own_R].mean())
        found.append((*setting, int(own_R.sum()), *numbers, not low <= 1 <= high))
    names = [*_COLUMNS, "runs", "factor", "low", "high", "excess", "breaks"]
    return pd.DataFrame(found, columns=names)
