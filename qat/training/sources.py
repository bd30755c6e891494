"""Supplies of documents: the standard library, folders, JSON lines and TFDS datasets.

Whatever the supply, it is files on this machine and a way to read documents out of them one after
another, in an order that is fixed by the names of the files. So a corpus may be larger than
memory, and whether it has changed can be seen without reading it: `stamp` hashes what the file
system says of every file. Nothing is ever downloaded.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import os
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qat.spelling import nearest

_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_PIECE_BYTES = 1 << 24
_READ_AT_ONCE = 1024  # records of TFDS; one at a time is ten times slower
_SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system in use
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_EXPECTED = "'stdlib', 'folder:PATH', 'jsonl:PATH' or 'tfds:NAME[/CONFIG][#KEY]'"


@dataclasses.dataclass(frozen=True)
class Source:
    """A named supply of documents.

    Attributes:
        name: the spelling `parse_source` accepts; recorded with prepared data.
        read: returns the raw documents, each the bytes of a UTF-8 text, always in one order.
        files: returns the files they are read from; none if the documents come from elsewhere.
    """

    name: str
    read: Callable[[], Iterable[bytes]]
    files: Callable[[], Iterable[Path]] = tuple


def parse_source(spec: str, data_dir: str | Path | None = None) -> Source:
    """The source a string names; nothing is read yet.

    Args:
        spec: one of
            "stdlib", the .py files of the running interpreter's standard library without its
            tests and without installed packages;
            "folder:PATH", every file below PATH except hidden ones (a name that starts with a
            dot), whatever its suffix; a file of more than 16 MB counts as several texts, cut
            after line ends;
            "jsonl:PATH", one JSON object a line with the document under "text", as C4 and Dolma
            are distributed: a file, or all files below a folder that end in .json, .jsonl or
            .ndjson, each also with .gz or .zst behind it;
            "tfds:NAME[/CONFIG][#KEY]", feature KEY ("text" if not given) of the training split
            of a dataset that TFDS has already prepared in array_record.
        data_dir: the directory TFDS prepared datasets in; None is TFDS's own default.

    Raises:
        ValueError: the kind of source is unknown, or its argument is missing or superfluous.
    """
    kind, colon, argument = spec.partition(":")
    if kind not in _KINDS:
        raise ValueError(
            f"unknown source {spec!r}; expected {_EXPECTED}; nearest is {_nearest_source(spec)!r}"
        )
    if kind == "stdlib" and colon:
        raise ValueError(f"source {spec!r} takes no argument; expected 'stdlib'")
    if kind != "stdlib" and not argument:
        raise ValueError(f"source {spec!r} names nothing to read; expected '{kind}:...'")
    return _KINDS[kind](spec, argument, data_dir)


def stamp(source: Source) -> str | None:
    """A hash that changes with the documents, had without reading them: 32 hexadecimal digits.

    It covers the name of the source and of every file: path, inode, size, and the times of the
    last change of content and, which no program can set back, of the inode. None if there are no
    files to look at, or if one changed within the last two seconds: on a file system with a
    coarse clock it could change again without a sign.

    Raises:
        OSError: the files cannot be listed.
    """
    settled = time.time_ns() - _SETTLED_NS
    total = hashlib.blake2b(f"{source.name}\n".encode(), digest_size=16)
    changes = []
    for path in source.files():
        status = path.stat()
        seen = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        total.update(f"{path.absolute()}\0{seen}\n".encode())
        changes.append(status.st_ctime_ns)
    return total.hexdigest() if changes and max(changes) < settled else None


def _nearest_source(spec: str) -> str:
    """What may have been meant: an existing path with its kind in front, or a kind."""
    path = Path(spec)
    with contextlib.suppress(OSError):  # too long a name
        if spec and path.is_dir():
            return f"folder:{spec}"
        if path.is_file() and _is_json(path):
            return f"jsonl:{spec}"
    return nearest(spec.partition(":")[0], _KINDS)


def _stdlib(spec: str, argument: str, data_dir: str | Path | None) -> Source:
    root = Path(sysconfig.get_path("stdlib"))

    def files() -> Iterator[Path]:
        found = _walk(root, _NOT_STDLIB.__contains__)
        return (path for path in found if path.suffix == ".py")

    return Source(spec, lambda: (path.read_bytes() for path in files()), files)


def _folder(spec: str, argument: str, data_dir: str | Path | None) -> Source:
    root = Path(argument).expanduser()

    def files() -> Iterator[Path]:
        if not root.is_dir():
            raise FileNotFoundError(f"source {spec!r}: {root} is not a folder")
        _check_apart(root, data_dir)
        return _visible(root)

    return Source(spec, lambda: itertools.chain.from_iterable(map(_pieces, files())), files)


def _jsonl(spec: str, argument: str, data_dir: str | Path | None) -> Source:
    root = Path(argument).expanduser()

    def files() -> list[Path]:
        if not root.exists():
            raise FileNotFoundError(f"source {spec!r}: {root} does not exist")
        _check_apart(root, data_dir)
        found = [path for path in (_visible(root) if root.is_dir() else [root]) if _is_json(path)]
        if not found:
            raise ValueError(
                f"source {spec!r} has no file that ends in {', '.join(_JSON_SUFFIXES)}, "
                "or in these and .gz or .zst"
            )
        return found

    return Source(spec, lambda: itertools.chain.from_iterable(map(_texts_of_lines, files())), files)


def _tfds(spec: str, argument: str, data_dir: str | Path | None) -> Source:
    name, _, key = argument.partition("#")

    @functools.cache
    def records() -> Any:
        return _tfds_records(spec, name, data_dir)

    def files() -> Iterator[Path]:
        return map(Path, records().dataset_info.splits["train"].filepaths)

    return Source(spec, lambda: _texts_of_records(spec, records(), key or "text"), files)


def _walk(root: Path, skip_folder: Callable[[str], bool]) -> Iterator[Path]:
    """Files in the order of their names, folder by folder."""

    def fail(error: OSError) -> None:  # os.walk passes over what it cannot list
        raise error

    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = sorted(name for name in folders if not skip_folder(name))
        yield from (Path(folder) / name for name in sorted(names))


def _visible(root: Path) -> Iterator[Path]:
    files = _walk(root, lambda name: name.startswith("."))
    return (path for path in files if path.is_file() and not path.name.startswith("."))


def _check_apart(root: Path, data_dir: str | Path | None) -> None:
    if data_dir and Path(data_dir).resolve().is_relative_to(root.resolve()):
        raise ValueError(f"data_dir {data_dir} lies in the corpus {root}, and would change it")


def _pieces(path: Path) -> Iterator[bytes]:
    """A file in pieces that fit memory, cut after a line, or a word if there are no lines."""
    with path.open("rb") as file:
        start = 0
        while piece := file.read(_PIECE_BYTES):
            if len(piece) == _PIECE_BYTES:
                piece = piece[: piece.rfind(b"\n") + 1 or piece.rfind(b" ") + 1 or len(piece)]
                file.seek(start + len(piece))
            start += len(piece)
            yield piece
    if not start:
        yield b""


def _is_json(path: Path) -> bool:
    bare = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    return bare.suffix in _JSON_SUFFIXES


def _texts_of_lines(path: Path) -> Iterator[bytes]:
    number = 0
    try:
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                yield _text_of(line, f"{path} line {number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged after line {number}: {error}") from None


def _text_of(line: bytes, where: str) -> bytes:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: expected one JSON object; {error}") from None
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        found = f"the keys {', '.join(sorted(value))}" if isinstance(value, dict) else "no object"
        raise ValueError(f"{where}: expected an object with a string under 'text', found {found}")
    return text.encode(errors="surrogatepass")  # half a character is then no UTF-8


def _lines(path: Path) -> Iterator[bytes]:
    if path.suffix == ".zst":
        yield from _zst_lines(path)
        return
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        yield from file


def _zst_lines(path: Path) -> Iterator[bytes]:
    """Lines of one or several frames; the library's own reader does not notice a missing end."""
    try:
        import zstandard
    except ModuleNotFoundError:
        raise ValueError(f"{path}: .zst needs the package zstandard, which is missing") from None
    rest, decoder = b"", zstandard.ZstdDecompressor().decompressobj()
    try:
        with path.open("rb") as file:
            while chunk := decoder.unused_data or file.read(1 << 20):
                if decoder.eof:
                    decoder = zstandard.ZstdDecompressor().decompressobj()
                *lines, rest = (rest + decoder.decompress(chunk)).split(b"\n")
                yield from lines
    except zstandard.ZstdError as error:
        raise EOFError(error) from None
    if not decoder.eof:
        raise EOFError("the last frame has no end")
    yield rest


