"""The whole loop on real text: train at several precisions, quantize after, fit a law, report.

    python -m launch.demo --workdir=runs/demo

Trains the grid of `configs/demo.py` on the interpreter's own standard library, rounds every
unquantized model to 2…8 bits, fits the precision law to the rows, prints the table and writes
`report.html`. Stop it at any moment; the same command goes on with the runs that are missing.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
from absl import flags

from configs import demo
from launch import cpu
from launch.experiment import Experiment
from launch.lab import Lab
from launch.main import run
from launch.progress import Meter
from launch.timing import counting_compiles
from qat import laws
from qat.policy import Policy
from qat.report import findings, page
from qat.training.checkpoint import claim
from qat.training.results import Row, hash_of, read_rows, write_rows
from qat.training.step import Metrics, mean_and_standard_error

_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder for rows and report.")
_DATA_DIR = flags.DEFINE_string("data_dir", "runs/data", "Folder for prepared text.")

_PROGRAMS = ("train_step", "eval_step")


def main(argv: list[str]) -> None:
    """Runs what is missing, fits, reports."""
    del argv
    start = time.perf_counter()
    cpu.one_thread_per_run()
    workdir = Path(_WORKDIR.value)
    experiments = [Experiment.from_config(config.to_dict()) for config in demo.get_configs()]
    lab = Lab(Path(_DATA_DIR.value), devices=jax.devices()[:1])
    claim(
        workdir,
        {
            "demo": hash_of({"runs": [each.config for each in experiments]}),
            "data_fingerprint": lab.dataset(experiments[0]).fingerprint,
        },
    )
    with counting_compiles() as compiled:
        _run_missing(lab, experiments, workdir / "rows")
    rows = read_rows(workdir / "rows")
    print("Fitting the precision law …", flush=True)
    fit = laws.fit("precision", rows, bootstrap=1000, seed=0)
    fit.save(workdir / "fit.json")
    rows.to_csv(workdir / "rows.csv", index=False)
    summary = findings.summarise(rows, fit)
    shapes = len({each.shape for each in experiments})
    counts = ", ".join(f"{compiled[name]} {name}" for name in _PROGRAMS)
    provenance = f"{len(experiments)} runs of {shapes} shapes; compiled programs: {counts}"
    page.write(workdir / "report.html", summary, rows, fit, provenance)
    print(findings.as_text(summary))
    print(f"\n{provenance}")
    print(f"{time.perf_counter() - start:.0f} s; report: {workdir / 'report.html'}")


def _run_missing(lab: Lab, experiments: Sequence[Experiment], folder: Path) -> None:
    """Runs every experiment whose rows are not there yet, one on each core."""
    missing = [each for each in experiments if not _rows_path(lab, each, folder).exists()]
    if len(missing) < len(experiments):
        print(f"{len(experiments) - len(missing)} of {len(experiments)} runs are done already")
    if not missing:
        return
    tokens = sum(each.tokens for each in missing) / 1e6
    workers = min(len(cpu.cores()), len(missing))
    with Meter("Training", tokens, "million tokens") as meter:
        pool = ThreadPoolExecutor(workers)
        try:
            list(pool.map(lambda each: _run(lab, each, folder, meter), missing))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _run(lab: Lab, experiment: Experiment, folder: Path, meter: Meter) -> None:
    """One experiment, from training to its file of rows."""
    tokens_per_step = experiment.tokens / experiment.schedule.total_steps / 1e6
    seen = 0

    def on_log(step: int, metrics: Sequence[Metrics]) -> None:
        nonlocal seen
        meter.advance((step - seen) * tokens_per_step)
        seen = step

    lab.compile(experiment)
    result, wall_s = lab.train(experiment, on_log=on_log)
    losses = lab.evaluate(experiment, result.state.params, experiment.policy)
    row = lab.row(experiment, result.status, wall_s, losses)
    rows = [row]
    if str(experiment.policy) == "none" and row.status == "ok":
        for bits in demo.PTQ_BITS:
            # Rounding to nearest is the quantizer of training, applied once: a weights-only
            # policy on the trained parameters, through the same compiled program.
            policy = Policy.parse(f"w{bits}")
            rounded = lab.evaluate(experiment, result.state.params, policy)
            loss, loss_se = mean_and_standard_error(rounded)
            delta, delta_se = mean_and_standard_error(rounded - losses)
            rows.append(
                replace(
                    row,
                    ptq_method="rtn",
                    ptq_bits=policy.bits("weights"),
                    ptq_format=policy.format_name("weights"),
                    ptq_quantizer=str(policy.weights),
                    loss=loss,
                    loss_se=loss_se,
                    ptq_delta=delta,
                    ptq_delta_se=delta_se,
                )
            )
    write_rows(_rows_path(lab, experiment, folder), rows)
    meter.say(_line(row))


def _line(row: Row) -> str:
    """A finished run in one line."""
    formats = (row.weight_format, row.activation_format, row.kv_format)
    return (
        f"  N = {row.params:>6,}  D = {row.tokens:>9,}  weights {formats[0]:<5} activations "
        f"{formats[1]:<5} cache {formats[2]:<5} seed {row.seed}: {row.status}, "
        f"{row.loss:.4f} ± {row.loss_se:.4f} nats/token"
    )


def _rows_path(lab: Lab, experiment: Experiment, folder: Path) -> Path:
    return folder / f"{lab.run_id(experiment)}.jsonl"


if __name__ == "__main__":
    run(main)
