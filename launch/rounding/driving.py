"""What `launch.ptq` does: check, measure what is missing, merge all rows, tell.

Other methods, formats, policies and texts add rows to the same workdir; another model, calibration,
or number and length of sequences is refused. Everything that can be wrong with the
input is looked for before the workdir is claimed.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from launch.progress import Meter
from launch.rounding import summary
from launch.rounding.grid import ORIGINAL, Variant, variants
from launch.rounding.rows import is_part
from launch.rounding.study import Study
from launch.rounding.subject import Subject, open_subject
from launch.rounding.texts import Library
from launch.training import hold
from qat.report import rounding as page
from qat.sweep.table import collect, write
from qat.training.results import hash_of

_VARIANTS, _POSITIONS, _PAGE = "variants", "positions", "report.html"


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of `launch.ptq`; 0, () and None stand for what the model was trained with."""

    checkpoint: Path
    workdir: Path
    data_dir: Path
    methods: tuple[str, ...] = ("rtn",)
    formats: tuple[str, ...] = ("int2…int8",)
    policies: tuple[str, ...] = ("w",)
    texts: tuple[str, ...] = ()
    sequences: int = 0
    length: int = 0
    calibration_text: str | None = None
    calibration_sequences: int = 32
    calibration_length: int = 0


def run(options: Options) -> None:
    """Measures what is missing, and tells of all there is.

    Raises:
        ValueError: bad input, before anything is written; or a method that cannot take a format.
        OSError: a file cannot be read or written.
    """
    asked = [ORIGINAL, *variants(options.methods, options.formats, options.policies)]
    study, identity = _study(options, asked)
    study.check(asked)
    with contextlib.ExitStack() as stack:
        hold(options.workdir, identity, stack)
        missing = study.missing(asked)
        print(f"{len(asked) - len(missing)} of {len(asked)} variants are measured already")
        if missing:
            _measure(study, missing, functools.partial(_merge, options.workdir))
        table = _merge(options.workdir, print)
    _tell(options.workdir, table, study.subject)


def _study(options: Options, asked: Sequence[Variant]) -> tuple[Study, dict[str, Any]]:
    """The model with its texts, and what identifies a workdir of it.

    Raises:
        ValueError, OSError: the model cannot be opened, or a text not be prepared.
    """
    subject = open_subject(options.checkpoint)
    library = Library(subject.checkpoint, options.data_dir, functools.partial(print, flush=True))
    sequences, length = options.sequences or library.sequences, options.length or library.length
    sources = options.texts or ((library.own,) if library.own else ())
    if not sources:
        raise ValueError(
            f"checkpoint {options.checkpoint} says nothing of the text it was trained on: "
            "expected one to evaluate on, such as --text=folder:PATH"
        )
    texts = library.text_sets(sources, sequences, length)
    source = options.calibration_text or library.own or sources[0]
    shape = (options.calibration_sequences, options.calibration_length or length)
    needed = any(variant.needs_text for variant in asked)
    calibration = library.calibration(source, *shape) if needed else []
    identity = {
        "program": "launch.ptq",
        "model": subject.checkpoint.identity,
        "sequences": sequences,
        "length": length,
    }
    tokens = hash_of({"tokens": [batch.tolist() for batch in calibration]})
    calibrated_on = f"{source}/train {shape[0]}×{shape[1]} {tokens}"
    return Study(subject, texts, calibration, calibrated_on, options.workdir / _VARIANTS), identity


def _measure(study: Study, missing: dict[Variant, Any], written: Callable[[], object]) -> None:
    """Measures, beside a bar; the table is whole after each variant, however this ends."""
    needed = {text.name: text for texts in missing.values() for text in texts}.values()
    runs = [texts for variant, texts in missing.items() if variant != ORIGINAL]
    sequences = sum(text.evaluated for texts in [needed, *runs] for text in texts)
    with Meter("Evaluating", sequences, "sequences") as meter:
        study.measure(missing, meter.advance, written)


def _merge(workdir: Path, say: Callable[[str], object] = lambda _: None) -> pd.DataFrame:
    """All rows on the disk, those of whole texts and those of positions apart; returns all."""
    found = collect((workdir / _VARIANTS).glob("*.jsonl"))
    for line in found.left_out:
        say(f"left out: {line}")
    parts = found.table["eval_set"].map(is_part).astype(bool)
    write(found.table[~parts], workdir)
    write(found.table[parts], workdir / _POSITIONS)
    return found.table


def _tell(workdir: Path, table: pd.DataFrame, subject: Subject) -> None:
    """Prints the table, and writes the page."""
    frame = summary.frame(table, subject.size, subject.config.channels)
    print(summary.as_text(frame))
    provenance = (
        f"Model {subject.row.run_id}: N = {subject.row.params:,} parameters without embedding and "
        f"head, {subject.size:,} with them; "
        + (f"D = {subject.row.tokens:,} training tokens." if subject.row.tokens else "converted.")
    )
    page.write(workdir / _PAGE, frame, provenance)
    print(f"report: {workdir / _PAGE}")
