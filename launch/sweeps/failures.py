"""Why a run, or a rounding of it, failed: a file beside its rows, first the reason in a line."""

import textwrap
import traceback
from pathlib import Path

FILE = "error.txt"
_LONGEST = 300  # characters of a reason


def note(folder: Path, what: str, error: BaseException | str) -> None:
    """Adds what failed, why in one line, and where in the code.

    Args:
        folder: of the run.
        what: of it, such as "training".
        error: that was raised, or the reason in words where a process died.
    """
    if isinstance(error, str):
        reason, where = error, ""
    else:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        where = "".join(traceback.format_exception(error))
    line = textwrap.shorten(reason, _LONGEST, placeholder=" …")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a") as file:
        file.write(f"{what}: {line}\n{where}\n")


def reason(folder: Path) -> str:
    """What failed first and why, in one line, and the file that says more."""
    path = folder / FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return f"{lines[0] if lines else 'nothing is known of it'}; see {path}"


def forget(folder: Path) -> None:
    """Removes what was noted, before the run is tried again."""
    (folder / FILE).unlink(missing_ok=True)
