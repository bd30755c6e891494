"""Figures of laws: how they fit, where they miss, what they plan."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from qat.laws import Fit, Table
from qat.laws.table import BITS_COLUMNS, UNQUANTIZED_BITS
from qat.report import drawing

_FEWEST_NATS = 1e-4  # below this an added loss is off the logarithmic axis
_CONTOURS = 14
_SAME_RUN = ("params", "tokens", *BITS_COLUMNS[:3], "run_id", "seed", "eval_set")
_OPERANDS = {"weight_bits": "w", "activation_bits": "a", "kv_bits": "kv", "ptq_bits": "after"}


def against_measured(fit: Fit, table: Table) -> str:
    """Loss by the law against measured loss, a colour for what is quantized."""
    predicted_R, kind_R = fit.predict(table), _kinds(table)
    with drawing.figure() as (figure, axes):
        for index, kind in enumerate(sorted(set(kind_R))):
            chosen = kind_R == kind
            label = f"{kind} ({chosen.sum()})"
            losses = table.frame["loss"][chosen]
            axes.plot(
                losses, predicted_R[chosen], ls="", alpha=0.7, **drawing.style(index), label=label
            )
        ends = [table.frame["loss"].min(), table.frame["loss"].max()]
        axes.plot(ends, ends, color="#000000", lw=0.8)
        axes.set_xlabel("measured loss (nats/token)")
        axes.set_ylabel("loss by the law (nats/token)")
        return drawing.svg(figure, axes)


def residuals(fit: Fit, table: Table, column: str, label: str) -> str:
    """How far the law is off, in percent of the loss, along a column."""
    residual_R = 100 * (fit.predict(table) / table.frame["loss"].to_numpy() - 1)
    kind_R, values_R = _kinds(table), table.frame[column].to_numpy()
    with drawing.figure() as (figure, axes):
        axes.axhline(0, color="#000000", lw=0.8)
        for index, kind in enumerate(sorted(set(kind_R))):
            chosen = kind_R == kind
            style = drawing.style(index)
            axes.plot(values_R[chosen], residual_R[chosen], ls="", alpha=0.7, **style, label=kind)
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("law above measured (% of loss)")
        return drawing.svg(figure, axes)


def rounding_by_ratio(fit: Fit, table: Table) -> str | None:
    """Loss that rounding adds against D/N, measured and by the law; None without such rows.

    What a rounded row adds is its loss above that of the row of the same run that is not rounded.
    """
    measured = _added_by_rounding(table)
    if measured.empty:
        return None
    with drawing.figure() as (figure, axes):
        for index, (bits, group) in enumerate(measured.groupby("ptq_bits")):
            style = drawing.style(index)
            group = group[group.added > _FEWEST_NATS]
            label = f"{bits:g} bits"
            axes.plot(group.ratio, group.added, ls="", alpha=0.6, **style, label=label)
            for _, size in group.groupby("params"):
                line = size.sort_values("ratio")
                own = fit.predict(line)
                plain = fit.predict(line.assign(ptq_bits=UNQUANTIZED_BITS))
                axes.plot(line.ratio, own - plain, color=style["color"], lw=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("tokens per parameter, D/N")
        axes.set_ylabel("loss added by rounding (nats/token)")
        return drawing.svg(figure, axes)


def contours(fit: Fit, path: pd.DataFrame, columns: Mapping[str, float]) -> str:
    """The law's loss over size and data, with the best sizes of several budgets.

    Args:
        fit: of a law that reads params and tokens.
        path: params and tokens of those optima.
        columns: what else the law reads, such as bits.
    """
    sizes = np.geomspace(path.params.min() / 10, path.params.max() * 10, 60)
    data = np.geomspace(path.tokens.min() / 10, path.tokens.max() * 10, 60)
    grid = pd.DataFrame(
        {"params": np.repeat(sizes, len(data)), "tokens": np.tile(data, len(sizes)), **columns}
    )
    loss = fit.predict(grid).reshape(len(sizes), len(data)).T
    with drawing.figure() as (figure, axes):
        lines = axes.contour(sizes, data, loss, levels=_CONTOURS, cmap="viridis", linewidths=1)
        axes.clabel(lines, fontsize=8)
        axes.plot(path.params, path.tokens, **drawing.style(2), label="best use of a budget")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("parameters N")
        axes.set_ylabel("training tokens D")
        return drawing.svg(figure, axes)


def by_budget(path: pd.DataFrame, quantity: str, label: str, logarithmic: bool) -> str:
    """An optimum against the budget, with its 95% band.

    Args:
        path: flops, and the quantity with quantity_low and quantity_high.
        quantity: such as "bits".
        label: of its axis.
        logarithmic: whether that axis is; else it is one of bits, from none to unquantized.
    """
    with drawing.figure() as (figure, axes):
        low, high = path[f"{quantity}_low"], path[f"{quantity}_high"]
        axes.fill_between(path.flops, low, high, color="#4053d3", alpha=0.2, lw=0)
        axes.plot(path.flops, path[quantity], **drawing.style(0))
        axes.set_xscale("log")
        if logarithmic:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, UNQUANTIZED_BITS)
        axes.set_xlabel("budget (FLOPs of bfloat16)")
        axes.set_ylabel(label)
        return drawing.svg(figure, axes)


def factors(settings: pd.DataFrame) -> str:
    """What every joint setting does to the product of its marginals' efficiencies."""
    bits = ("weight_bits", "activation_bits", "kv_bits")
    names = [
        "".join(f"{_OPERANDS[name]}{row[name]:g}" for name in bits if row[name] < UNQUANTIZED_BITS)
        for _, row in settings.iterrows()
    ]
    with drawing.figure() as (figure, axes):
        figure.set_figheight(max(figure.get_figheight(), 0.22 * len(names)))
        axes.axvline(1, color="#000000", lw=0.8)
        for broken, index, label in ((False, 0, "as the product"), (True, 2, "not as the product")):
            rows = np.flatnonzero(settings.breaks == broken)
            shown = settings.iloc[rows]
            ends = [(shown.factor - shown.low).clip(0), (shown.high - shown.factor).clip(0)]
            style = drawing.style(index)
            axes.errorbar(shown.factor, rows, xerr=ends, ls="", capsize=2, **style, label=label)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("factor on N_eff of the product")
        return drawing.svg(figure, axes)


def _kinds(table: Table) -> np.ndarray:
    """What is quantized in every row: "w a", "after" or "nothing"."""
    columns = table.columns(BITS_COLUMNS)
    low = {name: column_R < UNQUANTIZED_BITS for name, column_R in columns.items()}
    rows = range(len(table))
    named = (" ".join(_OPERANDS[name] for name in low if low[name][row]) for row in rows)
    return np.array([name or "nothing" for name in named])


def _added_by_rounding(table: Table) -> pd.DataFrame:
    """Rounded rows with ``added``, their loss above the same run's, and ``ratio``, their D/N."""
    same = [
        n
        for n in ("params", "tokens", *BITS_COLUMNS[:3], "run_id", "seed", "eval_set")
        if n in table.frame
    ]
    rounded = table.frame["ptq_bits"] < UNQUANTIZED_BITS
    plain = table.frame[~rounded].groupby(same, as_index=False)["loss"].mean()
    found = table.frame[rounded].merge(plain, on=same, suffixes=("", "_plain"))
    return found.assign(added=found.loss - found.loss_plain, ratio=found.tokens / found.params)
