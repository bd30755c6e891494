"""The suite "laws": how fast fits are, how often intervals hold the truth, which shapes are told.

All on made-up runs whose law is known. Speed is CPU seconds of whole fits in processes of their
own, once with nothing compiled and once with the programs in a cache on the disk. Coverage is the
share of 95% intervals that hold the parameter they are of, over parameters the fit does not flag.
Shapes are told apart when the comparison prefers the one that made the rows.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pandas as pd

from launch.progress import Meter
from launch.timing import table
from qat import laws

Row = dict[str, Any]

NOISE = 3e-3  # of log loss
_SIZE = {"A": 480.0, "B": 2100.0, "E": 1.8, "alpha": 0.35, "beta": 0.37}
_WEIGHTS = {"gamma_w": 2.67, "n_w": 0.3}
_ALL = _WEIGHTS | {"gamma_a": 2.21, "n_a": 1.41, "gamma_kv": 0.96, "n_kv": 2.42}
_PTQ = {"C_T": 0.06, "gamma_D": 0.51, "gamma_N": 0.34, "gamma_post": 0.59}
_CHEN = {"k": 0.1582, "gamma_D": 0.0745, "gamma_N": 0.2186, "gamma_G": 0.7779}
_RESAMPLES = 200
_SETTINGS = 4  # of a size and budget, at most


@dataclasses.dataclass(frozen=True)
class Truth:
    """A law with its constants, and runs that tell them.

    Attributes:
        law: name.
        params: constants.
        settings: of runs, beside sizes and budgets; each size and budget gets a few, at random.
    """

    law: str
    params: Mapping[str, float]
    settings: Sequence[Mapping[str, float]] = ({},)

    def runs(self, seed: int, noise: float = NOISE) -> pd.DataFrame:
        """A table with normal noise in the log loss."""
        sizes, data = np.geomspace(1e7, 1e10, 7), np.geomspace(5e8, 2e11, 7)
        rng = np.random.default_rng(seed)
        grid = [
            {"params": n, "tokens": d, **self.settings[index]}
            for n, d in itertools.product(sizes, data)
            for index in rng.permutation(len(self.settings))[:_SETTINGS]
        ]
        frame = pd.DataFrame(grid)
        missing = dict.fromkeys(laws.get_law(self.law).names, np.nan)
        loss = laws.get_law(self.law).predict(missing | dict(self.params), frame)
        return frame.assign(loss=loss * np.exp(noise * rng.standard_normal(len(frame))))


def _alone(**columns: Sequence[float]) -> list[dict[str, float]]:
    """Settings in which one column at a time leaves its last value."""
    usual = {name: values[-1] for name, values in columns.items()}
    others = [usual | {n: each} for n, values in columns.items() for each in values[:-1]]
    return [usual, *others]


_OPERANDS = _alone(
    weight_bits=(2, 3, 4, 5, 6, 8, 16),
    activation_bits=(4, 5, 6, 7, 8, 16),
    kv_bits=(3, 4, 5, 6, 16),
)
_LOW = _alone(weight_bits=(1, 2, 3, 4, 5, 6, 8, 16))
_OUYANG = {"k": 0.017, "gamma_D": 0.5251, "gamma_N": 0.2261, "gamma_P": 5.4967}
_SUN = {"n": 69.2, "alpha": 0.2368, "d": 68973.0, "beta": 0.5162, "E": 1.9061}
_SUN |= {"gamma": 11334.5, "delta": 3.1926, "nu": 2.9543}
_FREE = {"eff_w2": 0.2, "eff_w3": 0.5, "eff_w4": 0.8}
TRUTHS = (
    Truth("chinchilla", _SIZE),
    Truth("kaplan", {"N_c": 8.8e13, "D_c": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095}),
    Truth("precision", _SIZE | _ALL, _OPERANDS),
    Truth("precision", _SIZE | _PTQ, _alone(ptq_bits=(2, 3, 4, 5, 16))),
    Truth("precision_weibull_plain", _SIZE | {"gamma_w": 2.2, "k_w": 0.7}, _LOW),
    Truth("additive", _SIZE | {"c_w": 1.5, "gamma_w": 1.6}, _LOW),
    Truth("ouyang", _SIZE | _OUYANG, _alone(ptq_bits=(2, 3, 4, 6, 16))),
    Truth(
        "chen",
        _SIZE | _CHEN,
        [{"weight_bits": 16, "weight_group": 256}]
        + [{"weight_bits": 4, "weight_group": group} for group in (32, 64, 128, 256)],
    ),
    Truth(
        "sun",
        _SUN,
        _alone(exponent_bits=(1, 2, 3, 4, 8), mantissa_bits=(1, 2, 3, 7), scale_group=(128,)),
    ),
    Truth("free_w2_w3_w4", _SIZE | _FREE, _alone(weight_bits=(2, 3, 4, 16))),
)
SHAPES = {
    "precision_plain": {"gamma_w": 2.67},
    "precision_weibull_plain": {"gamma_w": 2.2, "k_w": 0.6},
    "precision_power_plain": {"gamma_w": 1.5, "k_w": 2.0},
    "precision_logistic_plain": {"gamma_w": 1.5},
}


def run(simulations: int) -> list[Row]:
    """Measures and prints.

    Args:
        simulations: tables for each law and shape.
    """
    rows = speed()
    with Meter("Simulating", simulations * (len(TRUTHS) + len(SHAPES)), "tables") as meter:
        for truth in TRUTHS:
            rows.append(coverage(truth, simulations, functools.partial(meter.advance, 1)))
        for name in SHAPES:
            rows.append(preference(name, simulations, functools.partial(meter.advance, 1)))
    print(f"\n{_table(rows)}")
    return rows


def speed() -> list[Row]:
    """CPU seconds of two fits, each in a process of its own, cold and with programs on the disk."""
    cases = {
        "240 rows, 5 parameters, 4500 starts, 4000 resamples": ("chinchilla", 240, 4500, 4000),
        "500 rows, 11 parameters, 512 starts, 1000 resamples": ("precision", 500, 512, 1000),
    }
    rows = []
    for what, case in cases.items():
        with tempfile.TemporaryDirectory() as cache:
            for state in ("nothing compiled", "compiled before"):
                cpu_s, wall_s = _in_a_process(cache, case)
                rows.append(
                    {"part": "speed", "what": f"{what}; {state}", "cpu_s": cpu_s, "wall_s": wall_s}
                )
    return rows


def coverage(truth: Truth, simulations: int, done: Callable[[], None]) -> Row:
    """How often intervals hold the parameters they are of."""
    held: list[bool] = []
    flagged = 0
    errors: list[float] = []
    for seed in range(simulations):
        fit = laws.fit(truth.law, truth.runs(seed), bootstrap=_RESAMPLES, starts=16, seed=seed)
        for name, value in truth.params.items():
            if name in fit.diagnostics.unidentified:
                flagged += 1
                continue
            low, high = fit.interval(name)
            held.append(low <= value <= high)
            errors.append(abs(fit.params[name] / value - 1))
        done()
    return {
        "part": "coverage",
        "what": f"{truth.law} ({', '.join(truth.settings[0]) or 'size alone'})",
        "share": float(np.mean(held)),
        "tables": simulations,
        "median_error": float(np.median(errors)),
        "flagged": flagged / (simulations * len(truth.params)),
    }


def preference(name: str, simulations: int, done: Callable[[], None]) -> Row:
    """How often a comparison prefers the shape that made the rows, of all shapes."""
    truth = Truth(name, _SIZE | SHAPES[name], _LOW)
    found = []
    for seed in range(simulations):
        comparison = laws.compare(list(SHAPES), truth.runs(seed), bootstrap=0, starts=16, seed=seed)
        found.append(comparison.preferred)
        done()
    others = {other: found.count(other) for other in SHAPES if other != name and other in found}
    return {
        "part": "shapes",
        "what": name,
        "share": found.count(name) / simulations,
        "tables": simulations,
        "others": ", ".join(f"{other} {count}" for other, count in others.items()),
        "undecided": found.count(None) / simulations,
    }


def _in_a_process(cache: str, case: tuple[str, int, int, int]) -> tuple[float, float]:
    """CPU and wall seconds of a fit in a new process, whose compiled programs stay in a folder."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_timed_fit, cache, *case).result()


def _timed_fit(cache: str, law: str, rows: int, starts: int, resamples: int) -> tuple[float, float]:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    truth = next(truth for truth in TRUTHS if truth.law == law)
    runs = truth.runs(0).sample(rows, replace=True, random_state=0)
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    laws.fit(law, runs, starts=starts, bootstrap=resamples)
    return time.process_time() - cpu_s, time.perf_counter() - wall_s


def _table(rows: list[Row]) -> str:
    parts = {
        "speed": ("cpu_s", "wall_s"),
        "coverage": ("tables", "share", "median_error", "flagged"),
        "shapes": ("tables", "share", "undecided", "others"),
    }
    written = []
    for part, names in parts.items():
        own = [row for row in rows if row["part"] == part]
        lines = [[row["what"], *(_short(row[name]) for name in names)] for row in own]
        if lines:
            written.append(table([part, *names], lines, text_columns=1))
    return "\n\n".join(written)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
