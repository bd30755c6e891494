"""Text that a model writes itself, to be learned from where there is no other.

As in LLM-QAT (Liu et al., arXiv 2305.17888, section 2.1): every sequence begins with one token of
the vocabulary, each id once before any comes twice; the next three to five are the most likely
ones, so that the text begins as the model would begin it; the others are drawn from the model's
distribution, so that texts differ.

A batch is a pure function of the model, the settings and its number. It is kept in a file of its
own until all are there, then all are packed into a dataset as prepared text is, and the files go.
So a process that is killed goes on with the batch it was at, and text that is there is not written
again. Processes of one job share the batches out.
"""

import io
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt

from launch.checkpoints import Checkpoint
from launch.progress import Meter
from models.generation import Sampling, generate
from models.task import model_of
from models.transformer import Transformer
from qat.training import packed_text
from qat.training.data import TextDataset, load
from qat.training.files import write_whole
from qat.training.processes import agree
from qat.training.results import hash_of

# B: sequences of a batch; T: tokens that the model adds; S = T + 1: tokens of a sequence.


def written(
    teacher: Checkpoint, dataset: TextDataset, settings: Mapping[str, Any], data_dir: Path
) -> TextDataset:
    """Text that a model has written, prepared like any other.

    Args:
        teacher: the model, which writes in full precision.
        dataset: text of the same tokenizer and sequence length, split in the same proportion.
        settings: see `configs.distill`, `writing`.
        data_dir: where prepared text is kept.

    Raises:
        ValueError: a setting is out of range.
        OSError: a file cannot be written.
    """
    _check(settings)
    length, fraction = dataset.sequence_length, dataset.validation_fraction
    identity = {"by": teacher.fingerprint, "tokens": length, "split": fraction, **settings}
    key = hash_of(identity)
    path = packed_text.directory(data_dir, f"written-t{length}-{key}")
    if not packed_text.is_prepared(path):
        parts = data_dir / f"writing.{key}"
        _write_parts(parts, teacher, settings, length)
        agree(lambda: _pack(path, parts, teacher, dataset, settings, key))
    return load(path)


def _check(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting out of range."""
    for name, lowest in (("sequences", 2), ("batch_size", 1), ("seed", 0)):
        if not lowest <= settings[name] < 2**32:
            raise ValueError(f"writing.{name} = {settings[name]}: expected at least {lowest}")
    greedy = settings["greedy"]
    if len(greedy) != 2 or not 0 <= greedy[0] <= greedy[1]:
        raise ValueError(f"writing.greedy = {greedy}: expected (least, most), such as (3, 5)")


def _write_parts(
    folder: Path, teacher: Checkpoint, settings: Mapping[str, Any], length: int
) -> None:
    """This process's batches, those that are not there yet."""
    model = model_of(teacher.config, None, teacher.params)
    size = settings["batch_size"]
    count = -(-settings["sequences"] // size)
    with Meter("Writing", count * size, "sequences") as meter:
        for index in range(jax.process_index(), count, jax.process_count()):
            path = _part(folder, index)
            if path.exists():
                meter.skip(size)
                continue
            buffer = io.BytesIO()
            np.save(buffer, batch_of(model, settings, index, length))
            write_whole(path, buffer.getvalue())
            meter.advance(size)


def batch_of(
    model: Transformer, settings: Mapping[str, Any], index: int, length: int
) -> UInt[np.ndarray, "B S"]:
    """Sequences of a batch, by its number."""
    size, vocabulary = settings["batch_size"], model.config.vocabulary
    key = jax.random.fold_in(jax.random.key(settings["seed"]), index)
    numbers_B = np.arange(index * size, (index + 1) * size)
    starts_B = np.random.default_rng(settings["seed"]).permutation(vocabulary)
    starts_B1 = starts_B[numbers_B % vocabulary][:, None]
    greedy_key, draw_key = jax.random.split(key)
    least, most = settings["greedy"]
    greedy_B = jax.random.randint(greedy_key, (size,), least, most + 1)
    sampling = Sampling(settings["temperature"], settings["top_k"])
    added = generate(model, starts_B1, length, sampling, draw_key, greedy_B=greedy_B)
    tokens_BS = np.concatenate([starts_B1, np.asarray(added.tokens_BN)], axis=1)
    return tokens_BS.astype(np.min_scalar_type(vocabulary - 1))  # as prepared text is kept


def _pack(
    path: Path,
    parts: Path,
    teacher: Checkpoint,
    dataset: TextDataset,
    settings: Mapping[str, Any],
    key: str,
) -> int:
    """Makes the dataset of the parts, and removes them."""
    count = settings["sequences"]
    validation = min(count - 1, max(1, round(count * dataset.validation_fraction)))

    def documents() -> Iterator[tuple[str, UInt[np.ndarray, " S"]]]:
        for number, tokens_S in enumerate(_sequences(parts, settings)):
            yield "validation" if number < validation else "train", tokens_S

    packed_text.write(
        path,
        documents(),
        dataset.sequence_length + 1,
        teacher.config.vocabulary,
        {
            "source": f"written:{teacher.name}",
            "fingerprint": key,
            "tokenizer": dataset.tokenizer.to_json(),
            "sequence_length": dataset.sequence_length,
            "validation_fraction": dataset.validation_fraction,
            "unreadable_documents": 0,
            "empty_documents": 0,
        },
    )
    shutil.rmtree(parts, ignore_errors=True)
    return 0


def _sequences(parts: Path, settings: Mapping[str, Any]) -> Iterator[UInt[np.ndarray, " S"]]:
    """As many as were asked for, in the order of their batches."""
    count, size = settings["sequences"], settings["batch_size"]
    for index in range(-(-count // size)):
        yield from np.load(_part(parts, index))[: count - index * size]


def _part(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.npy"
