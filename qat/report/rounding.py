"""A page about one model after quantization: what each method and format costs, on every text.

Loss stands against all bits of the model, as in Dettmers & Zettlemoyer (arXiv 2212.09720), for
what a method saves must pay for its scales.
"""

import html
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from qat.report import figures, page
from qat.training.files import write_whole

_POLICIES = {"w": "Weights", "wa": "Weights and activations", "kv": "The cache of attention"}
_MODEL_BITS, _CACHE_BITS = "size of the model (Mbit)", "bits of a number of the cache"
_CAPTION = "Bars: standard error of the difference to the original, paired by sequence."


def write(path: Path, lines: pd.DataFrame, provenance: str) -> None:
    """Writes the page; it loads nothing from anywhere.

    Args:
        path: of the file, which appears whole or not at all.
        lines: policy ("original", "w", "wa", "kv"), method, format, text, start, stop, total_bits,
            bits, loss, loss_se, delta, delta_se, perplexity, kl, kl_se, agreement, calibration,
            wall_s and status of each variant, text and part of the context (0 to 0 is all).
        provenance: where they come from.
    """
    sections: list[str] = []
    for text in lines.text.unique():
        of_text = lines[lines.text == text]
        sections.append(f"<h2>{html.escape(str(text))}</h2>")
        sections.append(page.grid_of(list(_drawn(of_text))))
        sections.append(page.wide_table(_table(of_text[of_text.stop == 0])))
    sections += ["<h2>Provenance</h2>", page.listing((provenance, *_calibrations(lines)))]
    write_whole(path, page.document("What quantization after training costs", sections))


def _drawn(lines: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Figures of a text, with captions."""
    ok = lines[lines.status != "diverged"]
    whole = ok[ok.stop == 0].assign(
        mbit=ok.total_bits / 1e6,
        family=ok.format.map(lambda name: re.sub(r"^(u?int)\d+", r"\1", name)),
    )
    for policy, title in _POLICIES.items():
        of_policy = whole[whole.policy == policy]
        if of_policy.empty:
            continue
        axis = ("bits", _CACHE_BITS) if policy == "kv" else ("mbit", _MODEL_BITS)
        for original in whole[whole.policy == "original"].loss:
            yield figures.loss_by_bits(of_policy, original, *axis), f"{title}. {_CAPTION}"
        yield (
            figures.added_by_bits(of_policy, *axis),
            f"{title}: loss added. Additions below 0.0001 are not drawn. {_CAPTION}",
        )
        of_parts = ok[(ok.policy == policy) & (ok.stop > 0)]
        for method, parts in of_parts.groupby("method", sort=False):
            yield (
                figures.added_by_position(parts),
                f"{title}, {method}: loss added by position. {_CAPTION}",
            )


def _table(lines: pd.DataFrame) -> pd.DataFrame:
    """Every variant of a text."""

    def number(name: str, spelling: str) -> pd.Series:
        return lines[name].map(spelling.format)

    return pd.DataFrame(
        {
            "policy": lines.policy,
            "method": lines.method,
            "format": lines.format,
            "Mbit": (lines.total_bits / 1e6).map("{:,.3f}".format).where(lines.total_bits > 0, ""),
            "bits": number("bits", "{:.2f}"),
            "loss (nats/token)": number("loss", "{:.4f}"),
            "standard error": number("loss_se", "{:.4f}"),
            "added": number("delta", "{:+.4f}"),
            "its standard error": number("delta_se", "{:.4f}"),
            "perplexity": number("perplexity", "{:.4g}"),
            "KL (nats/token)": number("kl", "{:.5f}"),
            "its error": number("kl_se", "{:.5f}"),
            "agreement": number("agreement", "{:.2%}"),
            "seconds": number("wall_s", "{:.1f}"),
            "": lines.status.where(lines.status != "ok", ""),
        }
    )


def _calibrations(lines: pd.DataFrame) -> list[str]:
    """What methods saw."""
    seen = sorted(set(lines.calibration) - {"none"})
    return [f"Methods that see data were calibrated on {', '.join(seen)}."] if seen else []
