"""Checkpoints of the Llama family as shapes and parameters of our decoder.

The family is one decoder in several spellings. A `Format` is a spelling: how a kind of file names
settings and tensors, and in which order it keeps the channels of queries and keys. All that a file
says must be understood: a setting that would change the function, a missing, surplus or mis-shaped
tensor is an error before any tensor is read.

Rotation pairs channel c with c + C/2 here and in Hugging Face's files; llama.cpp pairs neighbours,
so GGUF files have the rows of queries and keys interleaved, which is undone. Kernels are (in, out)
here, (out, in) there. Queries, keys and values become one projection ordered by key-value head,
gate and up projection another. Where a checkpoint ties head and embedding, the head is a copy.

Tensors are read one by one into arrays that exist once: the peak is the float32 model and a layer.

Shapes: L layers, D width, V vocabulary, F width of the gated layer, K key-value heads, G queries
per key-value head, H = K · G heads, C channels of a head, O output channels.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.transformer import TransformerConfig
from qat.spelling import expected_one_of, nearest
from qat.training.step import Params

_FRACTIONS = ("rope_base", "norm_epsilon")  # the other settings are whole numbers


@dataclasses.dataclass(frozen=True)
class Format:
    """How files of one kind spell a model.

    Attributes:
        architectures: names of those that are this decoder.
        settings: field of `TransformerConfig` → name of the setting.
        defaults: value of a field whose setting may be left out; None is what `heads` says.
        context: name of the setting of the longest sequence in training.
        only: settings that may be there with one of these values alone.
        channels: settings that must be C where they are there.
        tensors: role → name; of a layer's, with "{}" for its index.
        ignored: pattern of the names of tensors that follow from the settings.
        interleaved: whether rotation pairs neighbouring channels.
    """

    architectures: tuple[str, ...]
    settings: Mapping[str, str]
    defaults: Mapping[str, float | None]
    context: str
    only: Mapping[str, tuple[Any, ...]]
    channels: tuple[str, ...]
    tensors: Mapping[str, str]
    ignored: str
    interleaved: bool


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened file or folder; none of its tensors is read yet.

    Attributes:
        path: for messages.
        format: its spelling.
        settings: by name.
        shapes: of its tensors, (out, in), by name.
        read: reads one by its name, any float dtype.
        tied: whether the head is the embedding.
        tokenizer: content of its tokenizer.json.
    """

    path: Path
    format: Format
    settings: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    tied: bool
    tokenizer: bytes

    @property
    def context_length(self) -> int:
        """The longest sequence in training, tokens; 0 if it is not said."""
        return int(self.settings.get(self.format.context) or 0)

    def tensor(self, role: str, layer: int = 0) -> np.ndarray:
        """One tensor, float32.

        Raises:
            ValueError: it has values that are not finite.
        """
        name = self.format.tensors[role].format(layer)
        values = np.asarray(self.read(name), np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"{self.path}: tensor {name} has values that are not finite")
        return values


def check_architecture(path: Path, form: Format, architecture: object) -> None:
    """Raises ValueError unless this is the name of a decoder of the family."""
    if architecture not in form.architectures:
        wrong = expected_one_of("architecture", architecture, form.architectures)
        raise ValueError(f"{path}: {wrong}")


