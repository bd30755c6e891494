"""What `launch.analyze` does: check, measure what is missing, merge all rows, tell.

Other checkpoints, methods, formats and texts add rows to the same workdir; other settings are
refused. Everything that can be wrong with the input is looked for before the workdir is claimed.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.curvature.analysis import EXPANSIONS, SPECTRA, Analysis, Settings
from launch.curvature.choice import chosen
from launch.curvature.point import basis_of
from launch.curvature.rows import ExpansionRow, RunRow, SpectrumRow, saved, write_table
from launch.progress import Meter
from launch.rounding import driving as rounding
from launch.rounding import fitting
from launch.rounding.grid import Variant, variants
from launch.rounding.study import Study
from launch.rounding.subject import Subject
from launch.timing import table
from launch.training import hold
from qat.training.results import hash_of

_LEGEND = (
    "trace and eigenvalues λ of the Hessian of the mean loss in the weights that methods round; a",
    "question mark is of one that has not converged; λ-1 is the smallest. Costs are in nats/token,",
    "on --sequences, and what follows on --expansion_sequences; rest is beyond second order; ± is",
    "one standard error",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of `launch.analyze`.

    Attributes:
        checkpoints: see `launch.curvature.choice.chosen`.
        rounding: the flags that `launch.ptq` has too; its checkpoint is each of these in turn.
        settings: how much to look at.
    """

    checkpoints: tuple[str, ...]
    rounding: rounding.Options
    settings: Settings


def run(options: Options) -> None:
    """Measures what is missing, and tells of what was asked for.

    Raises:
        ValueError: bad input, before anything is written; or a method that cannot take a format.
        OSError: a file cannot be read or written.
    """
    _check(options.settings)
    asked = variants(options.rounding.methods, options.rounding.formats, ("w",))
    for variant in asked:
        basis_of(variant.method)
    subjects, left_out = chosen(options.checkpoints)
    for line in left_out:
        print(f"left out: {line}")
    for subject in subjects:
        fitting.check(subject, asked)
    studies, workdir = _studies(subjects, options, asked), options.rounding.workdir
    with contextlib.ExitStack() as stack:
        hold(workdir, _identity(options), stack)
        _measure(studies, asked, options.settings, workdir)
        spectra, expansions = _merge(workdir)
    run_ids = {subject.row.run_id for subject in subjects}
    print(as_text([row for row in [*spectra, *expansions] if row.run_id in run_ids]))
    print(f"tables: {workdir / SPECTRA}.csv, {workdir / EXPANSIONS}.csv")


def as_text(rows: Sequence[RunRow]) -> str:
    """Tables for a terminal."""
    spectra = [_spectrum_cells(row) for row in rows if isinstance(row, SpectrumRow)]
    expansions = [_expansion_cells(row) for row in rows if isinstance(row, ExpansionRow)]
    ranks = next(row.eigenvalue for row in rows if isinstance(row, SpectrumRow))
    values = [f"λ{rank}" for rank in ranks]
    head = ("run", "basis", "N", "D/N", "loss", "gradient", "trace", *values)
    costs = ("run", "method", "format", "cost", "linear", "quadratic", "rest")
    return "\n".join(
        [
            table(head, spectra, text_columns=2),
            "",
            table(costs, expansions, text_columns=3),
            "",
            *_LEGEND,
        ]
    )


def _check(settings: Settings) -> None:
    """Raises ValueError for numbers that do not go together."""
    few, many = settings.spectrum_sequences, settings.expansion_sequences
    if few > many:
        raise ValueError(
            f"--spectrum_sequences={few}: expected at most --expansion_sequences={many}"
        )
    if settings.products <= settings.eigenvalues:
        raise ValueError(
            f"--products={settings.products}: expected more than --eigenvalues="
            f"{settings.eigenvalues}"
        )


def _identity(options: Options) -> dict[str, Any]:
    """What rows of one workdir have in common."""
    shared = ("sequences", "length", "calibration_text", "calibration_sequences")
    return {
        "program": "launch.analyze",
        **{name: getattr(options.rounding, name) for name in (*shared, "calibration_length")},
        **dataclasses.asdict(options.settings),
    }


def _studies(
    subjects: Sequence[Subject], options: Options, asked: Sequence[Variant]
) -> list[Study]:
    """Each model with its text, which is prepared once for all models that were trained alike."""
    prepared: dict[str, Study] = {}
    found = []
    for subject in subjects:
        key = _text_key(subject)
        if key not in prepared:
            prepared[key] = rounding.study_of(subject, options.rounding, asked)[0]
        found.append(dataclasses.replace(prepared[key], subject=subject))
    return found


def _text_key(subject: Subject) -> str:
    """The same for models that read and were evaluated on the same text."""
    experiment = subject.checkpoint.experiment
    if experiment is None:
        return subject.row.run_id
    config = experiment.config
    names = ("data", "batch_size", "evaluation_batches")
    return hash_of(
        {name: config[name] for name in names} | {"text": subject.checkpoint.data_fingerprint}
    )


def _measure(
    studies: Sequence[Study], asked: Sequence[Variant], settings: Settings, workdir: Path
) -> None:
    """Measures what is missing, beside a bar; the tables are whole after each model."""
    missing = [Analysis(study, settings, workdir).missing(asked) for study in studies]
    rows = sum(map(len, missing))
    print(f"{rows} rows of {len(studies)} models are missing")
    if not rows:
        return
    with Meter("Analyzing", rows, "rows") as meter:
        for study, left in zip(studies, missing, strict=True):
            if left:
                Analysis(study, settings, workdir).measure(left, meter.advance)
                _merge(workdir)


def _merge(workdir: Path) -> tuple[list[SpectrumRow], list[ExpansionRow]]:
    """All rows on the disk, also as tables."""
    spectra = saved(workdir / SPECTRA, SpectrumRow)
    expansions = saved(workdir / EXPANSIONS, ExpansionRow)
    write_table(workdir / f"{SPECTRA}.csv", spectra)
    write_table(workdir / f"{EXPANSIONS}.csv", expansions)
    return spectra, expansions


def _spectrum_cells(row: SpectrumRow) -> list[str]:
    """A line of the table of spectra."""
    return [
        row.run_id,
        row.basis,
        f"{row.params:,}",
        f"{row.tokens / row.params:.1f}",
        f"{row.loss:.4f}",
        f"{row.gradient_norm:.3g}",
        f"{row.trace:.4g} ± {row.trace_se:.2g}",
        *(
            f"{value:.3g}" + ("" if row.eigenvalue_converged[rank] else "?")
            for rank, value in row.eigenvalue.items()
        ),
    ]


def _expansion_cells(row: ExpansionRow) -> list[str]:
    """A line of the table of expansions."""
    parts = [
        (row.ptq_delta, row.ptq_delta_se),
        (row.linear, row.linear_se),
        (row.quadratic, row.quadratic_se),
        (row.remaining, row.remaining_se),
    ]
    words = [row.run_id, row.ptq_method, row.ptq_quantizer]
    return words + [f"{mean:+.2e} ± {se:.0e}" for mean, se in parts]
