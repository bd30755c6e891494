"""Answers the questions of a study from its rows: fits, tables and figures, into its README.

    python -m launch.study
    python -m launch.study --question=noise --question=shapes

The folder holds `runs.csv.gz`, the rows of all runs, and other tables beside it. --rows adds those
of further sweeps, --again those of runs that were trained a second time. Answers stand in
`README.md` between comments that name their questions, fits in `fits`, figures in `figures`; the
same rows give the same files.

Exit codes: 0 done; 2 bad input, or a file that cannot be read or written; 75 and 130 stopped.
"""

import time
from pathlib import Path

from absl import flags

from launch.main import run

_FOLDER = flags.DEFINE_string("folder", "docs/studies/precision_micro", "Of the study.")
_QUESTION = flags.DEFINE_multi_string("question", [], "To answer anew; repeatable; all if none.")
_ROWS = flags.DEFINE_multi_string(
    "rows", [], "Table of a sweep (csv, parquet, jsonl) whose rows the study has too; repeatable."
)
_AGAIN = flags.DEFINE_multi_string(
    "again", [], "Table of runs that were trained a second time; repeatable."
)


def main(argv: list[str]) -> None:
    """Gathers, then answers."""
    del argv
    import jax

    jax.config.update("jax_platforms", "cpu")
    from launch.studies import QUESTIONS
    from launch.studies.rows import AGAIN, ROWS, Study, gather
    from qat.spelling import expected_one_of

    for name in _QUESTION.value:
        if name not in QUESTIONS:
            raise ValueError(expected_one_of("question", name, QUESTIONS))
    study = Study(Path(_FOLDER.value))
    for target, sources in ((ROWS, _ROWS.value), (AGAIN, _AGAIN.value)):
        if sources:
            count = gather(study.folder / target, list(map(Path, sources)))
            print(f"{count} rows in {study.folder / target}")
    for name in _QUESTION.value or QUESTIONS:
        start = time.perf_counter()
        QUESTIONS[name](study).write(study.folder, name)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    run(main)
