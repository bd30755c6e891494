"""Documents in reading order, the side of the split each is on, and what identifies them all.

A corpus is a stream that is read as often as needed and never held: once to survey it, once for a
sample if a tokenizer is to be learned, once to pack it. A document's hash decides whether it is
for training or validation, so exact copies can never lie on both sides, and a larger validation
fraction only moves documents from training to validation. The hash over all hashes, in reading
order, is the corpus's identity: a changed, added or moved document makes another corpus, while
dates, and the folder it lies in, have no say.

A text longer than `SECTION_CHARACTERS` counts as several documents, cut after line ends. A corpus
that is one large file then still splits, and one long text cannot swing the size of a side; the
price is that sections of one text may lie on both sides.

Surveys are kept by the files' `sources.stamp`, so an unchanged corpus is recognised without being
read, however large it is.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from qat.training import sources
from qat.training.files import write_whole
from qat.training.sources import Source

SECTION_CHARACTERS = 1 << 16

_LOG = logging.getLogger(__name__)
_HASH_BYTES = 16
_HASHES = 1 << 8 * _HASH_BYTES


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, the hash of its content, and where that lies among all hashes, in [0, 1]."""

    text: str
    digest: bytes
    position: float


@dataclasses.dataclass(frozen=True)
class Survey:
    """What one reading of a corpus finds.

    Attributes:
        content: a hash over all documents in reading order.
        documents: how many have text.
        characters: how many they have.
        unreadable: raw documents left out because they are not UTF-8 text.
        empty: raw documents left out because they have no characters.
    """

    content: str
    documents: int
    characters: int
    unreadable: int
    empty: int


class Content:
    """The running hash over documents."""

    def __init__(self) -> None:
        self._total = hashlib.blake2b(digest_size=_HASH_BYTES)

    def watch(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Passes documents on, and counts them in."""
        for document in documents:
            self._total.update(document.digest)
            yield document

    def __str__(self) -> str:
        return self._total.hexdigest()


def documents(source: Source) -> Iterator[Document]:
    """All documents with text, in reading order.

    Raises:
        OSError, ValueError: the source cannot be read.
    """
    texts = filter(None, map(_text, source.read()))
    return (_document(section) for text in texts for section in _sections(text))


def survey(source: Source, folder: Path) -> Survey:
    """Reads a corpus, unless a survey of the same unchanged files is kept.

    Args:
        source: the corpus.
        folder: where surveys are kept.

    Raises:
        OSError, ValueError: the source cannot be read, or has no document with text.
    """
    stamp = sources.stamp(source)
    kept = folder / f"{stamp}-{SECTION_CHARACTERS}.json"
    if stamp and kept.exists():
        return Survey(**json.loads(kept.read_text()))
    surveyed = _survey(source)
    if stamp and stamp == sources.stamp(source):
        write_whole(kept, json.dumps(dataclasses.asdict(surveyed)))
    return surveyed


def is_validation(document: Document, fraction: float) -> bool:
    """Whether a document is for validation.

    Args:
        document: one of a corpus.
        fraction: share of all possible hashes that mean validation; the share of the documents
            comes close to it when they are many.
    """
    return document.position < fraction


def sample(source: Source, surveyed: Survey, fraction: float, characters: int) -> Iterator[str]:
    """Texts of the training side, about so many characters: those with the largest hashes.

    Args:
        source: the corpus.
        surveyed: its survey.
        fraction: see `is_validation`.
        characters: of the sample; the whole side if it has no more.
    """
    start = max(fraction, 1 - characters / surveyed.characters)
    return (each.text for each in documents(source) if each.position >= start)


def _survey(source: Source) -> Survey:
    counts = {"unreadable": 0, "empty": 0, "documents": 0, "characters": 0}

    def found() -> Iterator[Document]:
        for text in map(_text, source.read()):
            if not text:
                counts["unreadable" if text is None else "empty"] += 1
                continue
            counts["characters"] += len(text)
            for section in _sections(text):
                counts["documents"] += 1
                yield _document(section)

    content = Content()
    for _ in content.watch(found()):
        pass
    surveyed = Survey(str(content), **counts)
    if not surveyed.documents:
        raise ValueError(
            f"source {source.name!r} has no text: {surveyed.unreadable} unreadable and "
            f"{surveyed.empty} empty documents; expected at least one UTF-8 text"
        )
    if surveyed.unreadable:
        _LOG.warning(
            "%s: left out %d documents that are not UTF-8 text", source.name, surveyed.unreadable
        )
    return surveyed


def _text(raw: bytes) -> str | None:
    """None for what is not UTF-8, or has a NUL byte and so is binary by git's rule."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _sections(text: str) -> Iterator[str]:
    """Cuts after the last line end within SECTION_CHARACTERS, or there if a line is longer."""
    start = 0
    while len(text) - start > SECTION_CHARACTERS:
        limit = start + SECTION_CHARACTERS
        end = text.rfind("\n", start, limit) + 1 or limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _document(text: str) -> Document:
    digest = hashlib.blake2b(text.encode(), digest_size=_HASH_BYTES).digest()
    return Document(text, digest, int.from_bytes(digest, "big") / _HASHES)
