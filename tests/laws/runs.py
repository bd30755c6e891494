"""Tables of made-up runs whose law and noise are known, for tests of this folder."""

import numpy as np
import pandas as pd

from qat import laws

CHINCHILLA = {"A": 480.0, "B": 2100.0, "E": 1.8, "alpha": 0.35, "beta": 0.37}
TRAINED = {"A": 4299.0, "B": 18060.0, "E": 2.7648, "alpha": 0.48, "beta": 0.51}
WEIGHTS = {"gamma_w": 2.6745, "n_w": 0.3037}
ACTIVATIONS = {"gamma_a": 2.2102, "n_a": 1.4072}
KV_CACHE = {"gamma_kv": 0.9578, "n_kv": 2.4185}
PTQ = {"C_T": 0.0598, "gamma_D": 0.5068, "gamma_N": 0.3439, "gamma_post": 0.5907}
PRECISION = TRAINED | WEIGHTS | ACTIVATIONS | KV_CACHE | PTQ
# Every table has at most 128 rows, so that all fits of a law share one compiled program.
ROWS = 120


def chinchilla_runs(noise, seed=0, rows=ROWS):
    """Sizes and budgets drawn at random, log loss with normal noise."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {"params": 10 ** rng.uniform(7, 9.5, rows), "tokens": 10 ** rng.uniform(9, 11.5, rows)}
    )
    loss = laws.get_law("chinchilla").predict(CHINCHILLA, frame)
    return frame.assign(loss=loss * np.exp(noise * rng.standard_normal(rows)))


def precision_runs(noise, seed=0, varied=("weight_bits", "activation_bits", "kv_bits", "ptq_bits")):
    """A tenth of the rows unquantized, the others quantized in one column each."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "params": rng.choice([3e7, 6e7, 1.1e8, 2.2e8], ROWS),
            "tokens": rng.choice([1.5e9, 3e9, 6e9, 1.3e10, 2.6e10], ROWS),
        }
    )
    lowest = {"weight_bits": 2, "activation_bits": 4, "kv_bits": 3, "ptq_bits": 2}
    which = rng.choice(5, ROWS, p=[0.18, 0.18, 0.18, 0.36, 0.1])
    for i, column in enumerate(lowest):
        quantized = (which == i) & (column in varied)
        frame[column] = np.where(quantized, rng.integers(lowest[column], 9, ROWS), 16)
    loss = laws.get_law("precision").predict(PRECISION, frame)
    return frame.assign(loss=loss * np.exp(noise * rng.standard_normal(ROWS)))
