r"""Compares scaling laws on a table of runs: criteria of fit and of prediction, and a verdict.

    python -m launch.compare --table=runs/sweep/rows.csv --workdir=fits/b \
        --laws=precision,precision_weibull,precision_power,additive

AICc and BIC are of the whole table; hold-outs leave out the largest models, the largest budgets,
the fewest bits, the longest training, or with each:COLUMN every value of a column in turn. A law is
named only where no criterion speaks against it; otherwise the intervals of all that remain are
shown. Where runs are quantized in several operands, a test asks whether what they cost together is
the product of what each costs alone, with a map of where it is not.

WORKDIR gets comparison.csv, a fit of every law as LAW.json, independence.csv, and report.html.

Exit codes: 0 done; 2 bad input, or a file that cannot be read or written; 75 and 130 stopped.
"""

from pathlib import Path

from absl import flags

from launch import tables
from launch.main import run

flags.adopt_module_key_flags(tables)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all results (required).")
_LAWS = flags.DEFINE_list(
    "laws",
    ["precision", "precision_weibull", "precision_power", "precision_logistic", "additive"],
    "Names of at least two laws.",
)
_HOLDOUT = flags.DEFINE_list(
    "holdout",
    ["largest-params", "largest-compute", "lowest-bits", "longest-ratio"],
    "What is held out: these, or each:COLUMN.",
)
_LOSS = flags.DEFINE_enum("loss", "huber", ["huber", "lad", "l2"], "Of the log residual.")
_DELTA = flags.DEFINE_float("delta", 1e-3, "Where Huber's function turns linear, in log loss.")
_BOOTSTRAP = flags.DEFINE_integer("bootstrap", 200, "Resamples for the intervals.", 0)
_STARTS = flags.DEFINE_integer("starts", 256, "Random starts of every fit.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Of starts and resamples.")


def main(argv: list[str]) -> None:
    """Compares, tests, writes, and prints the table and the verdict."""
    del argv
    from launch.laws import comparing

    table, _ = tables.read()
    comparing.run(
        table,
        comparing.Options(
            workdir=Path(str(_WORKDIR.value)),
            laws=tuple(_LAWS.value),
            holdout=tuple(_HOLDOUT.value),
            loss=_LOSS.value,
            delta=_DELTA.value,
            bootstrap=_BOOTSTRAP.value,
            starts=_STARTS.value,
            seed=_SEED.value,
        ),
    )


if __name__ == "__main__":
    run(main, required=("table", "workdir"))
