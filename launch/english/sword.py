"""Text of SWORD modules with compressed text: the drivers zText and zCom.

A testament is three files. `.?zz` holds zlib streams; `.?zs` has 12 bytes a stream, its offset and
size there, and its size unpacked; `.?zv` has a record a verse, the stream, and the offset and size
in what it unpacks to, all little-endian. The size is 2 bytes or, in newer modules, 4. Entries that
many verses share are stored once. The text is OSIS, a kind of XML.
"""

import html
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from launch.english.tidy import tidy

_STREAM = struct.Struct("<III")
_VERSES = (struct.Struct("<III"), struct.Struct("<IIH"))
_DROPPED = re.compile(r"<note\b.*?</note>|<figure\b.*?</figure>", re.DOTALL)
_BREAK = re.compile(r"<(?:div|title|/title|row|lg|l|p|lb|chapter)\b[^>]*>")
_TAG = re.compile(r"<[^>]*>")


def module_texts(folder: Path) -> Iterator[tuple[str, str]]:
    """The name and clean text of every stream, which is a book or a chapter.

    Raises:
        ValueError: a file is damaged.
    """
    for testament in ("ot", "nt"):
        for index in sorted(folder.glob(f"{testament}.?zs")):
            if index.stat().st_size:
                yield from _testament(index, testament)


def osis_text(source: str) -> str:
    """The text of OSIS markup, without notes."""
    lines = _BREAK.sub("\n", _DROPPED.sub("", source.replace("</cell>", " ")))
    text = html.unescape(_TAG.sub("", lines)).replace("¶", "")
    return tidy("\n".join(" ".join(line.split()) for line in text.split("\n")))


def _testament(index: Path, testament: str) -> Iterator[tuple[str, str]]:
    streams = list(_STREAM.iter_unpack(index.read_bytes()))
    packed = index.with_suffix(index.suffix[:-1] + "z").read_bytes()
    verses = index.with_suffix(index.suffix[:-1] + "v").read_bytes()
    entries = _entries(index, verses, [size for _, _, size in streams])
    for number, (offset, size, _) in enumerate(streams):
        try:
            unpacked = zlib.decompress(packed[offset : offset + size])
        except zlib.error as error:
            raise ValueError(f"{index}: stream {number} is damaged: {error}") from None
        parts = (unpacked[start : start + size] for start, size in sorted(entries[number]))
        yield f"{testament}-{number:03}", osis_text(b"\n".join(parts).decode(errors="replace"))


def _entries(index: Path, verses: bytes, sizes: list[int]) -> list[set[tuple[int, int]]]:
    """Start and size of the entries of every stream, by the records that fit all streams.

    What a module says of itself does not tell which of the two records it has.
    """
    for record in _VERSES:
        if len(verses) % record.size:
            continue
        found = [each for each in record.iter_unpack(verses) if each[2]]
        if all(stream < len(sizes) and a + size <= sizes[stream] for stream, a, size in found):
            entries: list[set[tuple[int, int]]] = [set() for _ in sizes]
            for stream, start, size in found:
                entries[stream].add((start, size))
            return entries
    raise ValueError(f"{index}: its verses are not those of its streams")
