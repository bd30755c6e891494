"""The packages of the English corpus, and where in each of them the prose is.

All are free to use; most are under the GPL or the GFDL, so the corpus is for training on, and not
for passing on. What is left out is in other languages, made of tables, an index to the rest or a
second copy of it.
"""

import dataclasses
import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.english import dictionary, markup, pod, sword
from launch.english.tidy import tidy

Texts = Iterator[tuple[str, str]]
"""Name and clean text of every document; an empty text is left out."""


@dataclasses.dataclass(frozen=True)
class Package:
    """A Debian package with English text.

    Attributes:
        name: of the package.
        version: the one its cleaner was made for.
        licence: of the text.
        texts: documents in the folder the package was unpacked to.
    """

    name: str
    version: str
    licence: str
    texts: Callable[[Path], Texts]


def _html(pages: str, *without: str) -> Callable[[Path], Texts]:
    """Pages below a folder, but for the paths that contain one of the strings."""

    def texts(root: Path) -> Texts:
        folder = root / pages
        for path in sorted(folder.rglob("*.html")):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if not any(each in f"/{name}/" for each in without):
                yield name, markup.html_text(path.read_text(errors="replace"))

    return texts


def _pod(root: Path) -> Texts:
    skipped = ("perlcn", "perljp", "perlko", "perltw", "perltoc", "perluniprops", "perlmodlib")
    for path in sorted(root.glob("usr/share/perl/*/pod/*.pod")):
        if path.stem not in skipped:
            yield path.stem, pod.pod_text(path.read_text(errors="replace"))


def _dictionary(path: str, clean: Callable[[str], str]) -> Callable[[Path], Texts]:
    def texts(root: Path) -> Texts:
        with gzip.open(root / path) as file:
            yield Path(path).name.split(".")[0], clean(file.read().decode(errors="replace"))

    return texts


def _sword(folder: str) -> Callable[[Path], Texts]:
    return lambda root: sword.module_texts(root / "usr/share/sword/modules" / folder)


def _kernel(root: Path) -> Texts:
    """Its pages, and the plain texts that have none: descriptions of devices."""
    documents = root / "usr/share/doc/linux-doc-6.1"
    left_out = ("/translations/", "/genindex/", "/search/", "/process/maintainers/")
    yield from _html("usr/share/doc/linux-doc-6.1/html", *left_out)(root)
    for path in sorted((documents / "Documentation").rglob("*.txt*")):
        name = path.relative_to(documents).as_posix().removesuffix(".gz").removesuffix(".txt")
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if "/translations/" not in name:
            yield name, tidy(raw.decode(errors="replace"))


PACKAGES = (
    Package(
        "dict-gcide",
        "0.48.5+nmu2",
        "GPL-2+",
        _dictionary("usr/share/dictd/gcide.dict.dz", dictionary.gcide_text),
    ),
    Package("linux-doc-6.1", "6.1.192-2", "GPL-2", _kernel),
    Package("sword-comm-tdavid", "2.1-1", "public domain", _sword("comments/zcom/tdavid")),
    Package("anarchism", "15.3-3", "GFDL-1.1+ or GPL-2+", _html("usr/share/doc/anarchism/html")),
    Package(
        "python3.11-doc",
        "3.11.2-6+deb12u9",
        "PSF-2",
        _html("usr/share/doc/python3.11/html", "/genindex", "/search/", "/py-modindex/"),
    ),
    Package("sword-comm-mhcc", "2.0-1", "public domain", _sword("comments/zcom/mhcc")),
    Package("perl-doc", "5.36.0-7+deb12u4", "Artistic or GPL-1+", _pod),
    Package(
        "dict-foldoc",
        "20230119-1",
        "GFDL-1.1+",
        _dictionary("usr/share/dictd/foldoc.dict.dz", dictionary.foldoc_text),
    ),
    Package("sword-text-kjv", "14.3-1", "GPL-3+", _sword("texts/ztext/engKJV2006eb")),
    Package(
        "postgresql-doc-15",
        "15.20-0+deb12u1",
        "PostgreSQL",
        _html("usr/share/doc/postgresql-doc-15/html", "/bookindex/"),
    ),
    Package(
        "sqlite3-doc",
        "3.40.1-2+deb12u2",
        "public domain",
        _html("usr/share/doc/sqlite3", "/c3ref/", "/releaselog/", "/requirements/", "_crossref/"),
    ),
    Package("sword-text-web", "426.0-1", "public domain", _sword("texts/ztext/engWEB2015eb")),
    Package("r-doc-html", "4.2.2.20221110-2", "GPL-2+", _html("usr/share/R/doc/manual")),
    Package(
        "dict-jargon",
        "4.4.7-3.1",
        "public domain",
        _dictionary("usr/share/dictd/jargon.dict.dz", dictionary.foldoc_text),
    ),
    Package("git-doc", "1:2.39.5-0+deb12u3", "GPL-2", _html("usr/share/doc/git-doc")),
)
