"""A converted model in a folder, which appears whole or not at all.

pretrained.json says what it is, tokenizer.json is in Hugging Face's format, params.safetensors
holds the parameters as `qat.storage` keeps them, with checksums. Each of the three names the other
two by hashes, or is named by them, so parts of different models are never taken for one.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path

import jax
import numpy as np

from models.pretrained.gguf import open_gguf
from models.pretrained.llama import config_of, params_of
from models.pretrained.safetensors import CONFIG, TOKENIZER, open_folder
from models.transformer import TransformerConfig
from qat import storage
from qat.training import tokenizer_json
from qat.training.byte_pairs import BytePairs
from qat.training.results import hash_of
from qat.training.sharding import path_name
from qat.training.step import Params

DESCRIPTION, PARAMS = "pretrained.json", "params.safetensors"


@dataclasses.dataclass(frozen=True)
class Description:
    """What a converted model is.

    Attributes:
        source: name of the file or folder it was read from.
        context_length: the longest sequence in training, tokens; 0 if unknown.
        config: shape of the decoder.
        tokenizer: identity of the tokenizer.
        weights: hash of the parameters.
    """

    source: str
    context_length: int
    config: TransformerConfig
    tokenizer: str
    weights: str

    @property
    def identity(self) -> str:
        """A hash of all that is said here."""
        return hash_of(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A model as it was read.

    Attributes:
        description: what it is.
        params: of `models.transformer`, float32 NumPy arrays.
        tokenizer_json: content of its tokenizer.json.
    """

    description: Description
    params: Params
    tokenizer_json: bytes


def read(path: str | os.PathLike[str]) -> Pretrained:
    """Reads a model of the Llama family.

    Args:
        path: a GGUF file, or a folder with config.json, tokenizer.json and *.safetensors.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: it is damaged, or not a model that our decoder and tokenizers can be.
    """
    path = Path(path)
    if path.is_dir() and not (path / CONFIG).exists():
        raise FileNotFoundError(f"{path} has no {CONFIG}: expected that, or a GGUF file")
    checkpoint = open_folder(path) if path.is_dir() else open_gguf(path)
    config = config_of(checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        copied = Path(scratch, TOKENIZER)
        copied.write_bytes(checkpoint.tokenizer)
        tokenizer = tokenizer_json.read(copied, f"of {path}")
    if tokenizer.vocabulary_size > config.vocabulary:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocabulary_size} ids, its separator included, "
            f"and the embedding {config.vocabulary} rows; expected as many at least"
        )
    params = params_of(checkpoint, config)
    description = Description(
        path.resolve().name,
        checkpoint.context_length,
        config,
        tokenizer.identity,
        _hash(params),
    )
    return Pretrained(description, params, checkpoint.tokenizer)


def write(folder: str | os.PathLike[str], pretrained: Pretrained) -> None:
    """Keeps a model in a folder, which must be new or empty.

    Raises:
        FileExistsError: there is something in it.
        OSError: it cannot be written.
    """
    folder = Path(folder).absolute()
    check_free(folder)
    description = pretrained.description
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new = Path(scratch, folder.name)
        tree = {"identity": description.identity, "params": pretrained.params}
        storage.save(new / PARAMS, tree)
        (new / TOKENIZER).write_bytes(pretrained.tokenizer_json)
        content = {**dataclasses.asdict(description), "identity": description.identity}
        (new / DESCRIPTION).write_text(json.dumps(content, indent=2) + "\n")
        new.rename(folder)


def check_free(folder: str | os.PathLike[str]) -> None:
    """Raises FileExistsError unless a folder is new or empty."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder; choose another")


def is_pretrained(folder: str | os.PathLike[str]) -> bool:
    """Whether `write` made a folder."""
    return Path(folder, DESCRIPTION).is_file()


def describe(folder: str | os.PathLike[str]) -> Description:
    """What a folder says it holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    path = Path(folder, DESCRIPTION)
    try:
        fields = json.loads(path.read_bytes())
        identity = fields.pop("identity")
        config = TransformerConfig(**fields.pop("config"))
        description = Description(config=config, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}; convert the model again") from None
    if identity != description.identity:
        raise ValueError(f"{path} is damaged: its identity differs; convert the model again")
    return description


def load(folder: str | os.PathLike[str]) -> tuple[TransformerConfig, Params, BytePairs]:
    """Opens what `write` made: shape, parameters as JAX arrays, tokenizer.

    The tokenizer's name is the path of its tokenizer.json, as `data.tokenizer` of a config takes.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is damaged, or belongs to another model.
    """
    folder, description = Path(folder), describe(folder)
    tokenizer = tokenizer_json.read(folder / TOKENIZER, str(folder / TOKENIZER))
    stored = storage.load(folder / PARAMS)
    for name, identity, expected in (
        (TOKENIZER, tokenizer.identity, description.tokenizer),
        (PARAMS, stored["identity"], description.identity),
    ):
        if identity != expected:
            raise ValueError(f"{folder / name} belongs to another model than {DESCRIPTION} says")
    return description.config, stored["params"], tokenizer


def _hash(params: Params) -> str:
    """Of names, shapes and bits."""
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{path_name(path)} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()
