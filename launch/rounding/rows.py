"""Result rows of quantized models, by whichever program they were measured.

What was quantized and how goes over the row of the trained model; the rest of the row stays, for it
is the same run. Differences are paired by sequence.
"""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Float

from launch.rounding.evaluation import Measured
from launch.rounding.grid import Variant
from launch.rounding.texts import TextSet
from qat.analysis import edges, mean_and_standard_error
from qat.policy import Policy
from qat.training.results import Row

BINS = 8  # of positions in the context


def rounded(
    row: Row,
    variant: Variant,
    losses_R: Float[np.ndarray, " R"],
    deltas_R: Float[np.ndarray, " R"],
) -> Row:
    """The row of a variant.

    Args:
        row: of the trained model as it is.
        variant: what was done to it.
        losses_R: of each sequence, nats per token.
        deltas_R: those minus the original's.
    """
    method, weights, activations, kv_cache = variant.spellings
    policy = Policy(variant.weights)
    loss, loss_se = mean_and_standard_error(losses_R)
    delta, delta_se = mean_and_standard_error(deltas_R)
    return dataclasses.replace(
        row,
        ptq_method=method,
        ptq_bits=policy.bits("weights"),
        ptq_format=policy.format_name("weights"),
        ptq_quantizer=weights,
        ptq_activations=activations,
        ptq_kv_cache=kv_cache,
        loss=loss,
        loss_se=loss_se,
        ptq_delta=delta,
        ptq_delta_se=delta_se,
    )


def measured(row: Row, variant: Variant, text: TextSet, found: Measured) -> list[Row]:
    """The row of a variant on a text, then one for each bin of positions in the context.

    Those of bins are named after the text and the positions, "…[32:64]": position 32 is predicted
    from 33 tokens.

    Args:
        row: of the trained model, with what all rows of the variant share.
        variant: what was done to it.
        text: evaluated on.
        found: the comparison.
    """
    tokens = found.loss_RT.shape[1]
    ends = edges(tokens, BINS)
    bins = [(start, stop, f"[{start}:{stop}]") for start, stop in itertools.pairwise(ends)]
    return [
        _part(row, variant, text, found, slice(start, stop), name)
        for start, stop, name in [(0, tokens, ""), *bins]
    ]


def is_part(eval_set: str) -> bool:
    """Whether a row is about some positions alone."""
    return eval_set.endswith("]")


def _part(
    row: Row, variant: Variant, text: TextSet, found: Measured, positions: slice, name: str
) -> Row:
    """The row of some positions."""

    def of_sequences(x_RT: Float[np.ndarray, "R T"]) -> Float[np.ndarray, " R"]:
        means_R: np.ndarray = x_RT[:, positions].mean(axis=1)
        return means_R

    kl, kl_se = mean_and_standard_error(of_sequences(found.divergence_RT))
    agreement, _ = mean_and_standard_error(of_sequences(found.agrees_RT))
    whole = rounded(row, variant, of_sequences(found.loss_RT), of_sequences(found.delta_RT))
    finite = np.isfinite([whole.loss, whole.ptq_delta, kl]).all()
    return dataclasses.replace(
        whole,
        eval_set=f"{text.name}{name}",
        data_fingerprint=text.fingerprint,
        ptq_kl=kl,
        ptq_kl_se=kl_se,
        ptq_agreement=agreement,
        status=row.status if finite else "diverged",
    )


def spellings_of(row: Row) -> tuple[str, str, str, str]:
    """Method and quantizers, as `Variant.spellings`."""
    return row.ptq_method, row.ptq_quantizer, row.ptq_activations, row.ptq_kv_cache
