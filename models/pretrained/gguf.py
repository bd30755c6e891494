"""GGUF, the file of llama.cpp (github.com/ggml-org/ggml, docs/gguf.md), by its own package `gguf`.

A file holds settings, a tokenizer and tensors, which are read from a memory map one at a time.
Those in blocks of 32 numbers (Q8_0: a scale, Q4_1: a scale and an offset) become the float32 values
that their codes stand for; the codes themselves are not kept.
"""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from models.pretrained import tokenizer
from models.pretrained.llama import Checkpoint, Format, check_architecture

FORMAT = Format(
    architectures=("llama",),
    settings={
        "width": "llama.embedding_length",
        "layers": "llama.block_count",
        "heads": "llama.attention.head_count",
        "kv_heads": "llama.attention.head_count_kv",
        "head_width": "llama.attention.key_length",
        "mlp_width": "llama.feed_forward_length",
        "rope_base": "llama.rope.freq_base",
        "norm_epsilon": "llama.attention.layer_norm_rms_epsilon",
    },
    defaults={"kv_heads": None, "head_width": 0, "rope_base": 10_000.0},
    context="llama.context_length",
    only={
        "llama.rope.scaling.type": ("none",),
        "llama.expert_count": (0,),
        "split.count": (1, 0),
    },
    channels=("llama.rope.dimension_count", "llama.attention.value_length"),
    tensors={
        "embed": "token_embd.weight",
        "norm": "output_norm.weight",
        "head": "output.weight",
        "attention_norm": "blk.{}.attn_norm.weight",
        "q": "blk.{}.attn_q.weight",
        "k": "blk.{}.attn_k.weight",
        "v": "blk.{}.attn_v.weight",
        "out": "blk.{}.attn_output.weight",
        "mlp_norm": "blk.{}.ffn_norm.weight",
        "gate": "blk.{}.ffn_gate.weight",
        "up": "blk.{}.ffn_up.weight",
        "down": "blk.{}.ffn_down.weight",
    },
    ignored="",
    interleaved=True,
)
TYPES = ("F32", "F16", "Q8_0", "Q4_1")


def open_gguf(path: Path) -> Checkpoint:
    """Opens a file.

    Raises:
        OSError: it cannot be read.
        ValueError: the package is not installed, the file is damaged, or holds another
            architecture, type of numbers or tokenizer than those known.
    """
    reader = _reader(path)
    from gguf import quants

    fields = {name: _content(field) for name, field in reader.fields.items()}
    check_architecture(path, FORMAT, fields.get("general.architecture"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for tensor in tensors.values():
        if tensor.tensor_type.name not in TYPES:
            raise ValueError(
                f"{path}: tensor {tensor.name} has type {tensor.tensor_type.name}: expected one of "
                f"{', '.join(TYPES)}"
            )

    def read(name: str) -> np.ndarray:
        return quants.dequantize(tensors[name].data, tensors[name].tensor_type)

    return Checkpoint(
        path=path,
        format=FORMAT,
        settings=fields,
        shapes={name: tuple(map(int, each.shape[::-1])) for name, each in tensors.items()},
        read=read,
        tied=FORMAT.tensors["head"] not in tensors,
        tokenizer=tokenizer.from_gguf(fields, path),
    )


def _reader(path: Path) -> Any:
    """The package's reader of a whole file.

    Raises:
        OSError, ValueError: see `open_gguf`.
    """
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise ValueError(
            f"{path}: reading GGUF needs the package gguf: pip install -e '.[pretrained]'"
        ) from None
    try:
        reader = GGUFReader(path)
    except OSError:
        raise
    except Exception as error:  # the package raises anything where bytes are not what it expects
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
        raise ValueError(
            f"{path}: expected a whole GGUF file of version 2 or 3; {reason}"
        ) from error
    if reader.byte_order == "S":
        raise ValueError(f"{path}: its numbers are big-endian, expected little-endian")
    return reader


def _content(field: Any) -> Any:
    """The value of a setting; of a float32 the shortest number that rounds to it."""
    value = field.contents()
    return float(str(field.parts[-1][0])) if isinstance(value, float) else value
