"""Tiny checkpoints of the Llama family with random weights, and what they compute, in NumPy.

The oracle works on tensors as the files name them and knows nothing of the project's layouts. Its
rotation is complex multiplication of neighbouring channels, as llama.cpp's, or of channels half a
head apart, as Hugging Face's; GGUF's blocks are decoded here once more, from their specification.
"""

import dataclasses
import json

import gguf
import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file

BLOCK = 32  # numbers that share a scale


@dataclasses.dataclass(frozen=True)
class Shape:
    vocabulary: int = 330
    width: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    channels: int = 16
    gated: int = 96
    base: float = 50_000.0
    epsilon: float = 1e-3
    context: int = 128


def weights(shape, tied, seed=0):
    """Random tensors by role; those of layers also by index."""
    random = np.random.default_rng(seed)

    def matrix(rows, columns):
        return (random.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    def scale():
        return random.uniform(0.5, 1.5, shape.width).astype(np.float32)

    mixed, kept = shape.heads * shape.channels, shape.kv_heads * shape.channels
    width, gated = shape.width, shape.gated
    found = {"embed": matrix(shape.vocabulary, width) * 4, "norm": scale()}
    if not tied:
        found["head"] = matrix(shape.vocabulary, width)
    for layer in range(shape.layers):
        found |= {
            ("attention_norm", layer): scale(),
            ("q", layer): matrix(mixed, width) * 2,
            ("k", layer): matrix(kept, width) * 2,
            ("v", layer): matrix(kept, width),
            ("out", layer): matrix(width, mixed),
            ("mlp_norm", layer): scale(),
            ("gate", layer): matrix(gated, width),
            ("up", layer): matrix(gated, width),
            ("down", layer): matrix(width, gated),
        }
    return found


def logits(shape, tensors, tokens_T, neighbours):
    """Of every position, float64, shape (T, vocabulary)."""
    w = {role: np.asarray(tensor, np.float64) for role, tensor in tensors.items()}

    def normed(x, scale):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + shape.epsilon) * scale

    def rotated(x_TC):
        half = shape.channels // 2
        angle = np.outer(np.arange(len(x_TC)), shape.base ** (-np.arange(half) / half))
        a, b = (x_TC[:, ::2], x_TC[:, 1::2]) if neighbours else np.split(x_TC, 2, axis=1)
        z = (a + 1j * b) * np.exp(1j * angle)
        parts = np.stack([z.real, z.imag], axis=2 if neighbours else 1)
        return parts.reshape(x_TC.shape)

    def head(x_TD, role, layer, index):
        return x_TD @ w[role, layer][index * shape.channels : (index + 1) * shape.channels].T

    x = w["embed"][tokens_T]
    for layer in range(shape.layers):
        h, mixed = normed(x, w["attention_norm", layer]), []
        for query in range(shape.heads):
            kept = query * shape.kv_heads // shape.heads
            q, k = rotated(head(h, "q", layer, query)), rotated(head(h, "k", layer, kept))
            scores = np.where(np.tri(len(x), dtype=bool), q @ k.T / shape.channels**0.5, -np.inf)
            share = np.exp(scores - scores.max(axis=1, keepdims=True))
            share /= share.sum(axis=1, keepdims=True)
            mixed.append(share @ head(h, "v", layer, kept))
        x = x + np.concatenate(mixed, axis=1) @ w["out", layer].T
        h = normed(x, w["mlp_norm", layer])
        gate, up = h @ w["gate", layer].T, h @ w["up", layer].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["down", layer].T
    return normed(x, w["norm"]) @ w.get("head", w["embed"]).T


def learned_tokenizer(pre_tokenizer=None, alphabet="", size=300):
    """Byte pairs of a little text by `tokenizers`; a given alphabet leaves out other bytes."""
    pre = tokenizers.pre_tokenizers
    digits = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(False)])
    learned = tokenizers.Tokenizer(tokenizers.models.BPE())
    learned.pre_tokenizer = pre_tokenizer or digits
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=list(alphabet) or pre.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        show_progress=False,
    )
    learned.train_from_iterator([__doc__] * 2, trainer)
    return learned


