"""The rows of one checkpoint as a table for people."""

import functools
import re
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

import qat
from launch.rounding.grid import POLICIES
from launch.timing import table
from qat.analysis.size import stored_bits
from qat.quantizer import Quantizer

_PART = re.compile(r"(.*)\[(\d+):(\d+)\]")
_LEGEND = (
    "loss and KL(original ‖ variant) in nats/token; ± is one standard error, of added loss",
    "paired by sequence; bits are of a parameter of the whole model and under kv of a number of",
    "the cache, scales included",
)
_HEAD = ("policy", "method", "format", "bits", "loss", "added", "perplexity", "KL", "agree")


def frame(rows: pd.DataFrame, size: int, channels: int) -> pd.DataFrame:
    """One line for each variant and text, or part of the context, sorted by policy, bits and loss.

    Args:
        rows: result rows, as `qat.sweep.table.collect` returns them.
        size: parameters of the model, with embedding and head.
        channels: of a head, whose keys and values share scales.

    Returns:
        policy ("original", or of `POLICIES`), method, format, text, start and stop (positions; 0
        and 0 are all), total_bits, bits (of a parameter of the whole model, or of a number of the
        cache), loss, loss_se, delta, delta_se, perplexity, kl, kl_se, agreement, calibration,
        wall_s, status.
    """
    made = pd.DataFrame([_line(row, size, channels) for row in rows.to_dict("records")])
    order = {policy: place for place, policy in enumerate(("original", *POLICIES))}
    made["order"] = made["policy"].map(order)
    by = ["text", "start", "order", "bits", "loss"]
    return made.sort_values(by, kind="stable", ignore_index=True).drop(columns="order")


def as_text(lines: pd.DataFrame) -> str:
    """Tables for a terminal, one a text.

    Args:
        lines: those of `frame`.
    """
    whole = lines[lines["stop"] == 0]
    parts = []
    for text, group in whole.groupby("text", sort=False):
        cells = [_cells(line) for line in group.to_dict("records")]
        parts += [f"{text}", "", table(_HEAD, cells, text_columns=3), ""]
    return "\n".join([*parts, *_LEGEND])


def _line(row: Mapping[Hashable, Any], size: int, channels: int) -> dict[str, object]:
    """A result row in the words of `frame`."""
    weights, activations, kv_cache = (
        str(row[name]) for name in ("ptq_quantizer", "ptq_activations", "ptq_kv_cache")
    )
    policy, quantizer = "w" if activations == "none" else "wa", weights
    if kv_cache != "none":
        policy, quantizer = "kv", kv_cache
    elif weights == "none":
        policy = "original"
    part = _PART.fullmatch(str(row["eval_set"]))
    text, start, stop = part.groups() if part else (row["eval_set"], 0, 0)
    total, loss = row["total_bits"], row["loss"]
    of_cache = policy == "kv"
    return {
        "policy": policy,
        "method": row["ptq_method"],
        "format": quantizer,
        "text": text,
        "start": int(start),
        "stop": int(stop),
        "total_bits": total,
        "bits": _cache_bits(kv_cache, channels) if of_cache else total / size,
        "loss": loss,
        "loss_se": row["loss_se"],
        "delta": row["ptq_delta"],
        "delta_se": row["ptq_delta_se"],
        "perplexity": float(np.exp(np.minimum(loss, 700.0))),
        "kl": row["ptq_kl"],
        "kl_se": row["ptq_kl_se"],
        "agreement": row["ptq_agreement"],
        "calibration": row["ptq_calibration"],
        "wall_s": row["ptq_wall_s"],
        "status": row["status"],
    }


def _cache_bits(spelling: str, channels: int) -> float:
    """Of a number of the cache, with its share of the scale."""
    quantized = functools.partial(qat.quantize, quantizer=Quantizer.parse(spelling), axis=-1)
    key = jax.ShapeDtypeStruct((1, channels), jnp.float32)
    return stored_bits(jax.eval_shape(quantized, key)) / channels


def _cells(line: Mapping[Hashable, Any]) -> list[str]:
    """A line of a terminal's table."""
    original = line["policy"] == "original"
    return [
        str(line["policy"]),
        "" if original else str(line["method"]),
        "" if original else str(line["format"]),
        f"{line['bits']:.2f}" if line["bits"] else "-",
        f"{line['loss']:.4f}",
        f"± {line['loss_se']:.4f}"
        if original
        else f"{line['delta']:+.4f} ± {line['delta_se']:.4f}",
        f"{line['perplexity']:.4g}",
        "" if original else f"{line['kl']:.4f}",
        "" if original else f"{line['agreement']:.1%}",
    ]
