"""Means over sequences and how sure they are; small differences by pairing.

Losses of two models on one text differ far less than losses of one model on two texts, so what is
compared is compared sequence by sequence: give `mean_and_standard_error` the differences, and it
says how sure the *difference* is. Tokens of one sequence depend on each other, sequences are taken
as independent.
"""

import numpy as np
from jaxtyping import Float


def mean_and_standard_error(
    values_R: Float[np.ndarray, " R"], tokens_R: Float[np.ndarray, " R"] | None = None
) -> tuple[float, float]:
    """Mean over R sequences and its standard error; NaN for the error of one sequence.

    Args:
        values_R: a number of each sequence, or the difference of two: its mean over tokens.
        tokens_R: how many tokens each has, where that differs: the mean is then over all tokens,
            and the error that of a ratio of two sums, to first order. None is equally many.
    """
    weights_R = np.ones(values_R.shape) if tokens_R is None else tokens_R / np.mean(tokens_R)
    mean = float(np.mean(weights_R * values_R))
    if values_R.size < 2:
        return mean, float("nan")
    spread = float(np.sqrt(np.sum((weights_R * (values_R - mean)) ** 2) / (values_R.size - 1)))
    return mean, spread / values_R.size**0.5
