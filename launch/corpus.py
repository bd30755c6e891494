"""Builds a corpus of 136 MB of real English prose and documentation from Debian packages.

    python -m launch.corpus --out=runs/corpus/english
    python -m launch.train --config.data.source=folder:runs/corpus/english …

Cost: 109 MB of downloads, a minute of one core, 0.4 GB of memory.

A dictionary, an encyclopedia of computing, a lexicon of jargon, essays, two translations of the
Bible and two commentaries on it, and the manuals of Linux, Python, Perl, R, PostgreSQL, SQLite and
Git. apt downloads the packages into a temporary folder; nothing is installed and no rights are
needed. Every package becomes a folder of plain texts with a `.manifest.json` (version, licence,
size, hash of the text). A folder appears whole or not at all, so the program can be stopped at any
moment; the same command goes on with the packages that are missing. The texts are under the
licences named there, mostly GPL and GFDL: train on them, do not pass them on.
"""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from launch.english.packages import PACKAGES, Package
from launch.english.tidy import is_prose
from launch.main import run
from launch.progress import Meter

_OUT = flags.DEFINE_string("out", "runs/corpus/english", "Folder for the texts.")

_MANIFEST = ".manifest.json"  # hidden, so that it is no text of the corpus


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a package's folder holds.

    Attributes:
        package: name of the Debian package.
        version: of the package.
        licence: of the text.
        documents: how many texts.
        left_out: how many more are not mostly words.
        bytes: of all texts.
        sha256: of all texts, joined in the order of their paths.
    """

    package: str
    version: str
    licence: str
    documents: int
    left_out: int
    bytes: int
    sha256: str


def main(argv: list[str]) -> None:
    """Builds what is missing, and prints what there is."""
    del argv
    out = Path(_OUT.value)
    missing = [package for package in PACKAGES if read_manifest(out / package.name) is None]
    if missing:
        out.mkdir(parents=True, exist_ok=True)
        with Meter("Building", len(missing), "packages") as meter:
            for package in missing:
                manifest = build(package, out)
                meter.say(_line(manifest))
                if manifest.version != package.version:
                    meter.say(
                        f"  {package.name}: made for version {package.version}, found "
                        f"{manifest.version}; look at the text before you trust it"
                    )
                meter.advance(1)
    found = [read_manifest(out / package.name) for package in PACKAGES]
    size = sum(each.bytes for each in found if each) / 1e6
    print(f"{size:.1f} MB of text in {out}; use it as --config.data.source=folder:{out}")


def read_manifest(folder: Path) -> Manifest | None:
    """What a finished package's folder holds; None if there is no such folder.

    Raises:
        ValueError: the folder is there, but this program did not make it.
    """
    if not folder.exists():
        return None
    try:
        return Manifest(**json.loads((folder / _MANIFEST).read_text()))
    except (OSError, TypeError, ValueError):
        raise ValueError(
            f"{folder} is there without a {_MANIFEST} of this program; expected a folder of its "
            "own making, or none: move it away, or give another --out"
        ) from None


def build(package: Package, out: Path) -> Manifest:
    """Downloads, cleans and stores one package.

    Raises:
        OSError: it cannot be had, or the file system refuses.
        ValueError: it has no text where it is expected.
    """
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as name:
        partial = Path(name)
        version = fetch(package.name, partial / "package")
        texts = partial / package.name
        manifest = store(package, version, partial / "package" / "root", texts)
        texts.rename(out / package.name)
    return manifest


def fetch(package: str, folder: Path) -> str:
    """Downloads a package and unpacks it below `root`; returns its version.

    Raises:
        OSError: there is no apt, or it fails; with its reason.
    """
    folder.mkdir()
    _run(["apt-get", "download", package], folder)
    archives = list(folder.glob("*.deb"))
    if len(archives) != 1:
        raise OSError(f"apt-get download {package} left {len(archives)} packages; expected one")
    _run(["dpkg-deb", "-x", archives[0].name, "root"], folder)
    return _run(["dpkg-deb", "-f", archives[0].name, "Version"], folder).strip()


def store(package: Package, version: str, root: Path, folder: Path) -> Manifest:
    """Writes a package's texts, and their manifest last.

    Args:
        package: what to clean.
        version: that was found.
        root: where it was unpacked.
        folder: to be made; a text of the name a/b becomes a/b.txt there.

    Raises:
        ValueError: there is no text.
    """
    total, size, documents, left_out = hashlib.sha256(), 0, 0, 0
    for name, text in sorted(_named(package.texts(root))):
        if not is_prose(text):
            left_out += bool(text)
            continue
        raw = text.encode()
        path = folder / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
        total.update(raw)
        size += len(raw)
        documents += 1
    if not documents:
        raise ValueError(
            f"package {package.name} {version} has no text where version {package.version} has it"
        )
    manifest = Manifest(
        package.name, version, package.licence, documents, left_out, size, total.hexdigest()
    )
    written = json.dumps(dataclasses.asdict(manifest), indent=2)
    (folder / _MANIFEST).write_text(written + "\n")
    return manifest


def _named(texts: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The texts, once it is certain that none takes the name of another."""
    seen = set()
    for name, text in texts:
        if name in seen:
            raise ValueError(f"two texts are called {name!r}")
        seen.add(name)
        yield name, text


def _run(command: Sequence[str], folder: Path) -> str:
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(
            f"{command[0]} is missing: the corpus is made of Debian packages and needs a "
            "Debian-like system"
        )
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.startswith(("E:", "dpkg"))]
        reason = lines[-1] if lines else f"exit code {result.returncode}"
        raise OSError(f"{' '.join(command)} failed: {reason} (offline, or apt-get update needed?)")
    return result.stdout


def _line(manifest: Manifest) -> str:
    left_out = f", {manifest.left_out} left out" if manifest.left_out else ""
    return (
        f"  {manifest.package} {manifest.version}: {manifest.bytes / 1e6:.1f} MB in "
        f"{manifest.documents} texts{left_out}; {manifest.licence}"
    )


if __name__ == "__main__":
    run(main)
