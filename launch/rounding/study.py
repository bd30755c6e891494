"""One checkpoint and its variants: which are missing, and what each costs.

A variant is one file of rows, written whole when it is measured on all texts it was missing on, so
a kill at any moment loses one variant at most. The original's states and one variant's parameters
are in memory beside the original's own.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

import qat.ptq
from launch.rounding.evaluation import Measured, Parts, measure, measure_original
from launch.rounding.fitting import SKIP, running_policy
from launch.rounding.grid import ORIGINAL, Variant
from launch.rounding.rows import measured, spellings_of
from launch.rounding.subject import Subject
from launch.rounding.texts import TextSet
from models.transformer import Transformer
from qat.analysis import total_bits
from qat.policy import Policy
from qat.training.results import UNQUANTIZED_BITS, Row, rows_of, write_rows

Advance = Callable[[float, str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """A checkpoint, the texts it is evaluated on and what methods may see.

    Attributes:
        subject: the model.
        texts: to evaluate on.
        calibration: inputs in batches; empty where no method asked for needs any.
        calibrated_on: how much of which text that is, or "none".
        folder: of the variants' rows.
    """

    subject: Subject
    texts: Sequence[TextSet]
    calibration: Sequence[Int32[np.ndarray, "B T"]]
    calibrated_on: str
    folder: Path

    def missing(self, asked: Sequence[Variant]) -> dict[Variant, list[TextSet]]:
        """Variants with the texts they are still to be measured on.

        Raises:
            ValueError: a file in the folder holds no rows, a text has changed, or a method was
                calibrated otherwise.
        """
        rows = rows_of(self.folder)
        self._check_calibration(rows, asked)
        left = {each: [t for t in self.texts if not self._has(rows, each, t)] for each in asked}
        return {each: texts for each, texts in left.items() if texts}

    def measure(
        self,
        missing: dict[Variant, list[TextSet]],
        advance: Advance,
        written: Callable[[], object],
    ) -> None:
        """Measures variants, and writes the rows of each as soon as it is done.

        Args:
            missing: those of `missing`.
            advance: told how many sequences were evaluated, and of which variant.
            written: called after each variant's rows.

        Raises:
            ValueError: a method cannot take a format.
        """
        start = time.perf_counter()
        model = self.subject.model(self._running(ORIGINAL))
        needed = {text.name: text for texts in missing.values() for text in texts}
        on_batch = functools.partial(_tell, advance, ORIGINAL)
        originals = {name: measure_original(model, text, on_batch) for name, text in needed.items()}
        if ORIGINAL in missing:
            found = [(text, originals[text.name][0]) for text in missing[ORIGINAL]]
            self._write(ORIGINAL, found, self._original_bits, time.perf_counter() - start)
            written()
        parts, states = Parts.of(model), {name: each[1] for name, each in originals.items()}
        for variant, texts in missing.items():
            if variant != ORIGINAL:
                start = time.perf_counter()
                quantized, bits = self.quantized(variant)
                on_batch = functools.partial(_tell, advance, variant)
                found = [
                    (text, measure(parts, quantized, text, states[text.name], on_batch))
                    for text in texts
                ]
                self._write(variant, found, bits, time.perf_counter() - start)
                written()

    def quantized(self, variant: Variant) -> tuple[Transformer, float]:
        """The model of a variant, and the bits it takes.

        Raises:
            ValueError: the method cannot take the format.
        """
        model = self.subject.model(self._running(variant))
        if variant.weights is None:
            return model, self._original_bits
        batches = map(jnp.asarray, self.calibration if variant.needs_text else ())
        try:
            quantized, report = qat.ptq.quantize(
                model,
                method=variant.method,
                quantizer=variant.weights,
                calibration=batches,
                skip=SKIP,
            )
        except ValueError as error:
            raise ValueError(f"{variant}: {error}") from None
        exact = [line.exact_rows for line in report if line.exact_rows is not None]
        stored = [line.stored for line in report if line.stored is not None]
        rest = self.subject.size - sum(each.codes.size for each in stored)
        rest += sum(int(jnp.count_nonzero(rows)) for rows in exact)
        return quantized, float(total_bits(stored, rest))

    def _running(self, variant: Variant) -> Policy | None:
        return running_policy(self.subject.policy, variant)

    @property
    def _original_bits(self) -> float:
        """Of the model as it is; 0 where it was trained with other weights than it holds."""
        trained = self.subject.policy.bits("weights") < UNQUANTIZED_BITS
        return 0.0 if trained else UNQUANTIZED_BITS * self.subject.size

    def _calibration_of(self, variant: Variant) -> str:
        return self.calibrated_on if variant.needs_text else "none"

    def _check_calibration(self, rows: Sequence[Row], asked: Sequence[Variant]) -> None:
        """Raises ValueError if what is there was calibrated otherwise than what is asked for."""
        there = {row.ptq_calibration for row in rows} - {"none", self.calibrated_on}
        if there and any(variant.needs_text for variant in asked):
            raise ValueError(
                f"methods were calibrated on {min(there)} there, on {self.calibrated_on} here; "
                "choose another workdir"
            )

    def _has(self, rows: Sequence[Row], variant: Variant, text: TextSet) -> bool:
        """Whether a variant was measured on a text, which must not have changed since."""
        of_variant = [row for row in rows if spellings_of(row) == variant.spellings]
        found = [row for row in of_variant if row.eval_set == text.name]
        for row in found:
            if row.data_fingerprint != text.fingerprint:
                raise ValueError(
                    f"text {text.name} has changed since {variant} was evaluated on it: "
                    f"fingerprint {row.data_fingerprint} then, {text.fingerprint} now; choose "
                    "another workdir"
                )
        return bool(found)

    def _write(
        self, variant: Variant, found: list[tuple[TextSet, Measured]], bits: float, wall_s: float
    ) -> None:
        """Adds the rows of a variant to those it has of other texts."""
        before = [row for row in rows_of(self.folder) if spellings_of(row) == variant.spellings]
        row = dataclasses.replace(
            self.subject.row,
            ptq_calibration=self._calibration_of(variant),
            ptq_wall_s=wall_s,
            total_bits=bits,
        )
        new = [each for text, result in found for each in measured(row, variant, text, result)]
        write_rows(self.folder / f"{variant.file_name}.jsonl", [*before, *new])


def _tell(advance: Advance, variant: Variant, sequences: int) -> None:
    advance(sequences, str(variant))
