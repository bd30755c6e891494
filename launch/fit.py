r"""Fits a scaling law to a table of runs, and says how far to trust it.

    python -m launch.fit --table=runs/sweep/rows.csv --law=precision --workdir=fits/a

Laws are those of qat.laws.LAWS, such as chinchilla, precision, precision_weibull, and laws with an
efficiency for every width, such as free_w3_w4. Columns of the table: params, tokens, loss (nats per
token), and what the law reads (weight_bits, activation_bits, kv_bits, ptq_bits); run_id tells rows
of one run, loss_se their standard errors.

WORKDIR gets fit.json (for launch.plan and qat.laws.load), with_other_losses.csv,
without_one_run.csv and report.html. The same command gives the same files; another table, law or
setting in the same workdir is refused.

Exit codes: 0 done; 2 bad input, or a file that cannot be read or written; 75 and 130 stopped.
"""

from pathlib import Path

from absl import flags

from launch import tables
from launch.main import run

flags.adopt_module_key_flags(tables)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all results (required).")
_LAW = flags.DEFINE_string("law", "precision", "Name of the law.")
_LOSS = flags.DEFINE_enum("loss", "huber", ["huber", "lad", "l2"], "Of the log residual.")
_DELTA = flags.DEFINE_float("delta", 1e-3, "Where Huber's function turns linear, in log loss.")
_WEIGHTS = flags.DEFINE_enum("weights", "equal", ["equal", "loss_se"], "Of the rows.")
_FIXED = flags.DEFINE_list("fixed", [], "Parameters that are known, such as E=1.69,alpha=0.34.")
_BOOTSTRAP = flags.DEFINE_integer("bootstrap", 1000, "Resamples for the intervals.", 0)
_RESAMPLING = flags.DEFINE_enum(
    "resampling", "runs", ["runs", "rows", "wild"], "What is resampled; wild keeps the design."
)
_STARTS = flags.DEFINE_integer("starts", 512, "Random starts of the solver.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Of starts and resamples.")
_PROFILE = flags.DEFINE_bool("profile", False, "Whether to add profile likelihood intervals.")


def main(argv: list[str]) -> None:
    """Fits, writes, and prints the table."""
    del argv
    from launch.laws import fitting, numbers

    fitting.run(
        *tables.read(),
        fitting.Options(
            workdir=Path(str(_WORKDIR.value)),
            law=_LAW.value,
            loss=_LOSS.value,
            delta=_DELTA.value,
            weights=_WEIGHTS.value,
            fixed=numbers.named("fixed", _FIXED.value),
            bootstrap=_BOOTSTRAP.value,
            resampling=_RESAMPLING.value,
            starts=_STARTS.value,
            seed=_SEED.value,
        ),
        profiles=_PROFILE.value,
    )


if __name__ == "__main__":
    run(main, required=("table", "workdir"))
