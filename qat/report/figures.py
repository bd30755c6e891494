"""Figures of a report, each an SVG small enough to be read on a phone.

One axis a figure, units on every axis, one colour a quantity throughout.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from qat.laws import Fit, as_table
from qat.report import drawing
from qat.report.findings import Summary

_FEWEST_NATS = 1e-4  # below this an added loss is off the logarithmic axis


def training_effects(summary: Summary) -> str:
    """Loss added by training at each policy, by size and budget, over the band of noise."""
    table = summary.training[summary.training.policy != "none"]
    table = table[table.seed == table.seed.min()]
    order = table.groupby("policy").delta.mean().sort_values().index
    position = {policy: place for place, policy in enumerate(order)}
    with drawing.figure() as (figure, axes):
        cells = list(table.groupby(["params", "tokens"]))
        for index, ((params, tokens), cell) in enumerate(cells):
            shift = (index - (len(cells) - 1) / 2) * 0.1
            axes.plot(
                cell.policy.map(position) + shift,
                cell.delta,
                linestyle="none",
                **drawing.style(index),
                label=f"N {params / 1e3:.0f}k, D {tokens / 1e6:.2g}M",
            )
        noise = 2 * summary.paired_noise
        if np.isfinite(noise):
            axes.axhspan(-noise, noise, color="#000000", alpha=0.1, lw=0, label="within noise")
        axes.set_xticks(range(len(order)), list(order))
        axes.set_xlabel("training policy (operand and bits)")
        axes.set_ylabel("added loss (nats/token)")
        return drawing.svg(figure, axes)


def rounding_by_tokens(summary: Summary, params: int) -> str:
    """Loss added by rounding one size to each width, against its training tokens."""
    table = summary.rounding[summary.rounding.params == params]
    with drawing.figure() as (figure, axes):
        for index, (bits, group) in enumerate(table.groupby("bits")):
            means = group.groupby("tokens").agg(delta=("delta", "mean"), se=("delta_se", "mean"))
            means = means[means.delta > _FEWEST_NATS]
            if means.empty:
                continue
            axes.errorbar(
                means.index / 1e6,
                means.delta,
                yerr=np.minimum(means.se, 0.9 * means.delta),
                **drawing.style(index),
                capsize=3,
                label=f"{bits:g} bits",
            )
        axes.set_yscale("log")
        _token_axis(axes, table.tokens)
        axes.set_ylabel("loss added by rounding (nats/token)")
        axes.set_title(f"N = {params:,} parameters", fontsize=12)
        return drawing.svg(figure, axes)


def loss_by_tokens(summary: Summary) -> str:
    """Validation loss of the unquantized runs against tokens, one line a size."""
    table = summary.training[summary.training.policy == "none"]
    with drawing.figure() as (figure, axes):
        for index, (params, group) in enumerate(table.groupby("params")):
            means = group.groupby("tokens").agg(loss=("loss", "mean"), se=("loss_se", "mean"))
            axes.errorbar(
                means.index / 1e6,
                means.loss,
                yerr=means.se,
                **drawing.style(index),
                capsize=3,
                label=f"N = {params:,}",
            )
        _token_axis(axes, table.tokens)
        axes.set_ylabel("validation loss (nats/token)")
        return drawing.svg(figure, axes)


def predicted_against_measured(rows: pd.DataFrame, fit: Fit) -> str:
    """Loss by the fitted law against measured loss, trained and rounded models apart."""
    ok = rows[rows.status == "ok"]
    predicted = fit.predict(as_table(ok))
    rounded = (ok.ptq_method != "none").to_numpy()
    with drawing.figure() as (figure, axes):
        for index, (label, chosen) in enumerate((("trained", ~rounded), ("rounded", rounded))):
            axes.plot(
                ok.loss[chosen],
                predicted[chosen],
                linestyle="none",
                **drawing.style(index),
                alpha=0.7,
                label=f"{label} ({chosen.sum()} rows)",
            )
        ends = [ok.loss.min(), ok.loss.max()]
        axes.plot(ends, ends, color="#000000", lw=0.8)
        axes.set_xlabel("measured loss (nats/token)")
        axes.set_ylabel("loss by the law (nats/token)")
        return drawing.svg(figure, axes)


def loss_by_bits(lines: pd.DataFrame, original: float, bits: str, label: str) -> str:
    """Loss of quantized models against the bits they take, a colour a method.

    Args:
        lines: method, family, format, loss, delta_se and the column of bits, of one policy and
            text; lines of one method and family are joined, and others named.
        original: loss of the model as it is, nats per token.
        bits: name of that column.
        label: of its axis.
    """
    with drawing.figure() as (figure, axes):
        axes.axhline(original, color="#000000", lw=0.8, label="original")
        for index, (method, group) in enumerate(lines.groupby("method", sort=False)):
            _draw_families(
                axes, group, bits, "loss", {**drawing.style(index), "capsize": 3}, str(method)
            )
        axes.set_xscale("log")
        _plain_ticks(axes, lines[bits])
        axes.set_xlabel(label)
        axes.set_ylabel("loss (nats/token)")
        return drawing.svg(figure, axes)


def added_by_bits(lines: pd.DataFrame, bits: str, label: str) -> str:
    """Loss added by quantization against the bits it leaves; see `loss_by_bits`."""
    shown = lines[lines.delta > _FEWEST_NATS]
    with drawing.figure() as (figure, axes):
        for index, (method, _) in enumerate(lines.groupby("method", sort=False)):
            group = shown[shown.method == method]
            _draw_families(
                axes, group, bits, "delta", {**drawing.style(index), "capsize": 3}, str(method)
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_ticks(axes, lines[bits])
        axes.set_xlabel(label)
        axes.set_ylabel("added loss (nats/token)")
        return drawing.svg(figure, axes)


def added_by_position(lines: pd.DataFrame) -> str:
    """Loss added by quantization, by position in the context, a line a format.

    Args:
        lines: format, start, stop, delta and delta_se, of one method, policy and text.
    """
    with drawing.figure() as (figure, axes):
        for index, (name, group) in enumerate(lines.groupby("format", sort=False)):
            axes.errorbar(
                (group.start + group.stop) / 2,
                group.delta,
                yerr=group.delta_se,
                **drawing.style(index),
                capsize=3,
                label=str(name),
            )
        axes.set_xscale("log")
        axes.set_xlabel("position in the context (tokens)")
        axes.set_ylabel("added loss (nats/token)")
        return drawing.svg(figure, axes)


def _draw_families(
    axes: Axes, lines: pd.DataFrame, x: str, y: str, style: dict[str, Any], label: str
) -> None:
    """One method: families of formats joined, formats that are alone named beside their point."""
    for _, group in lines.groupby("family", sort=False):
        group = group.sort_values(x)
        error = np.minimum(group.delta_se, 0.9 * group[y])
        axes.errorbar(
            group[x], group[y], yerr=error, **style, ls="-" if len(group) > 1 else "", label=label
        )
        label = ""  # once in the legend
        if len(group) == 1:
            point = (group[x].iloc[0], group[y].iloc[0])
            axes.annotate(
                group.format.iloc[0], point, xytext=(5, 3), textcoords="offset points", size=9
            )


def _plain_ticks(axes: Axes, values: pd.Series) -> None:
    """A few numbers on a logarithmic axis that spans little."""
    ticks = np.geomspace(values.min(), values.max(), 5) if len(values) > 1 else values.to_numpy()
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)


def _token_axis(axes: Axes, tokens: pd.Series) -> None:
    """Training tokens, logarithmic, with a tick at every budget."""
    axes.set_xscale("log")
    ticks = np.unique(tokens) / 1e6
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("training tokens D (millions)")