def _tfds_records(spec: str, name: str, data_dir: str | Path | None) -> Any:
    """Random access by TFDS's own reader, which needs no TensorFlow."""
    import tensorflow_datasets as tfds  # slow to import, and few corpora need it

    try:
        return tfds.data_source(name, split="train", data_dir=data_dir, download=False)
    except (AssertionError, NotImplementedError, ValueError) as error:
        where = f", data_dir={str(data_dir)!r}" if data_dir else ""
        raise FileNotFoundError(
            f"source {spec!r}: no training split in array_record; prepare it once with "
            f"tfds.builder({name!r}{where}, file_format='array_record').download_and_prepare() "
            "(which may need TensorFlow and apache-beam; reading does not)"
        ) from error


def _texts_of_records(spec: str, records: Any, key: str) -> Iterator[bytes]:
    texts = sorted(k for k, value in records[0].items() if isinstance(value, bytes))
    if key not in texts:
        raise ValueError(f"source {spec!r}: {key!r} is not one of its text keys, {texts}")
    for start in range(0, len(records), _READ_AT_ONCE):
        rows = records.__getitems__(range(start, min(start + _READ_AT_ONCE, len(records))))
        yield from (row[key] for row in rows)


_KINDS: dict[str, Callable[[str, str, str | Path | None], Source]] = {
    "stdlib": _stdlib,
    "folder": _folder,
    "jsonl": _jsonl,
    "tfds": _tfds,
}
