r"""Quantizes a trained model in many ways, and measures what each costs.

    python -m launch.ptq --checkpoint=runs/a --methods=rtn,gptq --formats=int2…int8,mxfp4 \
        --policy=w,wa,kv --workdir=runs/a-ptq

A variant is a method, a format and a policy: w quantizes the weights; wa weights and activations,
these per token; kv the attention cache alone, per token and head, whatever the method. Methods are
steps of qat.ptq joined by "+", such as quarot+gptq. Formats are what qat.Quantizer.parse reads,
per channel where they do not say otherwise, and ranges of integers. Embedding and head stay as
they are, and so does what the model was trained to quantize, but for what a variant changes.

Every variant is compared with the original token by token on every text: loss, divergence of the
next-token distributions, and how often both think the same token most likely. Standard errors are
those of the difference, paired by sequence.

WORKDIR/rows.csv and rows.parquet have a row for each variant and text, positions/ one for each part
of the context, report.html the tables and figures, also while it runs. Stop it at any moment; the
same command goes on, and other methods, formats, policies and texts add rows.

Exit codes: 0 done; 2 bad input, or a file that cannot be read or written; 75 preempted by SIGTERM,
130 stopped by Ctrl-C: run the same command again.
"""

from pathlib import Path

from absl import flags

from launch.main import run

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Workdir of a run of launch.train or launch.pretrained (required)."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all results (required).")
_DATA_DIR = flags.DEFINE_string("data_dir", "runs/data", "Folder for prepared text.")
_METHODS = flags.DEFINE_list("methods", ["rtn"], "Methods, such as rtn,gptq,quarot+gptq.")
_FORMATS = flags.DEFINE_string(
    "formats", "int2…int8", "Formats, such as int2…int8,int4/block:32,e2m1,mxfp4,codebook(-1,0,1)."
)
_POLICY = flags.DEFINE_list("policy", ["w"], "What is quantized: w, wa, kv, or several of them.")
_TEXT = flags.DEFINE_string(
    "text",
    None,
    "Texts to evaluate on, as data.source of configs/experiment.py names them, with | between "
    "them; text that a method is calibrated with too is split in halves, other text is used whole "
    "(default: validation text of the run; a converted model has none).",
)
_SEQUENCES = flags.DEFINE_integer(
    "sequences", 0, "Sequences to evaluate on, of each text; 0 is as many as in training, or 64.", 0
)
_LENGTH = flags.DEFINE_integer("length", 0, "Tokens of a sequence; 0 is as in training, or 512.", 0)
_CALIBRATION_TEXT = flags.DEFINE_string(
    "calibration_text",
    None,
    "Text for methods that see data (default: what it was trained on, or the first --text).",
)
_CALIBRATION_SEQUENCES = flags.DEFINE_integer(
    "calibration_sequences", 32, "Sequences of it that they see.", 1
)
_CALIBRATION_LENGTH = flags.DEFINE_integer(
    "calibration_length", 0, "Tokens of each, such as 512; 0 is --length.", 0
)


def main(argv: list[str]) -> None:
    """Measures what is missing, writes rows and report, prints the table."""
    del argv
    from launch.rounding import driving
    from launch.rounding.grid import listed

    driving.run(
        driving.Options(
            checkpoint=Path(str(_CHECKPOINT.value)),
            workdir=Path(str(_WORKDIR.value)),
            data_dir=Path(_DATA_DIR.value),
            methods=tuple(_METHODS.value),
            formats=tuple(listed(_FORMATS.value)),
            policies=tuple(_POLICY.value),
            texts=tuple(_TEXT.value.split("|")) if _TEXT.value else (),
            sequences=_SEQUENCES.value,
            length=_LENGTH.value,
            calibration_text=_CALIBRATION_TEXT.value,
            calibration_sequences=_CALIBRATION_SEQUENCES.value,
            calibration_length=_CALIBRATION_LENGTH.value,
        )
    )


if __name__ == "__main__":
    run(main, required=("checkpoint", "workdir"), keep_freed=False)
