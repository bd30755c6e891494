"""The whole loop on real text: train at several precisions, quantize after, fit a law, report.

    python -m launch.demo --workdir=runs/demo

Runs the sweep of `configs/sweeps/demo.py` on the interpreter's own standard library, which also
rounds every model to 2…8 bits, fits the precision law to the rows, prints the table and writes
`report.html`. Stop it at any moment; the same command goes on with the runs that are missing.

The law is about models trained unquantized where it speaks of rounding, so the others' rounded
rows are in `rows.csv` but not in the fit.
"""

import time
from pathlib import Path

from absl import flags

from launch.main import run

_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder for rows and report.")
_DATA_DIR = flags.DEFINE_string("data_dir", "runs/data", "Folder for prepared text.")


def main(argv: list[str]) -> int:
    """Runs what is missing, fits, reports; returns the exit code."""
    del argv
    import jax

    jax.config.update("jax_platforms", "cpu")  # accelerators are for the workers
    from configs.sweeps import demo
    from launch.sweeps import driving
    from qat import laws
    from qat.report import findings, page
    from qat.sweep.table import collect

    start = time.perf_counter()
    workdir = Path(_WORKDIR.value)
    options = driving.Options(workdir, Path(_DATA_DIR.value))
    code = driving.run(Path(demo.__file__), options)
    rows = collect([workdir / "rows.parquet"]).table
    rows = rows[(rows["ptq_method"] == "none") | (rows["policy"] == "none")]
    print("Fitting the precision law …", flush=True)
    fit = laws.fit("precision", rows, bootstrap=1000, seed=0)
    fit.save(workdir / "fit.json")
    summary = findings.summarise(rows, fit)
    provenance = f"{rows['run_id'].nunique()} runs, {len(rows)} rows"
    page.write(workdir / "report.html", summary, rows, fit, provenance)
    print(findings.as_text(summary))
    print(f"{time.perf_counter() - start:.0f} s; report: {workdir / 'report.html'}")
    return code


if __name__ == "__main__":
    run(main)
