"""Which models are analyzed: each named by its folder, or all that fit in a sweep or a pattern.

A model must compute without quantization, in float32: the gradient of a straight-through quantizer
is not that of the loss, so its derivative is no Hessian. One that is named is refused otherwise; of
a sweep's workdir or a pattern, those that do not fit or are not finished are left out, with a line.
"""

import glob
from collections.abc import Sequence
from pathlib import Path

from launch.rounding.subject import Subject, open_subject
from qat.spelling import expected_instead

_RUNS = "runs"  # of a sweep's workdir, see launch.sweeps.plan


def chosen(names: Sequence[str]) -> tuple[list[Subject], list[str]]:
    """The models, each once, and a line for each that is left out.

    Args:
        names: folders of runs or of converted models, workdirs of sweeps, patterns such as
            "runs/*".

    Raises:
        OSError: a file cannot be read.
        ValueError: a folder holds no model, or one that does not fit; or none of several fits.
    """
    subjects, left_out = list[Subject](), list[str]()
    for name in names:
        several = _several(name)
        if several is None:
            subjects.append(_opened(Path(name)))
            continue
        fitting, reasons = _fitting(several)
        if not fitting:
            reason = reasons[0] if reasons else "nothing is there"
            raise ValueError(f"--checkpoint={name}: no model to analyze; {reason}")
        subjects += fitting
        left_out += reasons
    return list({each.row.run_id: each for each in subjects}.values()), left_out


def _several(name: str) -> list[Path] | None:
    """The folders that a pattern or a sweep's workdir stands for; None of a single model."""
    place = Path(name).expanduser()
    if not place.exists() and glob.has_magic(name):
        root = Path(place.anchor)
        return sorted(path for path in root.glob(str(place.relative_to(root))) if path.is_dir())
    if (place / _RUNS).is_dir() and not (place / "config.json").exists():
        return sorted(path for path in (place / _RUNS).iterdir() if path.is_dir())
    return None


def _fitting(folders: Sequence[Path]) -> tuple[list[Subject], list[str]]:
    found, reasons = [], []
    for folder in folders:
        try:
            found.append(_opened(folder))
        except ValueError as reason:
            reasons.append(str(reason))
    return found, reasons


def _opened(folder: Path) -> Subject:
    """Raises OSError, ValueError: as `open_subject`; or the model does not fit."""
    subject = open_subject(folder)
    what = f"checkpoint {str(folder)!r}"
    if str(subject.policy) != "none":
        raise ValueError(
            f"{what} quantizes while it runs, by policy {str(subject.policy)!r}, and its "
            "straight-through gradient has no Hessian: expected an unquantized run, policy 'none'"
        )
    if subject.config.dtype != "float32":
        raise ValueError(expected_instead(f"{what}, dtype", "'float32'", subject.config.dtype))
    return subject
