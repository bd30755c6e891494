"""Byte-level byte-pair encoding: learned with `tokenizers`, applied with `tiktoken`.

What is kept of a learned encoding is the byte string of every id, in the order in which pairs were
merged, and the pattern that cuts text into words. From these two `tiktoken` makes the same ids as
`tokenizers` several times faster; decoding needs neither library.

Some encodings have no id for bytes that their corpus never had, such as control characters. As in
`tokenizers`, such bytes are left out; but here what stood on both sides of one in a word does not
merge, so the same text may become other ids.
"""

import base64
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt

# N: tokens.

# How GPT-2 cuts text into words: contractions, letters, digits and signs each with one space
# before them, and runs of white space.
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The same where every digit is a word of its own, without the space before it.
WORDS_AND_DIGITS = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""
)
_BYTES = [bytes([value]) for value in range(256)]


@dataclasses.dataclass(frozen=True)
class BytePairs:
    """Byte-level byte-pair encoding.

    Attributes:
        name: the spelling `parse_tokenizer` accepts.
        tokens: the byte string of every id, empty for special ones; pairs merge in this order.
        words: regular expression of what is encoded together.
        separator: the id after every document, which no text becomes.
    """

    name: str
    tokens: tuple[bytes, ...] = dataclasses.field(repr=False)
    words: str
    separator: int

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, the separator's and special ones included."""
        return len(self.tokens)

    @functools.cached_property
    def identity(self) -> str:
        """A hash of tokens, words and separator."""
        return _hash({**self.to_json(), "name": "byte pairs"})

    def fit(self, texts: Callable[[], Iterable[str]]) -> "BytePairs":
        """Itself."""
        return self

    def encode(self, text: str) -> UInt[np.ndarray, " N"]:
        """Ids of a text, of the smallest unsigned type that holds them all."""
        ids_N: UInt[np.ndarray, " N"] = self._encoding.encode_to_numpy(text, disallowed_special=())
        if self._without_id:
            ids_N = ids_N[ids_N < len(self.tokens)]
        return ids_N.astype(np.min_scalar_type(len(self.tokens) - 1))

    def decode(self, tokens_N: Integer[np.ndarray, " N"]) -> str:
        """Text of any window; separators are NUL, and a cut character is U+FFFD."""
        parts = (b"\0" if i == self.separator else self.tokens[i] for i in tokens_N.tolist())
        return b"".join(parts).decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        """Tokens in base64, since they are no text by themselves."""
        tokens = [base64.b64encode(token).decode() for token in self.tokens]
        words, separator = self.words, self.separator
        return {"name": self.name, "tokens": tokens, "words": words, "separator": separator}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "BytePairs":
        """The encoding whose `to_json` this is."""
        tokens = tuple(base64.b64decode(token) for token in value["tokens"])
        return cls(value["name"], tokens, value["words"], value["separator"])

    @functools.cached_property
    def _without_id(self) -> list[bytes]:
        """Bytes that are no token."""
        tokens = set(self.tokens)
        return [byte for byte in _BYTES if byte not in tokens]

    @functools.cached_property
    def _encoding(self) -> Any:
        """Bytes without an id get one behind all others."""
        import tiktoken

        tokens = enumerate([*self.tokens, *self._without_id])
        return tiktoken.Encoding(
            self.name,
            pat_str=self.words,
            mergeable_ranks={token: i for i, token in tokens if token},
            special_tokens={},
        )


@dataclasses.dataclass(frozen=True)
class BytePairsOfCorpus:
    """Byte pairs still to be learned.

    Attributes:
        vocabulary_size: number of ids, that of the separator included.
    """

    vocabulary_size: int

    @property
    def name(self) -> str:
        """The spelling `parse_tokenizer` accepts."""
        return f"bpe:{self.vocabulary_size}"

    @property
    def identity(self) -> str:
        """A hash of all that decides the merges, but for the text."""
        return _hash({"byte pairs of the corpus": self.vocabulary_size, "words": WORDS})

    def fit(self, texts: Callable[[], Iterable[str]]) -> BytePairs:
        """Learns the merges, which depend on the texts but not on their order.

        Raises:
            ValueError: the texts have too few pairs.
        """
        import tokenizers

        learned = tokenizers.Tokenizer(tokenizers.models.BPE())
        learned.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self.vocabulary_size - 1,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        learned.train_from_iterator(texts(), trainer)
        ids = learned.get_vocab()
        if len(ids) < self.vocabulary_size - 1:
            raise ValueError(
                f"tokenizer {self.name!r}: the corpus has pairs for {len(ids) + 1} ids only; "
                f"expected a larger corpus, or at most 'bpe:{len(ids) + 1}'"
            )
        tokens = [bytes_of(token) for token in sorted(ids, key=ids.__getitem__)]
        return BytePairs(self.name, (*tokens, b""), WORDS, len(tokens))


def bytes_of(token: str) -> bytes:
    """The bytes that the characters of a byte-level token stand for.

    Raises:
        ValueError: a character stands for none.
    """
    alphabet = _alphabet()
    if unknown := [character for character in token if character not in alphabet]:
        raise ValueError(f"the token {token!r}, whose {unknown[0]!r} is no byte")
    return bytes(alphabet[character] for character in token)


@functools.cache
def _alphabet() -> dict[str, int]:
    """Printable characters of Latin-1 stand for themselves, the others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    signs = {chr(byte): byte for byte in printable}
    return signs | {chr(256 + i): byte for i, byte in enumerate(others)}


def _hash(value: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
