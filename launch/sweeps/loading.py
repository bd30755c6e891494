"""Reads a sweep's file, which is a program of the user's: whatever it does wrong is one line."""

import importlib.util
import sys
import traceback
from pathlib import Path

from qat.spelling import nearest
from qat.sweep import Sweep


def load(path: Path) -> Sweep:
    """The sweep of a Python file.

    Raises:
        ValueError: there is no such file, it raises, or no `get_sweep()` in it returns a sweep.
    """
    if not path.is_file():
        beside = [str(other) for other in sorted(path.parent.glob("*.py")) if other != path]
        near = f"; nearest is {nearest(path, beside)!r}" if beside else ""
        raise ValueError(f"--sweep={path} does not exist: expected a Python file{near}")
    spec = importlib.util.spec_from_file_location("sweep_file", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--sweep={path}: expected a Python file with get_sweep()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        sweep = module.get_sweep() if hasattr(module, "get_sweep") else None
    except (Exception, SystemExit) as error:
        raise ValueError(_told(path, error)) from None
    if not isinstance(sweep, Sweep):
        raise ValueError(f"--sweep={path}: expected a function get_sweep() -> qat.sweep.Sweep")
    return sweep


def _told(path: Path, error: BaseException) -> str:
    """What a sweep file raised, and at which of its lines."""
    if isinstance(error, SyntaxError):
        place, reason = f"{error.filename or path}:{error.lineno}", error.msg
    else:
        frames = traceback.extract_tb(sys.exc_info()[2])
        lines = [frame.lineno for frame in frames if Path(frame.filename) == path]
        place, reason = f"{path}:{lines[-1]}" if lines else str(path), str(error)
    if isinstance(error, SystemExit):
        return f"--sweep={place}: expected a sweep, but it exits: {reason or 0}"
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return f"--sweep={place}: {kind}{reason}"