GGUF_NAMES = {
    **{"embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"},
    **{"attention_norm": "blk.{}.attn_norm.weight", "mlp_norm": "blk.{}.ffn_norm.weight"},
    **{role: f"blk.{{}}.attn_{role}.weight" for role in "qkv"},
    "out": "blk.{}.attn_output.weight",
    **{role: f"blk.{{}}.ffn_{role}.weight" for role in ("gate", "up", "down")},
}
HUGGING_FACE_NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    **{role: f"model.layers.{{}}.self_attn.{role}_proj.weight" for role in "qkv"},
    "out": "model.layers.{}.self_attn.o_proj.weight",
    **{role: f"model.layers.{{}}.mlp.{role}_proj.weight" for role in ("gate", "up", "down")},
}


def named(tensors, names):
    """By the names of a kind of file."""
    pairs = ((role if isinstance(role, tuple) else (role, 0), x) for role, x in tensors.items())
    return {names[role].format(layer): x for (role, layer), x in pairs}


def decoded(x, kind):
    """What a tensor is once it was stored as this type of GGUF; vectors are F32 there."""
    if x.ndim == 1 or kind == "F32":
        return x
    if kind == "F16":
        return x.astype(np.float16).astype(np.float32)
    stored = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind])
    size = {"Q8_0": 2 + BLOCK, "Q4_1": 4 + BLOCK // 2}[kind]
    blocks = stored.reshape(-1, size)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        return (blocks[:, 2:].view(np.int8) * scale).reshape(x.shape)
    least = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return (codes.astype(np.float32) * scale + least).reshape(x.shape)


def write_gguf(path, shape, tensors, kind="F32", learned=None, pre="smollm", **changes):
    """A GGUF file; `changes` of settings by their last word, None leaves one out."""
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    settings = {
        "block_count": shape.layers,
        "context_length": shape.context,
        "embedding_length": shape.width,
        "feed_forward_length": shape.gated,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.channels,
        "rope.dimension_count": shape.channels,
        "rope.freq_base": shape.base,
        "attention.layer_norm_rms_epsilon": shape.epsilon,
    }
    for name, value in {**settings, **changes}.items():
        if isinstance(value, float):
            writer.add_float32(f"llama.{name}", value)
        elif isinstance(value, str):
            writer.add_string(f"llama.{name}", value)
        elif value is not None:
            writer.add_uint32(f"llama.{name}", value)
    add_tokenizer(writer, learned or learned_tokenizer(), pre)
    for name, x in named(tensors, GGUF_NAMES).items():
        stored = gguf.GGMLQuantizationType["F32" if x.ndim == 1 else kind]
        writer.add_tensor(name, gguf.quants.quantize(x, stored), raw_dtype=stored)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return path


def add_tokenizer(writer, learned, pre):
    content = json.loads(learned.to_str())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    special = {each["content"] for each in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])


def write_folder(folder, shape, tensors, dtype="float32", files=1, learned=None, **changes):
    """A folder as transformers writes it; `changes` of config.json, None leaves a key out."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.gated,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.channels,
        "hidden_act": "silu",
        "rms_norm_eps": shape.epsilon,
        "rope_theta": shape.base,
        "rope_scaling": None,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": "head" not in tensors,
    }
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    (learned or learned_tokenizer()).save(str(folder / "tokenizer.json"))
    stored = {
        name: x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        for name, x in named(tensors, HUGGING_FACE_NAMES).items()
    }
    if files == 1:
        save_file(stored, folder / "model.safetensors")
        return folder
    parts = [f"model-{index + 1:05}-of-{files:05}.safetensors" for index in range(files)]
    where = {name: parts[index % files] for index, name in enumerate(sorted(stored))}
    for part in parts:
        save_file({n: x for n, x in stored.items() if where[n] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder
