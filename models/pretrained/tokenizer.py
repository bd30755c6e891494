"""The tokenizer of a GGUF file as a tokenizer.json, which `qat.training.tokenizer` reads.

Both list the same: tokens, merges in their order, special tokens, and how text is cut into words,
which GGUF only names. One file beside the converted model then serves this project's data
pipeline, Hugging Face's `tokenizers` and everybody else, and there is one reader that checks it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.spelling import expected_one_of

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PARTS = ("model", "pre", "tokens", "merges", "token_type")
_NORMAL, _USER_DEFINED = 1, 4  # kinds of tokens; all others are special


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _sequence(first: dict[str, Any], use_regex: bool) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [first, _byte_level(use_regex)]}


_WORDS = {  # how text is cut, by GGUF's name
    "gpt-2": _byte_level(use_regex=True),
    "smollm": _sequence({"type": "Digits", "individual_digits": True}, use_regex=True),
    "llama-bpe": _sequence(
        {
            "type": "Split",
            "pattern": {"Regex": _LLAMA_3},
            "behavior": "Isolated",
            "invert": False,
        },
        use_regex=False,
    ),
}


def from_gguf(fields: Mapping[str, Any], path: Path) -> bytes:
    """The content of a tokenizer.json.

    Args:
        fields: settings of a GGUF file.
        path: of the file, for messages.

    Raises:
        ValueError: a part is missing, or it is another kind of tokenizer.
    """
    part = {name: fields.get(f"tokenizer.ggml.{name}") for name in _PARTS}
    for name, known in (("model", ("gpt2",)), ("pre", tuple(_WORDS))):
        if part[name] not in known:
            wrong = expected_one_of(f"tokenizer.ggml.{name}", part[name], known)
            raise ValueError(f"{path}: {wrong}")
    tokens, merges, kinds = (_list(part[name], name, path) for name in _PARTS[2:])
    if len(kinds) != len(tokens):
        raise ValueError(
            f"{path}: {len(tokens)} tokens have {len(kinds)} tokenizer.ggml.token_type"
        )
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(index, token, kind != _USER_DEFINED)
            for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind != _NORMAL
        ],
        "normalizer": None,
        "pre_tokenizer": _WORDS[str(part["pre"])],
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": part["pre"] == "llama-bpe",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _list(value: Any, name: str, path: Path) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{path}: expected a list tokenizer.ggml.{name} with entries")
    return value


def _added(index: int, token: str, special: bool) -> dict[str, Any]:
    return {
        "id": index,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }
