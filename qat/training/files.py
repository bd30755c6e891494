"""Files that appear whole or not at all, whenever the process is killed."""

import os
from pathlib import Path

PARTIAL = ".partial"


def write_whole(path: Path, text: str) -> None:
    """Writes beside the file and renames; makes the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    partial.write_text(text)
    partial.replace(path)
