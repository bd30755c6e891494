"""A seal on a folder: what its files were, so that damage is known before anything is read.

Formats differ in what damage they notice; some give other numbers without a word. The seal is one
file with a digest of itself and of every file in the folder's subfolders. It also carries a few
words on whose the folder is, which are therefore as safe as the arrays. The price is that writer
and reader go through all bytes once more, at about the speed of a disk.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.training.files import write_whole

NAME = "seal.json"


class BrokenError(Exception):
    """A folder is not what was sealed; the message says which file and how."""


def write(folder: Path, words: Mapping[str, Any]) -> None:
    """Seals the files in a folder's subfolders, with a few JSON-like words about it.

    Raises:
        OSError: a file cannot be read, or the seal not written.
    """
    paths = (path for path in sorted(folder.glob("*/**/*")) if path.is_file())
    files = {str(path.relative_to(folder)): _digest(path) for path in paths}
    content = json.dumps({"words": dict(words), "files": files}, sort_keys=True)
    write_whole(folder / NAME, f"{content}\n{_digest_of(content)}\n")


def read(folder: Path) -> dict[str, Any]:
    """The words on a seal, once every sealed file is found as it was; other files are ignored.

    Raises:
        BrokenError: seal or files are damaged or missing.
    """
    try:
        content, digest, *rest = (folder / NAME).read_text().split("\n")
    except (OSError, ValueError):
        raise BrokenError(f"its {NAME} is missing or damaged") from None
    if digest != _digest_of(content) or rest != [""]:
        raise BrokenError(f"its {NAME} is damaged")
    sealed = json.loads(content)
    for name, expected in sealed["files"].items():
        try:
            found = _digest(folder / name)
        except OSError:
            raise BrokenError(f"{name} is missing or cannot be read") from None
        if found != expected:
            raise BrokenError(f"{name} is damaged")
    words: dict[str, Any] = sealed["words"]
    return words


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
