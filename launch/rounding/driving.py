"""What `launch.ptq` does: check, measure what is missing, merge all rows, tell.

Other methods, formats, policies and texts add rows to the same workdir; another model, calibration,
or number and length of sequences is refused. Everything that can be wrong with the
input is looked for before the workdir is claimed.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from launch.progress import Meter
from launch.rounding import fitting, summary
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
_PAGES_APART = 20.0  # in units of the time that the last took


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
    subject = open_subject(options.checkpoint)
    fitting.check(subject, asked)
    study, identity = study_of(subject, options, asked)
    with contextlib.ExitStack() as stack:
        hold(options.workdir, identity, stack)
        missing = study.missing(asked)
        print(f"{len(asked) - len(missing)} of {len(asked)} variants are measured already")
        if missing:
            _measure(study, missing, _merging(options.workdir, subject))
        table = _merge(options.workdir, print)
    print(summary.as_text(_page(options.workdir, table, subject)))
    print(f"report: {options.workdir / _PAGE}")


def study_of(
    subject: Subject, options: Options, asked: Sequence[Variant]
) -> tuple[Study, dict[str, Any]]:
    """The model with its texts, and what identifies a workdir of it.

    Raises:
        ValueError, OSError: a text cannot be prepared.
    """
    library = Library(subject.checkpoint, options.data_dir, functools.partial(print, flush=True))
    sequences, length = options.sequences or library.sequences, options.length or library.length
    shape = (options.calibration_sequences, options.calibration_length or length)
    _check_lengths(subject, {"--length": length, "--calibration_length": shape[1]})
    sources = options.texts or ((library.own,) if library.own else ())
    if not sources:
        raise ValueError(
            f"checkpoint {options.checkpoint} says nothing of the text it was trained on: "
            "expected one to evaluate on, such as --text=folder:PATH"
        )
    source = options.calibration_text or library.own or sources[0]
    needed = any(variant.needs_text for variant in asked)
    if needed:
        library = library.sharing(sources, source)
    texts = library.text_sets(sources, sequences, length)
    calibration = library.calibration(source, *shape) if needed else []
    identity = {
        "program": "launch.ptq",
        "model": subject.checkpoint.identity,
        "sequences": sequences,
        "length": length,
    }
    tokens = hash_of({"tokens": [batch.tolist() for batch in calibration]})
    calibrated_on = f"{library.name(source, 'train')} {shape[0]}×{shape[1]} {tokens}"
    return Study(subject, texts, calibration, calibrated_on, options.workdir / _VARIANTS), identity


def _check_lengths(subject: Subject, lengths: Mapping[str, int]) -> None:
    """Raises ValueError for sequences longer than the model knows how to read."""
    longest = subject.checkpoint.sequence_length
    for flag, length in lengths.items():
        if 0 < longest < length:
            raise ValueError(
                f"{flag}={length}: the model was trained on sequences of up to {longest} tokens, "
                f"and loss beyond them says nothing of rounding; expected at most {longest}"
            )


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


def _merging(workdir: Path, subject: Subject) -> Callable[[], None]:
    """Merges all rows when it is called, and writes the page where that costs little time."""
    due = 0.0

    def merge() -> None:
        nonlocal due
        table, start = _merge(workdir), time.monotonic()
        if start >= due:
            _page(workdir, table, subject)
            due = time.monotonic() + _PAGES_APART * (time.monotonic() - start)

    return merge


def _page(workdir: Path, table: pd.DataFrame, subject: Subject) -> pd.DataFrame:
    """Writes the page; returns the lines it is about."""
    frame = summary.frame(table, subject.size, subject.config.channels)
    provenance = (
        f"Model {subject.row.run_id}: N = {subject.row.params:,} parameters without embedding and "
        f"head, {subject.size:,} with them; "
        + (f"D = {subject.row.tokens:,} training tokens." if subject.row.tokens else "converted.")
    )
    page.write(workdir / _PAGE, frame, provenance)
    return frame
