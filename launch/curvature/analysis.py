"""One model: which of its rows are missing, and what they say.

A row is one file, written whole when it is measured, so a kill at any moment loses one. Probes and
starts come from one seed for all models, so that models of one shape are compared under the same.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

import qat.ptq
from launch.curvature.point import PLAIN, ROTATED, Point, basis_of, batches_of
from launch.curvature.rows import ExpansionRow, RunRow, SpectrumRow, save, saved
from launch.rounding.evaluation import Parts, States, measure, measure_original
from launch.rounding.fitting import SKIP
from launch.rounding.grid import Variant
from launch.rounding.study import Study
from models.transformer import Transformer
from qat.analysis import mean_and_standard_error, sharpness
from qat.policy import Policy
from qat.training.results import hash_of

SPECTRA, EXPANSIONS = "spectra", "expansions"  # folders of rows
_ANY = "int8/channel"  # for the rotation, which is the same for all formats

Advance = Callable[[float, str], None]
Missing = str | Variant  # a basis whose spectrum, or a variant whose expansion


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much to look at.

    Attributes:
        expansion_sequences: for gradient, trace and expansions.
        spectrum_sequences: of these, for eigenvalues.
        probes: of the trace.
        eigenvalues: how many of the largest.
        tolerance: of their errors, relative to the largest.
        products: with the Hessian, at most, that they may take.
        by_tensor: whether to expand along the change of each tensor alone as well.
        seed: of probes and starts.
    """

    expansion_sequences: int = 128
    spectrum_sequences: int = 64
    probes: int = 32
    eigenvalues: int = 5
    tolerance: float = 1e-2
    products: int = 100
    by_tensor: bool = False
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """A model with its text.

    Attributes:
        study: the model, one text, what methods may see.
        settings: how much to look at.
        workdir: the rows go into folders of it.
    """

    study: Study
    settings: Settings
    workdir: Path

    def missing(self, asked: Sequence[Variant]) -> list[Missing]:
        """Bases and variants that have no row yet, by basis.

        Raises:
            ValueError: a file holds no such rows, or the text has changed.
        """
        there = {row.key for kind in _FOLDERS for row in self._there(kind)}
        run_id, (text,) = self.study.subject.row.run_id, self.study.texts
        left: list[Missing] = []
        for basis in dict.fromkeys(basis_of(variant.method) for variant in asked):
            variants = [each for each in asked if basis_of(each.method) == basis]
            keys: dict[Missing, tuple[str, ...]] = {basis: (run_id, text.name, basis)}
            keys |= {each: (run_id, text.name, *each.spellings[:2]) for each in variants}
            left += [each for each, key in keys.items() if key not in there]
        return left

    def measure(self, missing: Sequence[Missing], advance: Advance) -> None:
        """Measures, and writes each row as soon as it is done.

        Args:
            missing: those of `missing`.
            advance: told of each row.

        Raises:
            ValueError: a method cannot take a format.
        """
        for each in missing:
            start = time.perf_counter()
            if isinstance(each, Variant):
                row: RunRow = self._expansion(each)
                name = each.file_name
            else:
                row, name = self._spectrum(each), each
            row = dataclasses.replace(row, wall_s=time.perf_counter() - start)
            text = hash_of({"text": row.eval_set})
            save(self.workdir / _FOLDERS[type(row)] / f"{row.run_id}-{text}-{name}.jsonl", row)
            advance(1, f"{row.run_id} {each}")

    def _there(self, kind: type[RunRow]) -> Iterator[RunRow]:
        """Rows of this model on this text, which must not have changed since."""
        (text,) = self.study.texts
        for row in saved(self.workdir / _FOLDERS[kind], kind):
            if (row.run_id, row.eval_set) == (self.study.subject.row.run_id, text.name):
                if row.data_fingerprint != text.fingerprint:
                    raise ValueError(
                        f"text {text.name} has changed since run {row.run_id} was analyzed on it: "
                        f"fingerprint {row.data_fingerprint} then, {text.fingerprint} now; choose "
                        "another workdir"
                    )
                yield row

    def _spectrum(self, basis: str) -> SpectrumRow:
        """Gradient, trace and eigenvalues."""
        settings, point = self.settings, self._point(basis)
        key = jax.random.key(settings.seed)
        traced, started = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        where = (point.loss, point.weights)
        slope = sharpness.slope(*where, self._batches)
        trace = sharpness.trace(*where, self._batches, traced, settings.probes)
        few = -(-settings.spectrum_sequences // len(self._batches[0]))
        ends = sharpness.extremes(
            *where,
            self._batches[:few],
            started,
            largest=settings.eigenvalues,
            tolerance=settings.tolerance,
            products=settings.products,
        )
        ranked = {str(rank): each for rank, each in enumerate(ends.largest, start=1)}
        ranked |= {str(-rank): each for rank, each in enumerate(ends.smallest, start=1)}
        return SpectrumRow(
            **self._columns(basis),
            weights=point.size,
            gradient_norm=slope.norm,
            gradient_noise=slope.noise,
            trace=trace.whole.mean,
            trace_se=trace.whole.se,
            trace_of={name: each.mean for name, each in trace.leaves.items()},
            trace_se_of={name: each.se for name, each in trace.leaves.items()},
            eigenvalue={rank: each.value for rank, each in ranked.items()},
            eigenvalue_bound={rank: each.bound for rank, each in ranked.items()},
            eigenvalue_converged={rank: each.converged for rank, each in ranked.items()},
            products=ends.products,
        )

    def _expansion(self, variant: Variant) -> ExpansionRow:
        """What rounding costs, and its expansion."""
        quantized, _ = self.study.quantized(variant)
        delta, delta_se = self._delta(quantized)
        point = self._point(basis_of(variant.method))
        change = point.change_to(quantized)
        found = sharpness.expand(
            point.loss, point.weights, change, self._batches, blocks=self.settings.by_tensor
        )
        method, weights, _, _ = variant.spellings
        policy = Policy(variant.weights)
        terms = ("change", "linear", "quadratic", "remaining")
        numbers = {name: getattr(found, name).mean for name in terms}
        numbers |= {f"{name}_se": getattr(found, name).se for name in terms}
        return ExpansionRow(
            **self._columns(basis_of(variant.method)),
            **numbers,
            ptq_method=method,
            ptq_quantizer=weights,
            ptq_format=policy.format_name("weights"),
            ptq_bits=policy.bits("weights"),
            ptq_calibration=self.study.calibrated_on if variant.needs_text else "none",
            ptq_delta=delta,
            ptq_delta_se=delta_se,
            squared_norm=found.squared_norm,
            squared_norm_of={name: float(jnp.vdot(x, x)) for name, x in change.items()},
            quadratic_of={name: each.mean for name, each in found.blocks.items()},
            status="ok" if math.isfinite(delta + sum(numbers.values())) else "diverged",
        )

    def _delta(self, quantized: Transformer) -> tuple[float, float]:
        """As `launch.ptq` measures it, with its standard error."""
        (text,), (original, states) = self.study.texts, self._original
        found = measure(original, quantized, text, states, lambda _: None)
        return mean_and_standard_error(found.delta_RT.mean(axis=1))

    @functools.cached_property
    def _original(self) -> tuple[Parts, States]:
        """The model, and what its head reads of all sequences."""
        model, (text,) = self.study.subject.model(None), self.study.texts
        return Parts.of(model), measure_original(model, text, lambda _: None)[1]

    @functools.cached_property
    def _batches(self) -> Sequence[Int32[np.ndarray, "B S"]]:
        (text,) = self.study.texts
        return batches_of(text.tokens_NS[: self.settings.expansion_sequences])

    def _point(self, basis: str) -> Point:
        return self._plain if basis == PLAIN else self._rotated

    @functools.cached_property
    def _plain(self) -> Point:
        return Point.of(self.study.subject.model(None))

    @functools.cached_property
    def _rotated(self) -> Point:
        model, calibration = (
            self.study.subject.model(None),
            map(jnp.asarray, self.study.calibration),
        )
        return Point.of(qat.ptq.transform(model, ROTATED, _ANY, calibration, SKIP))

    def _columns(self, basis: str) -> dict[str, Any]:
        """What all rows say of the model and the text."""
        subject, (text,) = self.study.subject, self.study.texts
        row = dataclasses.asdict(subject.row)
        shared = {field.name for field in dataclasses.fields(RunRow)} & set(row)
        return {name: row[name] for name in shared} | {
            "checkpoint": subject.checkpoint.name,
            "eval_set": text.name,
            "data_fingerprint": text.fingerprint,
            "basis": basis,
            "wall_s": 0.0,
        }


_FOLDERS: dict[type[RunRow], str] = {SpectrumRow: SPECTRA, ExpansionRow: EXPANSIONS}
