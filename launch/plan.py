r"""Plans runs by a fitted scaling law: size, data and bits for a budget, and what to measure next.

    python -m launch.plan --fit=fits/a/fit.json --flops=1e18,1e19,1e20 --workdir=plans/a
    python -m launch.plan --fit=published:kumar --flops=1e21 --ptq_bits=4 --critical=7e9

A fit is a file of launch.fit, or published:NAME for the constants of a paper. Every budget gets its
best parameters N*, tokens D* and bits P* with intervals, and the sizes and widths that are as good
within --tolerance. With --params the size is given; with --ptq_bits the weights are rounded to so
many bits after training; --inference_tokens takes what serving costs out of the budget; --cost says
what bits are worth: linear, or a chip's speed (v5e, v5p, v6e, tpu7x). --critical gives the tokens
from which on more of them hurt a model of that size, rounded to --ptq_bits.

With --table and --shrink=NAME it also says which next runs, a grid of the table's own sizes, tokens
and bits beyond those there are, would narrow the interval of that parameter most.

WORKDIR, if given, gets plan.csv and report.html.

Exit codes: 0 done; 2 bad input, or a file that cannot be read or written; 75 and 130 stopped.
"""

from pathlib import Path

from absl import flags

from launch import tables
from launch.main import run

flags.adopt_module_key_flags(tables)
_FIT = flags.DEFINE_string("fit", None, "File of launch.fit, or published:NAME (required).")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the results; none for no files.")
_FLOPS = flags.DEFINE_list("flops", [], "Budgets, FLOPs of bfloat16.")
_PARAMS = flags.DEFINE_float("params", None, "Non-embedding parameters, if they are given.")
_BITS = flags.DEFINE_float("bits", None, "Bits in training, if they are given.")
_PTQ_BITS = flags.DEFINE_float("ptq_bits", None, "Bits of the weights after training.")
_INFERENCE = flags.DEFINE_float("inference_tokens", 0.0, "Tokens the model will serve.")
_COST = flags.DEFINE_string("cost", "linear", "What bits are worth: linear, v5e, v5p, v6e, tpu7x.")
_COLUMNS = flags.DEFINE_list("columns", [], "What else the law reads, such as scale_group=128.")
_TOLERANCE = flags.DEFINE_float("tolerance", 1e-3, "Relative excess loss that is as good.")
_CRITICAL = flags.DEFINE_list("critical", [], "Sizes whose critical tokens are wanted.")
_SHRINK = flags.DEFINE_string("shrink", None, "Parameter whose interval the next runs narrow.")
_NEXT = flags.DEFINE_integer("next", 5, "How many next runs to name.", 1)


def main(argv: list[str]) -> None:
    """Plans, prints, and writes if asked to."""
    del argv
    from launch.laws import numbers, planning

    planning.run(
        planning.Options(
            fit=str(_FIT.value),
            workdir=Path(_WORKDIR.value) if _WORKDIR.value else None,
            flops=numbers.listed("flops", _FLOPS.value),
            params=_PARAMS.value,
            bits=_BITS.value,
            ptq_bits=_PTQ_BITS.value,
            inference_tokens=_INFERENCE.value,
            cost=_COST.value,
            columns=numbers.named("columns", _COLUMNS.value),
            tolerance=_TOLERANCE.value,
            critical=numbers.listed("critical", _CRITICAL.value),
            shrink=_SHRINK.value,
            next=_NEXT.value,
        ),
        tables.read()[0] if tables.given() else None,
    )


if __name__ == "__main__":
    run(main, required=("fit",))
