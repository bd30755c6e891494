r"""Measures the curvature of trained models, and why rounding them costs what it costs.

    python -m launch.analyze --checkpoint=runs/a --methods=rtn,gptq --formats=int2-8 \
        --workdir=runs/a-curvature
    python -m launch.analyze --checkpoint=runs/sweep --methods=rtn,quarot --workdir=runs/curvature

Rounding changes weights by Δ and the loss by gᵀΔ + ½ ΔᵀHΔ and what is beyond second order. For
every model this writes a row of the gradient g and the Hessian H of the mean loss in the weights
that are rounded: trace, the largest eigenvalues and the smallest, each with its error. For every
method and format it writes a row of the true cost and its expansion. Under quarot all is said of
the rotated model: the same function in other weights.

--checkpoint may be given several times: a run of launch.train, a model that launch.pretrained
converted, a sweep's workdir or a pattern, of which all finished unquantized runs are taken. A
straight-through gradient has no Hessian, so models that quantize as they run are refused.

Text is that of validation, unless --text says otherwise; the cost is what launch.ptq measures, on
as many sequences. Formats are per channel where they do not say otherwise.

WORKDIR/spectra.csv and expansions.csv have a row each, spectra/ and expansions/ the same as JSON
lines. Stop it at any moment; the same command goes on, and other checkpoints, methods, formats and
texts add rows.

Exit codes: 0 done; 2 bad input, or a file that cannot be read or written; 75 preempted by SIGTERM,
130 stopped by Ctrl-C: run the same command again.
"""

from pathlib import Path

from absl import flags

from launch.main import run

_CHECKPOINT = flags.DEFINE_multi_string(
    "checkpoint", None, "Workdir of a run or of a sweep, or a pattern; may be repeated (required)."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all results (required).")
_DATA_DIR = flags.DEFINE_string("data_dir", "runs/data", "Folder for prepared text.")
_METHODS = flags.DEFINE_list("methods", ["rtn"], "Methods: rtn, gptq, hqq, or quarot before these.")
_FORMATS = flags.DEFINE_string("formats", "int2…int8", "Formats, such as int2…int8,int4/block:32.")
_TEXT = flags.DEFINE_string(
    "text", None, "Text, as data.source names it (default: validation text of the run)."
)
_SEQUENCES = flags.DEFINE_integer(
    "sequences", 0, "Sequences for the true cost; 0 is as many as in training, or 64.", 0
)
_LENGTH = flags.DEFINE_integer("length", 0, "Tokens of a sequence; 0 is as in training, or 512.", 0)
_CALIBRATION_TEXT = flags.DEFINE_string(
    "calibration_text",
    None,
    "Text for methods that see data (default: what it was trained on, or --text).",
)
_CALIBRATION_SEQUENCES = flags.DEFINE_integer(
    "calibration_sequences", 32, "Sequences of it that they see.", 1
)
_CALIBRATION_LENGTH = flags.DEFINE_integer(
    "calibration_length", 0, "Tokens of each, such as 512; 0 is --length.", 0
)
_EXPANSION_SEQUENCES = flags.DEFINE_integer(
    "expansion_sequences", 128, "Of --sequences, those of gradient, trace and expansions.", 2
)
_SPECTRUM_SEQUENCES = flags.DEFINE_integer(
    "spectrum_sequences", 64, "Of these, those of the eigenvalues.", 1
)
_PROBES = flags.DEFINE_integer("probes", 32, "Random vectors for the trace.", 2)
_EIGENVALUES = flags.DEFINE_integer("eigenvalues", 5, "How many of the largest.", 1)
_TOLERANCE = flags.DEFINE_float(
    "tolerance", 1e-2, "Error of eigenvalues, relative to the largest.", 0.0
)
_PRODUCTS = flags.DEFINE_integer("products", 100, "Products with the Hessian they may take.", 2)
_BY_TENSOR = flags.DEFINE_bool(
    "by_tensor", False, "Whether to expand along each tensor's change alone as well."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of random vectors.", 0)


def main(argv: list[str]) -> None:
    """Measures what is missing, writes rows, prints tables."""
    del argv
    from launch.curvature import driving
    from launch.curvature.analysis import Settings
    from launch.rounding.driving import Options
    from launch.rounding.grid import listed

    asked = Options(
        checkpoint=Path(),
        workdir=Path(str(_WORKDIR.value)),
        data_dir=Path(_DATA_DIR.value),
        methods=tuple(_METHODS.value),
        formats=tuple(listed(_FORMATS.value)),
        texts=(_TEXT.value,) if _TEXT.value else (),
        sequences=_SEQUENCES.value,
        length=_LENGTH.value,
        calibration_text=_CALIBRATION_TEXT.value,
        calibration_sequences=_CALIBRATION_SEQUENCES.value,
        calibration_length=_CALIBRATION_LENGTH.value,
    )
    settings = Settings(
        _EXPANSION_SEQUENCES.value,
        _SPECTRUM_SEQUENCES.value,
        _PROBES.value,
        _EIGENVALUES.value,
        _TOLERANCE.value,
        _PRODUCTS.value,
        _BY_TENSOR.value,
        _SEED.value,
    )
    driving.run(driving.Options(tuple(_CHECKPOINT.value or ()), asked, settings))


if __name__ == "__main__":
    run(main, required=("checkpoint", "workdir"))
