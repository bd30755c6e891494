"""Where documents come from, which side of the split they are on, and how to name the result.

A corpus is read whole, as text, and everything that follows from it is a function of document
contents alone: a document's hash decides whether it is for training or validation, the same
hashes decide the order of packing, and a hash over all of them is the corpus fingerprint. Names,
dates and directory order have no say, so a renamed or copied folder is the same corpus, a changed
character is another one, and exact copies of a document can never lie on both sides of the split.
A larger validation fraction only moves documents from training to validation.

A text longer than `SECTION_CHARACTERS` counts as several documents, cut after line ends. A corpus
that is one large file then still splits, and one long text cannot swing the size of a side; the
price is that sections of one text may lie on both sides.

The trade-off is memory: a corpus of n characters needs a few times n bytes of it while the data
are prepared. That is right for the corpora of scaling studies on small models.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import logging
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt8

from qat.spelling import nearest

# N: tokens.

SECTION_CHARACTERS = 1 << 16

_LOG = logging.getLogger(__name__)
_HASH_BYTES = 16
_HASHES = 1 << 8 * _HASH_BYTES
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_READ_AT_ONCE = 1024  # records; one at a time is ten times slower


@dataclasses.dataclass(frozen=True)
class Source:
    """A named supply of documents.

    Attributes:
        name: the spelling `parse_source` accepts; recorded with prepared data.
        read: returns the raw documents, each the bytes of a UTF-8 text, in any order.
    """

    name: str
    read: Callable[[], Iterable[bytes]]


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and the hash of its content, which is all that decides where it goes."""

    digest: bytes
    text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of a source.

    Attributes:
        source: name of the source.
        documents: non-empty texts in packing order, which is fixed by their hashes.
        unreadable: raw documents left out because they are not UTF-8 text.
        empty: raw documents left out because they have no characters.
    """

    source: str
    documents: tuple[Document, ...]
    unreadable: int
    empty: int


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """How text becomes ids; a trained vocabulary would be another value of this type.

    Attributes:
        name: recorded with prepared data and part of the corpus fingerprint.
        vocabulary_size: ids are in [0, vocabulary_size).
        separator: the id after every document; `encode` never produces it.
        encode: text to ids, uint8, shape (N,).
        decode: ids of any window and integer type, separators included, to text.
    """

    name: str
    vocabulary_size: int
    separator: int
    encode: Callable[[str], UInt8[np.ndarray, " N"]]
    decode: Callable[[Integer[np.ndarray, " N"]], str]


def _encode_bytes(text: str) -> UInt8[np.ndarray, " N"]:
    """UTF-8 bytes; NUL characters are dropped, because NUL separates documents."""
    return np.frombuffer(text.replace("\0", "").encode(), np.uint8)


def _decode_bytes(tokens_N: Integer[np.ndarray, " N"]) -> str:
    """Text of the bytes; a character cut by the end of a window becomes U+FFFD."""
    return tokens_N.astype(np.uint8).tobytes().decode(errors="replace")


BYTES = Tokenizer("bytes", 256, 0, _encode_bytes, _decode_bytes)


def parse_source(spec: str, data_dir: str | Path | None = None) -> Source:
    """The source a string names.

    Args:
        spec: one of
            "stdlib", the .py files of the running interpreter's standard library without its
            tests and without installed packages;
            "folder:PATH", every file below PATH except hidden ones (a name that starts with a
            dot), whatever its suffix: a file is text if it is UTF-8 without a NUL byte, and any
            other file is counted as unreadable;
            "tfds:NAME[/CONFIG][#KEY]", feature KEY ("text" if not given) of the training split
            of a dataset that TFDS has already prepared in array_record. Nothing is downloaded:
            every process of a job reads the source.
        data_dir: the directory TFDS prepared datasets in; None is TFDS's own default.

    Raises:
        ValueError: the kind of source is unknown, or its argument is missing or superfluous.
    """
    kind, colon, argument = spec.partition(":")
    if kind not in _READERS:
        raise ValueError(
            f"unknown source {spec!r}; expected 'stdlib', 'folder:PATH' or "
            f"'tfds:NAME[/CONFIG][#KEY]'; nearest is {nearest(kind, _READERS)!r}"
        )
    if kind == "stdlib" and colon:
        raise ValueError(f"source {spec!r} takes no argument; expected 'stdlib'")
    if kind != "stdlib" and not argument:
        raise ValueError(f"source {spec!r} names nothing to read; expected '{kind}:...'")
    return Source(spec, functools.partial(_READERS[kind], argument, data_dir))


def read_corpus(source: Source) -> Corpus:
    """Reads all documents of a source and puts them in packing order.

    Raises:
        FileNotFoundError: the source's folder or dataset does not exist.
        ValueError: the source has no document with text, or contains the data directory.
    """
    texts: list[str] = []
    unreadable = empty = 0
    for raw in source.read():
        text = _text(raw)
        if text is None:
            unreadable += 1
            continue
        empty += not text
        texts.extend(_sections(text))
    if not texts:
        raise ValueError(
            f"source {source.name!r} has no text: {unreadable} unreadable and {empty} empty "
            "documents; expected at least one UTF-8 text"
        )
    if unreadable:
        _LOG.warning("%s: left out %d files that are not UTF-8 text", source.name, unreadable)
    return Corpus(source.name, _in_packing_order(texts), unreadable, empty)


def split(
    corpus: Corpus, validation_fraction: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Training and validation documents, each in packing order.

    Args:
        corpus: the documents.
        validation_fraction: share of all possible hashes that mean validation, in (0, 1); the
            share of the documents comes close to it when they are many.

    Raises:
        ValueError: the fraction is outside (0, 1).
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction {validation_fraction} is not in (0, 1)")
    sides: tuple[list[Document], list[Document]] = ([], [])
    threshold = validation_fraction * _HASHES
    for document in corpus.documents:
        sides[int.from_bytes(document.digest, "big") < threshold].append(document)
    return tuple(sides[0]), tuple(sides[1])


def fingerprint(corpus: Corpus, tokenizer: Tokenizer, validation_fraction: float) -> str:
    """Names the token streams of both sides of the split: 16 hexadecimal digits.

    It depends on the documents' contents in packing order, the tokenizer and the split rule, and
    on nothing else.
    """
    total = hashlib.blake2b(digest_size=8)
    total.update(f"{tokenizer.name} {float(validation_fraction)!r} ".encode())
    for document in corpus.documents:
        total.update(document.digest)
    return total.hexdigest()


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


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_HASH_BYTES).digest()


def _in_packing_order(texts: Iterable[str]) -> tuple[Document, ...]:
    """Sorts by a second hash, in which copies of a document differ by their count.

    Sorted by the digest alone, copies would stand side by side and share windows.
    """
    copies: collections.Counter[bytes] = collections.Counter()
    keyed = []
    for text in texts:
        document = Document(_hash(text.encode()), text)
        copy = copies[document.digest]
        copies[document.digest] += 1
        keyed.append((_hash(document.digest + copy.to_bytes(8, "big")), document))
    return tuple(document for _, document in sorted(keyed, key=lambda pair: pair[0]))


def _files(root: Path, skip_folder: Callable[[str], bool]) -> Iterator[Path]:
    def fail(error: OSError) -> None:  # os.walk passes over what it cannot list
        raise error

    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not skip_folder(name)]
        yield from (Path(folder) / name for name in names)


def _read_stdlib(argument: str, data_dir: str | Path | None) -> Iterator[bytes]:
    root = Path(sysconfig.get_path("stdlib"))
    files = _files(root, _NOT_STDLIB.__contains__)
    return (path.read_bytes() for path in files if path.suffix == ".py")


def _read_folder(argument: str, data_dir: str | Path | None) -> Iterator[bytes]:
    root = Path(argument).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"source 'folder:{argument}': {root} is not a folder")
    if data_dir and Path(data_dir).resolve().is_relative_to(root.resolve()):
        raise ValueError(f"data_dir {data_dir} lies in the corpus {root}, and would change it")
    files = _files(root, lambda name: name.startswith("."))
    return (p.read_bytes() for p in files if p.is_file() and not p.name.startswith("."))


def _read_tfds(argument: str, data_dir: str | Path | None) -> Iterator[bytes]:
    """Reads in batches of records, by TFDS's own reader, which needs no TensorFlow."""
    import tensorflow_datasets as tfds  # slow to import, and few corpora need it

    name, _, key = argument.partition("#")
    key = key or "text"
    try:
        records = tfds.data_source(name, split="train", data_dir=data_dir, download=False)
    except (AssertionError, NotImplementedError, ValueError) as error:
        where = f", data_dir={str(data_dir)!r}" if data_dir else ""
        raise FileNotFoundError(
            f"source 'tfds:{argument}': no training split in array_record; prepare it once with "
            f"tfds.builder({name!r}{where}, file_format='array_record').download_and_prepare()"
        ) from error
    texts = sorted(k for k, value in records[0].items() if isinstance(value, bytes))
    if key not in texts:
        raise ValueError(f"source 'tfds:{argument}': {key!r} is not one of its text keys, {texts}")
    starts = range(0, len(records), _READ_AT_ONCE)
    chunks = (range(s, min(s + _READ_AT_ONCE, len(records))) for s in starts)
    batches = map(records.__getitems__, chunks)
    return (record[key] for record in itertools.chain.from_iterable(batches))


_READERS: dict[str, Callable[[str, str | Path | None], Iterable[bytes]]] = {
    "stdlib": _read_stdlib,
    "folder": _read_folder,
    "tfds": _read_tfds,
}
