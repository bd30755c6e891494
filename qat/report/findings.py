"""What the rows of an experiment show, and what is within their noise.

Runs that differ in precision alone share initialisation and data order, so their losses are
compared in pairs, which is far sharper than the losses themselves. How much such a difference
still scatters is measured where a cell was run with several seeds, and nothing below twice that
is called an effect.
"""

import dataclasses
import math
import re

import numpy as np
import pandas as pd

from qat.analysis.replicates import scatter
from qat.laws import Fit

_CELL = ["params", "tokens", "seed"]
_NOISE_FACTOR = 2.0
_JUDGED_BITS = (3.0, 4.0)


@dataclasses.dataclass(frozen=True)
class Growth:
    """Rounding one size to one width, after the fewest and after the most training tokens.

    Attributes:
        params: N.
        bits: of the rounded weights.
        tokens: D, fewest and most.
        deltas: loss added by rounding, nats per token, at those; means over seeds.
        noise: standard deviation over seeds of the logarithm of a delta.
    """

    params: int
    bits: float
    tokens: tuple[int, int]
    deltas: tuple[float, float]
    noise: float

    @property
    def factor(self) -> float:
        """How many times the added loss has grown; NaN unless both are positive."""
        few, many = self.deltas
        return many / few if few > 0 and many > 0 else math.nan

    @property
    def grows(self) -> bool:
        """Whether it has grown at all."""
        return self.deltas[1] > self.deltas[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
    """An experiment in a few tables.

    Attributes:
        training: one line a run: params, tokens, seed, policy, loss, loss_se, delta (against the
            unquantized run of the same cell), within_noise.
        rounding: one line for each rounded model: params, tokens, seed, bits, delta, delta_se.
        growths: by size and width.
        paired_noise: standard deviation over seeds of a paired training difference, nats per
            token; NaN if nothing was replicated.
        verdict: what holds, in sentences; warnings included.
    """

    training: pd.DataFrame
    rounding: pd.DataFrame
    growths: tuple[Growth, ...]
    paired_noise: float
    verdict: tuple[str, ...]


def summarise(rows: pd.DataFrame, fit: Fit) -> Summary:
    """Draws the findings from result rows and the precision law fitted to them."""
    ok = rows[rows.status == "ok"]
    training = _training(ok[ok.ptq_method == "none"])
    noise = scatter(
        training[training.policy != "none"], ["params", "tokens", "policy"], "delta"
    ).deviation
    training["within_noise"] = training.delta.abs() < _NOISE_FACTOR * noise
    rounding = ok[ok.ptq_method != "none"].rename(columns={"ptq_bits": "bits"})
    rounding = rounding[[*_CELL, "bits", "ptq_delta", "ptq_delta_se"]]
    rounding = rounding.rename(columns={"ptq_delta": "delta", "ptq_delta_se": "delta_se"})
    rounding = rounding.sort_values([*_CELL, "bits"], ignore_index=True)
    growths = _growths(rounding)
    verdict = (
        *_rounding_verdict(growths),
        _noise_verdict(training, noise),
        *_fit_verdict(fit),
        *_losses_verdict(rows),
    )
    return Summary(training, rounding, growths, noise, verdict)


def policy_label(row: pd.Series) -> str:
    """The policy of a row in shorthand, such as "w4a8"; "none" where nothing is quantized."""
    formats = (("w", row.weight_format), ("a", row.activation_format), ("kv", row.kv_format))
    terms = [letter + re.sub(r"^int(?!16$)", "", fmt) for letter, fmt in formats if fmt != "none"]
    return "".join(terms) or "none"


def as_text(summary: Summary) -> str:
    """Tables and verdict for a terminal."""
    losses = summary.training[summary.training.seed == summary.training.seed.min()]
    first_seed = summary.rounding[summary.rounding.seed == summary.rounding.seed.min()]
    parts = [
        "Validation loss after training at a policy, nats/token",
        _pivot(losses, "policy", "loss"),
        "Loss added by rounding the unquantized model's weights to so many bits, nats/token",
        _pivot(first_seed, "bits", "delta"),
        *(f"* {line}" for line in summary.verdict),
    ]
    return "\n\n".join(parts)


def _pivot(table: pd.DataFrame, columns: str, values: str) -> str:
    wide = table.pivot_table(index=["params", "tokens"], columns=columns, values=values)
    wide.columns = [f"{c:g}" if isinstance(c, float) else str(c) for c in wide.columns]
    text: str = wide.round(4).reset_index().to_string(index=False)
    return text


def _training(rows: pd.DataFrame) -> pd.DataFrame:
    """Runs with their difference to the unquantized run of the same cell."""
    table = rows[[*_CELL, "loss", "loss_se"]].assign(policy=rows.apply(policy_label, axis=1))
    reference = table[table.policy == "none"].set_index(_CELL).loss
    keys = pd.MultiIndex.from_frame(table[_CELL])
    table["delta"] = table.loss.to_numpy() - reference.reindex(keys).to_numpy()
    order = table.delta.groupby(table.policy).mean().rank()
    table["order"] = table.policy.map(order)
    return table.sort_values([*_CELL, "order"], ignore_index=True).drop(columns="order")


def _growths(rounding: pd.DataFrame) -> tuple[Growth, ...]:
    """Fewest against most tokens, for every size and width."""
    # An addition that is not positive has no logarithm, and makes the spread of its cell unknown.
    logs = rounding.assign(log_delta=np.log(rounding.delta.where(rounding.delta > 0)))
    growths = []
    for _, group in rounding.groupby(["params", "bits"]):
        params, bits = int(group.params.iloc[0]), float(group.bits.iloc[0])
        means = group.groupby("tokens").delta.mean()
        if len(means) < 2:
            continue
        noise = scatter(logs[logs.bits == bits], ["params", "tokens"], "log_delta").deviation
        few, many = means.index.min(), means.index.max()
        deltas = (float(means[few]), float(means[many]))
        growths.append(Growth(params, bits, (int(few), int(many)), deltas, noise))
    return tuple(growths)


def _rounding_verdict(growths: tuple[Growth, ...]) -> list[str]:
    judged = [growth for growth in growths if growth.bits in _JUDGED_BITS]
    if not judged:
        return ["No model was rounded to 3 or 4 bits after two token budgets: growth is untested."]
    growing = sum(growth.grows for growth in judged)
    holds = "costs more" if growing == len(judged) else "does not always cost more"
    few, many = judged[0].tokens
    lines = [
        f"Rounding weights after training {holds} the longer the model was trained: from {few:,} "
        f"to {many:,} tokens the added loss grows in {growing} of {len(judged)} cases."
    ]
    widths = sorted({growth.bits for growth in judged})
    return lines + [_growth_at([g for g in judged if g.bits == bits]) for bits in widths]


def _growth_at(growths: list[Growth]) -> str:
    """All sizes at one width: each growth, and their geometric mean against the seed noise."""
    cases = "; ".join(
        f"N = {growth.params:,}: {growth.deltas[0]:.4f} → {growth.deltas[1]:.4f}"
        for growth in growths
    )
    measured = f"Rounded to {growths[0].bits:g} bits, added loss in nats/token: {cases}."
    factors = [growth.factor for growth in growths]
    if any(map(math.isnan, factors)):
        return f"{measured} No growth factor: rounding did not add loss everywhere."
    mean = math.exp(sum(map(math.log, factors)) / len(factors))
    allowed = math.exp(_NOISE_FACTOR * math.sqrt(2 / len(growths)) * growths[0].noise)
    if math.isnan(allowed):
        return f"{measured} ×{mean:.1f} on average; the seed noise is unknown."
    judgement = "beyond noise" if mean > allowed else "within noise"
    return (
        f"{measured} ×{mean:.1f} on average; twice the seed noise is ×{allowed:.1f}: {judgement}."
    )


def _noise_verdict(training: pd.DataFrame, noise: float) -> str:
    quantized = training[training.policy != "none"]
    if math.isnan(noise):
        return "No cell was run with several seeds: the noise of the differences is unknown."
    within = quantized[quantized.within_noise]
    names = ", ".join(sorted(within.policy.unique())) or "none"
    return (
        f"The difference of two paired runs scatters by {noise:.4f} nats/token over seeds. "
        f"{len(within)} of {len(quantized)} differences to the unquantized run are within twice "
        f"that and prove nothing (policies: {names}). The noise was measured at the smallest cell "
        "alone and may differ elsewhere."
    )


def _fit_verdict(fit: Fit) -> list[str]:
    diagnostics = fit.diagnostics
    doubtful = {*diagnostics.unidentified, *diagnostics.no_data, *diagnostics.few_values}
    known = [name for name in fit.params if name not in doubtful]
    lines = [
        f"The {fit.law.name} law explains {diagnostics.r2:.3f} of the variance of the log loss "
        f"over {diagnostics.rows} rows, median relative error "
        f"{100 * diagnostics.median_relative_error:.1f}%; "
        f"{100 * diagnostics.share_at_best:.0f}% of the starts reach the best fit.",
        f"These rows pin down {', '.join(known) or 'no parameter'} to within a factor of ten; "
        f"they do not identify {', '.join(sorted(doubtful)) or 'none of the others'}. "
        f"{diagnostics.sizes} points in (N, D) cannot settle the exponents of a scaling law.",
    ]
    return [*lines, *(f"Fit warning: {flag}." for flag in diagnostics.flags)]


def _losses_verdict(rows: pd.DataFrame) -> list[str]:
    bad = rows[rows.status != "ok"]
    return [f"{len(bad)} runs did not end well and are left out of the fit."] if len(bad) else []
