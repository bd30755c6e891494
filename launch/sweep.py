"""Runs a whole grid of experiments as one job; the same command goes on with what is missing.

    python -m launch.sweep --sweep=configs/sweeps/demo.py --workdir=runs/sweep

Every run has a folder in WORKDIR/runs, as `launch.train` makes it. All rows together are
`rows.csv` and `rows.parquet`, written anew whenever the command ends by itself. Runs that are
finished are skipped, here or in the tables named by --have: finished is a run that has all of its
rows, those of its roundings too, for without a checkpoint it has to be trained again to be rounded.
Failed and diverged runs are rows too, and --retry tries them again. --dry_run says what it will
cost.

--executor=local runs on this machine; slurm submits an array of jobs and waits for it; emit prints
commands for any other scheduler, after which the same command with emit collects the rows.

Exit codes: 0 done; 2 bad input, or a file that cannot be read or written; 3 done, and some run or
rounding diverged or failed; 75 preempted by SIGTERM, 130 stopped by Ctrl-C: run the same command
again. Workers on this machine then save what they do, within a minute, and the table is written; a
second signal does not wait for them.
"""

from pathlib import Path

from absl import flags

from launch.main import run

_SWEEP = flags.DEFINE_string("sweep", None, "Python file with get_sweep() (required).")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of all results (required, but for a dry run)."
)
_DATA_DIR = flags.DEFINE_string("data_dir", "runs/data", "Folder for prepared text.")
_EXECUTOR = flags.DEFINE_enum(
    "executor", "local", ["local", "slurm", "emit"], "What starts the workers."
)
_WORKERS = flags.DEFINE_integer(
    "workers", 0, "Processes or jobs at once; 0 is one a core, or one for accelerators.", 0
)
_HAVE = flags.DEFINE_multi_string(
    "have",
    [],
    "Table (csv, csv.gz, parquet, jsonl) whose finished runs need not run again; repeatable.",
)
_RETRY = flags.DEFINE_multi_enum(
    "retry",
    [],
    ["failed", "diverged"],
    "Runs and roundings that ended so are tried again; repeatable.",
)
_CHECKPOINT_EVERY = flags.DEFINE_integer(
    "checkpoint_every", 0, "Steps between checkpoints of a run; 0 saves at its end alone.", 0
)
_LANES = flags.DEFINE_integer(
    "lanes",
    1,
    "Runs of one shape and length that train together as one program, at most; for accelerators, "
    "which small models do not fill. They save nothing before their end: killed, they start again.",
    1,
)
_SLURM = flags.DEFINE_multi_string(
    "slurm",
    [],
    "What each job gets, such as minutes=240 or partition=gpu; with dashes an option of sbatch, "
    "such as --slurm=--mem-per-cpu=4G; repeatable.",
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only say what the sweep will cost.")
_CALIBRATE = flags.DEFINE_float(
    "calibrate",
    20.0,
    "About how many seconds a dry run times this machine, more where compiling takes longer; 0 is "
    "not at all.",
    0.0,
)
_UTILISATION = flags.DEFINE_float("utilisation", 0.4, "Share of an accelerator's peak; dry run.")
_CHIPS = flags.DEFINE_integer("chips", 1, "Accelerators that share the runs; dry run.")
_PRICE = flags.DEFINE_multi_string(
    "price", [], "Of a chip for an hour, such as v5e:1.2; dry run, repeatable."
)


def main(argv: list[str]) -> int:
    """Plans, runs what is missing, merges; returns the exit code."""
    del argv
    import jax

    jax.config.update("jax_platforms", "cpu")  # accelerators are for the workers
    from launch.sweeps import cluster, driving, dry_run

    if _PRICE.value and not _DRY_RUN.value:
        raise ValueError("--price is of a dry run: expected --dry_run beside it")
    if _SLURM.value and _EXECUTOR.value != "slurm":
        raise ValueError(
            f"--slurm={_SLURM.value[0]} with --executor={_EXECUTOR.value}: expected "
            "--executor=slurm beside it"
        )
    resources = cluster.resources_of(_SLURM.value, _WORKERS.value)
    if _DRY_RUN.value:
        dry_run.run(
            Path(str(_SWEEP.value)),
            _WORKERS.value,
            data_dir=Path(_DATA_DIR.value),
            have=list(map(Path, _HAVE.value)),
            calibrate_s=_CALIBRATE.value,
            chips=_CHIPS.value,
            utilisation=_UTILISATION.value,
            prices=_PRICE.value,
        )
        return 0
    if _WORKDIR.value is None:
        raise ValueError("--workdir is missing: expected a folder for the results")
    options = driving.Options(
        workdir=Path(str(_WORKDIR.value)),
        data_dir=Path(_DATA_DIR.value),
        executor=_EXECUTOR.value,
        workers=_WORKERS.value,
        have=tuple(map(Path, _HAVE.value)),
        retry=frozenset(_RETRY.value),
        checkpoint_every=_CHECKPOINT_EVERY.value,
        resources=resources,
        lanes=_LANES.value,
    )
    return driving.run(Path(str(_SWEEP.value)), options)


if __name__ == "__main__":
    run(main, required=("sweep",))
