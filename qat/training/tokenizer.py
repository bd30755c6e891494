"""Text to token ids and back: bytes, or byte pairs.

A tokenizer is data: it is stored with the text that was prepared with it, so ids can be read again
without the file or the corpus it came from. Its separator follows every document; no text becomes
that id, and it decodes to a NUL character.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8

from qat.spelling import nearest
from qat.training import tokenizer_json
from qat.training.byte_pairs import BytePairs, BytePairsOfCorpus

# N: tokens.

_LARGEST = 1 << 24


@dataclasses.dataclass(frozen=True)
class Bytes:
    """UTF-8 bytes; NUL characters of a text are dropped, because NUL separates documents.

    Attributes:
        name: the spelling `parse_tokenizer` accepts.
        identity: names all that decides which ids a text becomes.
        vocabulary_size: ids are in [0, vocabulary_size).
        separator: the id after every document.
    """

    name: str = "bytes"
    identity: str = "bytes"
    vocabulary_size: int = 256
    separator: int = 0

    def fit(self, texts: Callable[[], Iterable[str]]) -> "Bytes":
        """Itself."""
        return self

    def encode(self, text: str) -> UInt8[np.ndarray, " N"]:
        """Ids of a text, uint8."""
        return np.frombuffer(text.replace("\0", "").encode(), np.uint8)

    def decode(self, tokens_N: Integer[np.ndarray, " N"]) -> str:
        """Text of any window; separators are NUL, and a cut character is U+FFFD."""
        return tokens_N.astype(np.uint8).tobytes().decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        """The name says it all."""
        return {"name": self.name}


Tokenizer = Bytes | BytePairs
Recipe = Tokenizer | BytePairsOfCorpus  # may have to see text first: `fit` makes the tokenizer


def parse_tokenizer(spec: str) -> Recipe:
    """The tokenizer a string names.

    Args:
        spec: "bytes"; "bpe:N", byte pairs of N ids learned from the training documents; or the
            path of a tokenizer.json of Hugging Face's `tokenizers` with byte-level byte pairs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown spelling, a size out of range, or a file of another kind of tokenizer.
    """
    kind, colon, size = spec.partition(":")
    if spec == "bytes":
        return Bytes()
    if spec.endswith(".json"):
        return tokenizer_json.read(Path(spec).expanduser(), spec)
    if kind == "bpe" and colon:
        if not size.isdecimal() or not 256 < int(size) <= _LARGEST:
            raise ValueError(
                f"tokenizer {spec!r}: expected 'bpe:N' with N from 257, which is every byte and "
                f"the separator, to {_LARGEST}"
            )
        return BytePairsOfCorpus(int(size))
    raise ValueError(
        f"unknown tokenizer {spec!r}; expected 'bytes', 'bpe:N' or the path of a tokenizer.json; "
        f"nearest is {nearest(spec, ['bytes', 'bpe:8192', 'tokenizer.json'])!r}"
    )


def from_json(value: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer whose `to_json` this is."""
    if value["name"] == "bytes":
        return Bytes()
    return BytePairs.from_json(value)
