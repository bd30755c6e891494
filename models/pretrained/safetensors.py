"""Folders as Hugging Face's `transformers` writes them: config.json and *.safetensors.

Tensors lie in model.safetensors, or in several files that model.safetensors.index.json lists. They
are read from memory maps one at a time, without torch.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from models.pretrained.llama import Checkpoint, Format, check_architecture

FORMAT = Format(
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    settings={
        "vocabulary": "vocab_size",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_width": "head_dim",
        "mlp_width": "intermediate_size",
        "rope_base": "rope_theta",
        "norm_epsilon": "rms_norm_eps",
    },
    defaults={"kv_heads": None, "head_width": 0, "rope_base": 10_000.0, "norm_epsilon": 1e-6},
    context="max_position_embeddings",
    only={
        "hidden_act": ("silu",),
        "rope_scaling": (None,),
        "rope_type": ("default",),
        "sliding_window": (None,),
    },
    channels=(),
    tensors={
        "embed": "model.embed_tokens.weight",
        "norm": "model.norm.weight",
        "head": "lm_head.weight",
        "attention_norm": "model.layers.{}.input_layernorm.weight",
        "q": "model.layers.{}.self_attn.q_proj.weight",
        "k": "model.layers.{}.self_attn.k_proj.weight",
        "v": "model.layers.{}.self_attn.v_proj.weight",
        "out": "model.layers.{}.self_attn.o_proj.weight",
        "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
        "gate": "model.layers.{}.mlp.gate_proj.weight",
        "up": "model.layers.{}.mlp.up_proj.weight",
        "down": "model.layers.{}.mlp.down_proj.weight",
    },
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    interleaved=False,
)
TYPES = ("F32", "F16", "BF16")
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def open_folder(folder: Path) -> Checkpoint:
    """Opens a folder.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is damaged, or holds another architecture or type of numbers than those
            known.
    """
    settings = _json(folder / CONFIG)
    settings |= settings.get("rope_parameters") or {}
    architecture, *_ = settings.get("architectures") or [None]
    check_architecture(folder / CONFIG, FORMAT, architecture)
    tensors = {name: opened for path in _files(folder) for name, opened in _tensors(path).items()}
    return Checkpoint(
        path=folder,
        format=FORMAT,
        settings=settings,
        shapes={name: shape for name, (shape, _) in tensors.items()},
        read=lambda name: tensors[name][1](),
        tied=bool(settings.get("tie_word_embeddings")),
        tokenizer=(folder / TOKENIZER).read_bytes(),
    )


def _files(folder: Path) -> list[Path]:
    if not (folder / _INDEX).exists():
        return [folder / _WHOLE]
    names = _json(folder / _INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(f"{folder / _INDEX}: expected a weight_map from tensors to files")
    return [folder / name for name in sorted({*names.values()})]


def _tensors(path: Path) -> dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
    """Shape and reader of each tensor of a file."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb"):  # where it cannot be read, the error names it
        pass
    try:
        file = safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file; {error}") from None
    for name, each in slices.items():
        if each.get_dtype() not in TYPES:
            raise ValueError(
                f"{path}: tensor {name} has type {each.get_dtype()}: expected one of "
                f"{', '.join(TYPES)}"
            )
    return {
        name: (tuple(each.get_shape()), functools.partial(file.get_tensor, name))
        for name, each in slices.items()
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON; {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object of JSON")
    return content