def config_of(checkpoint: Checkpoint) -> TransformerConfig:
    """The shape of a checkpoint's decoder.

    Raises:
        ValueError: a setting is missing, wrong or not known.
    """
    path, form, settings = checkpoint.path, checkpoint.format, checkpoint.settings
    for name, allowed in form.only.items():
        if settings.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{path}: {name} = {settings[name]!r}: only {allowed[0]!r} is known")
    fields = {field: _setting(checkpoint, field) for field in form.settings}
    fields["kv_heads"] = fields["kv_heads"] or fields["heads"]
    if fields["head_width"] * fields["heads"] == fields["width"]:
        fields["head_width"] = 0
    rows, *_ = checkpoint.shapes.get(form.tensors["embed"], (1,))
    try:
        config = TransformerConfig(**{"vocabulary": rows, **fields}, sub_norms=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name in form.channels:
        if settings.get(name, config.channels) != config.channels:
            raise ValueError(f"{path}: {name} = {settings[name]!r}: expected {config.channels}")
    return config


def params_of(checkpoint: Checkpoint, config: TransformerConfig) -> Params:
    """The parameters of our decoder: float32 NumPy arrays.

    Raises:
        ValueError: a tensor is missing, too many, of another shape, damaged or not finite.
    """
    _check_tensors(checkpoint, config)
    embedding_VD = head_VD = np.array(checkpoint.tensor("embed"))
    if checkpoint.format.tensors["head"] in checkpoint.shapes:
        head_VD = checkpoint.tensor("head")
    if checkpoint.tied and not np.array_equal(head_VD, embedding_VD):
        raise ValueError(f"{checkpoint.path}: head and embedding differ, but are said to be tied")
    layers = (_block(checkpoint, config, layer) for layer in range(config.layers))
    return {
        "blocks": _stacked(layers, config.layers),
        "embed": {"embedding": embedding_VD},
        "head": {"kernel": head_VD.T.copy()},
        "norm": {"scale": np.array(checkpoint.tensor("norm"))},
    }


def _setting(checkpoint: Checkpoint, field: str) -> Any:
    form, name = checkpoint.format, checkpoint.format.settings[field]
    value = checkpoint.settings.get(name)
    if value is None and field in form.defaults:
        return form.defaults[field]
    expected = (int, float) if field in _FRACTIONS else int
    if isinstance(value, bool) or not isinstance(value, expected) or value <= 0:
        kind = "a number" if field in _FRACTIONS else "a whole number"
        raise ValueError(f"{checkpoint.path}: {name} = {value!r}: expected {kind} above 0")
    return value


def _expected(checkpoint: Checkpoint, config: TransformerConfig) -> Iterator[tuple[str, Any]]:
    """Name and shape of every tensor there must be."""
    width, gated, names = config.width, config.gated_width, checkpoint.format.tensors
    mixed, kept = config.attention_width, config.kv_heads * config.channels
    embedding = (config.vocabulary, width)
    yield names["embed"], embedding
    yield names["norm"], (width,)
    if not checkpoint.tied or names["head"] in checkpoint.shapes:
        yield names["head"], embedding
    layer = {
        "attention_norm": (width,),
        **{"q": (mixed, width), "k": (kept, width), "v": (kept, width), "out": (width, mixed)},
        "mlp_norm": (width,),
        **{"gate": (gated, width), "up": (gated, width), "down": (width, gated)},
    }
    for index in range(config.layers):
        yield from ((names[role].format(index), shape) for role, shape in layer.items())


def _check_tensors(checkpoint: Checkpoint, config: TransformerConfig) -> None:
    """Raises ValueError unless these are the tensors of this shape, none missing, none too many."""
    path, shapes, known = checkpoint.path, checkpoint.shapes, set()
    for name, shape in _expected(checkpoint, config):
        if name not in shapes:
            hint = f"; nearest is {nearest(name, shapes)!r}" if shapes else ""
            raise ValueError(f"{path}: tensor {name} is missing{hint}")
        if shapes[name] != shape:
            raise ValueError(f"{path}: tensor {name} has shape {shapes[name]}: expected {shape}")
        known.add(name)
    for name in sorted({*shapes} - known):
        if not re.fullmatch(checkpoint.format.ignored, name):
            raise ValueError(
                f"{path}: tensor {name} has no place in this decoder, whose projections have no "
                "biases and whose positions no scaling"
            )


def _stacked(layers: Iterator[Params], count: int) -> Params:
    """Layers as one tree of arrays with a leading axis L; holds one layer beside it."""
    first = next(layers)
    stack: Params = jax.tree.map(lambda part: np.empty((count, *part.shape), np.float32), first)
    for index, layer in enumerate(itertools.chain([first], layers)):
        jax.tree.map(lambda whole, part, at=index: np.copyto(whole[at], part), stack, layer)
    return stack


def _block(checkpoint: Checkpoint, config: TransformerConfig, layer: int) -> Params:
    """One layer's parameters."""

    def tensor(role: str) -> np.ndarray:
        return checkpoint.tensor(role, layer)

    def heads(role: str, rotated: bool) -> np.ndarray:
        x_OD, pairs = tensor(role), config.channels // 2
        if rotated and checkpoint.format.interleaved:
            x_OD = x_OD.reshape(-1, pairs, 2, config.width).swapaxes(1, 2)
        return x_OD.reshape(config.kv_heads, -1, config.channels, config.width)

    qkv_KNCD = np.concatenate([heads("q", True), heads("k", True), heads("v", False)], axis=1)
    gate_up_D2F = np.stack([tensor("gate").T, tensor("up").T], axis=1)
    return {
        "attention": {
            "qkv": {"kernel": np.moveaxis(qkv_KNCD, 3, 0)},
            "out": {"kernel": tensor("out").T},
        },
        "attention_norm": {"scale": tensor("attention_norm")},
        "mlp": {"gate_up": {"kernel": gate_up_D2F}, "down": {"kernel": tensor("down").T}},
        "mlp_norm": {"scale": tensor("mlp_norm")},
    }
