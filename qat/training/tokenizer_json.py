"""A tokenizer.json of Hugging Face's `tokenizers`, if it is byte-level byte-pair encoding.

Its parts are checked one by one: a normalizer, another way to cut words or to merge would give
other ids than those the file is meant to give, so such a file is refused, with the reason.

The separator is the file's own token for the end of a text, or a further id if it has none of the
usual name. Special tokens spelled out in a document are ordinary text.
"""

import json
from pathlib import Path
from typing import Any

from qat.training.byte_pairs import WORDS, WORDS_AND_DIGITS, BytePairs, bytes_of

_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_NEEDED = {bytes([value]) for value in (*b"\t\n", *range(0x20, 0x7F))}


def read(path: Path, name: str) -> BytePairs:
    """From a tokenizer.json, whose parts are checked one by one: another kind gives other ids."""
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {name!r}: there is no file {path}")
    try:
        parts = json.loads(path.read_bytes())
        model, added = parts["model"], parts["added_tokens"]
        if reason := _why_not(parts):
            raise ValueError(f"it has {reason}")
        special = {each["id"]: each["content"] for each in added}
        ids: dict[str, int] = {t: i for t, i in model["vocab"].items() if i not in special}
        merges = [each.split(" ") if isinstance(each, str) else each for each in model["merges"]]
        merged = [ids["".join(pair)] for pair in merges]
        tokens = [b""] * (max([*ids.values(), *special]) + 1)
        for token, i in ids.items():
            tokens[i] = bytes_of(token)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"tokenizer {name!r} is damaged: {error!r}") from None
    except ValueError as error:
        raise ValueError(
            f"tokenizer {name!r} is not byte-level byte-pair encoding: {error}"
        ) from None
    base = {i for i, token in enumerate(tokens) if len(token) == 1}
    ordered = merged == sorted(merged) and base | set(merged) == set(ids.values())
    if not ordered or not set(tokens) >= _NEEDED:
        raise ValueError(
            f"tokenizer {name!r}: expected ids for all bytes of ASCII text, and one further id for "
            "every merge, in the order of the merges"
        )
    ends = [i for name in _SEPARATORS for i, content in special.items() if content == name]
    if not ends:
        tokens.append(b"")
    separator = ends[0] if ends else len(tokens) - 1
    return BytePairs(name, tuple(tokens), _words(parts["pre_tokenizer"]), separator)


def _why_not(parts: dict[str, Any]) -> str:
    """What of a tokenizer.json `tiktoken` could not do alike; "" if nothing."""
    model = parts["model"]
    if model["type"] != "BPE":
        return f"a model of type {model['type']}"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            return f"{key} {model[key]!r}"
    if model.get("unk_token") and len([t for t in model["vocab"] if len(t) == 1]) < 256:
        return f"unk_token {model['unk_token']!r} and no ids for some bytes"
    if parts["normalizer"]:
        return f"a normalizer, {parts['normalizer'].get('type')}"
    if plain := [each["content"] for each in parts["added_tokens"] if not each["special"]]:
        return f"an added token that is not special, {plain[0]!r}"
    return "" if _words(parts["pre_tokenizer"]) else "no ByteLevel pre-tokenizer, or more than that"


def _words(pre_tokenizer: Any) -> str:
    """The pattern of a byte-level pre-tokenizer; "" for any other."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return WORDS
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            ],
        }:
            return WORDS_AND_DIGITS
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": str(pattern)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return ""
