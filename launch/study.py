"""Answers the questions of a study from its rows: fits, tables and figures, into its README.

    python -m launch.study
    python -m launch.study --question=noise --question=shapes

The folder holds `runs.csv.gz`, the rows of all runs, and other tables beside it; --add adds rows to
them. Answers stand in `README.md` between comments that name their questions,
fits in `fits`, figures in `figures`; the same rows give the same files.

Exit codes: 0 done; 2 bad input, or a file that cannot be read or written; 75 and 130 stopped.
"""

import time
from pathlib import Path

from absl import flags

from launch.main import run

_FOLDER = flags.DEFINE_string("folder", "docs/studies/precision_micro", "Of the study.")
_QUESTION = flags.DEFINE_multi_string("question", [], "To answer anew; repeatable; all if none.")
_ADD = flags.DEFINE_multi_string(
    "add",
    [],
    "TABLE=PATH: result rows (csv, parquet, jsonl) that one of the study's tables, runs, again, "
    "rotated or positions, is to have too; repeatable.",
)


def main(argv: list[str]) -> None:
    """Gathers, then answers."""
    del argv
    import jax

    jax.config.update("jax_platforms", "cpu")
    from launch.studies import QUESTIONS
    from launch.studies.answer import NOTHING
    from launch.studies.rows import TABLES, NoRowsError, Study, gather
    from qat.spelling import expected_one_of

    for name in _QUESTION.value:
        if name not in QUESTIONS:
            raise ValueError(expected_one_of("question", name, QUESTIONS))
    study = Study(Path(_FOLDER.value))
    for name, path in (each.split("=", 1) if "=" in each else (each, "") for each in _ADD.value):
        if name not in TABLES or not path:
            raise ValueError(f"--add={name}: expected TABLE=PATH, TABLE one of {', '.join(TABLES)}")
        print(f"{gather(study.path(name), Path(path))} rows in {study.path(name)}")
    for name in _QUESTION.value or QUESTIONS:
        start = time.perf_counter()
        try:
            found, said = QUESTIONS[name](study), ""
        except NoRowsError as error:
            found, said = NOTHING, f"; {error}"
        found.write(study.folder, name)
        print(f"{name}: {time.perf_counter() - start:.0f} s{said}", flush=True)


if __name__ == "__main__":
    run(main)
