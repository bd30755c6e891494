"""Batches of text: a pure function of (seed, step).

`prepare` reads a source of documents, packs it once into a TFDS dataset and returns its windows.
A window is S = T + 1 tokens: T inputs and, shifted by one, their T targets. Windows do not
overlap, every document is followed by a separator, and attention may look across it, as is usual
in pretraining. The dataset's directory is named after source, sequence length and corpus
fingerprint, so a changed corpus is another dataset and never a stale one; the price is reading
the source at every start (0.1 s for the standard library). `load` does without the source.

`train_batches` shuffles with grain: an index permutation per epoch, computed and not stored, so
any step can be had at once and resuming is exact. Of P processes, process p holds rows p, p + P,
p + 2P, … of the batch that a single process would hold: the batch of a step does not depend on P,
and a run may resume on another number of hosts. grain handles indices, NumPy gathers the rows of
a batch at once; 32 windows of 129 tokens take 0.3 ms, so nothing is prefetched.

TFDS is imported when `prepare` or `load` runs, not with this module.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Int32, UInt8

from qat.training import corpus

# B: windows of one process's part of a batch; N: windows of a side of the split;
# S = T + 1: tokens of a window, T inputs and their T targets.


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """One side of the split, packed.

    Attributes:
        records: token ids, uint8, shape (N, T + 1), in packing order.
        documents: how many documents they were packed from.
        dropped_tokens: how many tokens followed the last whole window, and are left out.
    """

    records: UInt8[np.ndarray, "N S"]
    documents: int
    dropped_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that one pass trains or evaluates on: N·T targets."""
        return self.records[:, 1:].size


@dataclasses.dataclass(frozen=True, eq=False)
class TextDataset:
    """Prepared text.

    Attributes:
        directory: where it is stored.
        source: name of the source it was prepared from.
        fingerprint: identifies contents, tokenizer and split; goes into every result.
        tokenizer: name of the tokenizer.
        vocabulary_size: ids are in [0, vocabulary_size).
        sequence_length: T.
        validation_fraction: share of the documents' hashes that mean validation.
        train: windows to train on.
        validation: windows of other documents.
        unreadable_documents: how many were left out because they are not UTF-8 text.
        empty_documents: how many were left out because they have no characters.
    """

    directory: Path
    source: str
    fingerprint: str
    tokenizer: str
    vocabulary_size: int
    sequence_length: int
    validation_fraction: float
    train: Windows
    validation: Windows
    unreadable_documents: int
    empty_documents: int

    def epochs(self, tokens: int) -> float:
        """Passes over the training windows that a budget of training tokens takes."""
        return tokens / self.train.tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Batches by step.

    Attributes:
        dataset: grain dataset whose element `step` is the batch of that step.
        start_step: where every iteration starts.
    """

    dataset: grain.MapDataset
    start_step: int = 0

    def batch_at(self, step: int) -> Int32[np.ndarray, "B S"]:
        """The batch of a step: token ids, int32, shape (B, T + 1).

        Raises:
            IndexError: there is no such step.
        """
        if not 0 <= step < len(self.dataset):
            raise IndexError(f"step {step} is not in [0, {len(self.dataset)})")
        return np.asarray(self.dataset[step])

    def __len__(self) -> int:
        """Number of steps, counted from 0; practically endless for training."""
        return len(self.dataset)

    def __iter__(self) -> Iterator[Int32[np.ndarray, "B S"]]:
        return map(self.batch_at, range(self.start_step, len(self)))


def prepare(
    source: str | corpus.Source = "stdlib",
    sequence_length: int = 128,
    data_dir: str | Path | None = None,
    *,
    tokenizer: corpus.Tokenizer = corpus.BYTES,
    validation_fraction: float = 0.05,
    process_index: int = 0,
    wait_seconds: float = 600.0,
) -> TextDataset:
    """Packs a corpus, once per contents, and opens the result.

    In a job of several processes each calls this; process 0 writes and the others wait for its
    result in `data_dir`, which they must share. Processes that read different documents (with
    another Python's standard library, say) wait in vain, and fail.

    Args:
        source: see `corpus.parse_source`; or a `corpus.Source`.
        sequence_length: T, tokens.
        data_dir: where prepared datasets are kept and "tfds:" sources are found; None is TFDS's
            default (TFDS_DATA_DIR, else ~/tensorflow_datasets).
        tokenizer: text to ids.
        validation_fraction: see `corpus.split`.
        process_index: of this process in the job.
        wait_seconds: how long the other processes wait for process 0.

    Raises:
        FileNotFoundError: the folder or dataset of the source does not exist.
        TimeoutError: process 0 did not deliver.
        ValueError: a bad argument, no text, or a side of the split shorter than one window.
    """
    from qat.training import packed_text

    if sequence_length < 1:
        raise ValueError(f"sequence_length {sequence_length} is not at least 1")
    if isinstance(source, str):
        source = corpus.parse_source(source, data_dir)
    documents = corpus.read_corpus(source)
    fingerprint = corpus.fingerprint(documents, tokenizer, validation_fraction)
    name = re.sub(r"[^A-Za-z0-9]+", "-", source.name).strip("-")[-80:]
    path = packed_text.directory(data_dir, f"{name}-t{sequence_length}-{fingerprint}")
    if not packed_text.is_prepared(path):
        train, validation = corpus.split(documents, validation_fraction)
        dataset = TextDataset(
            directory=path,
            source=source.name,
            fingerprint=fingerprint,
            tokenizer=tokenizer.name,
            vocabulary_size=tokenizer.vocabulary_size,
            sequence_length=sequence_length,
            validation_fraction=validation_fraction,
            train=_pack(train, tokenizer, sequence_length, "train"),
            validation=_pack(validation, tokenizer, sequence_length, "validation"),
            unreadable_documents=documents.unreadable,
            empty_documents=documents.empty,
        )
        if process_index == 0:
            _write(dataset)
        else:
            packed_text.wait(path, wait_seconds)
    return load(path)


def load(directory: str | Path) -> TextDataset:
    """Opens a prepared dataset by its directory, without reading its source.

    Raises:
        FileNotFoundError: no prepared dataset lies there.
    """
    from qat.training import packed_text

    records, metadata = packed_text.read(Path(directory))
    for name, records_NS in records.items():
        metadata[name] = Windows(records_NS, **metadata[name])
    return TextDataset(directory=Path(directory), **metadata)


def train_batches(
    dataset: TextDataset,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Endless shuffled batches of training windows, reshuffled every epoch.

    Args:
        dataset: prepared text.
        batch_size: windows in a batch of the whole job.
        seed: of the order of windows, at least 0.
        start_step: where iteration starts, for instance the first step after a checkpoint.
        process_index: of this process in the job.
        process_count: processes of the job; each holds ``B = batch_size / process_count`` rows,
            row b being row ``b * process_count + process_index`` of the batch of one process.

    Raises:
        ValueError: an argument is out of range, `process_count` does not divide `batch_size`,
            or the windows do not fill one batch.
    """
    _check_batch(dataset.train, batch_size, process_index, process_count)
    if min(seed, start_step) < 0:
        raise ValueError(f"seed {seed} and start_step {start_step} must both be at least 0")
    order = grain.MapDataset.range(len(dataset.train.records)).seed(seed).shuffle().repeat()
    mine = order[process_index::process_count]
    return _batches(mine, dataset.train, batch_size // process_count, start_step)


def validation_batches(
    dataset: TextDataset,
    batch_size: int,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Batches of validation windows in packing order; the windows after the last are left out.

    Args:
        dataset: prepared text.
        batch_size: windows in a batch of the whole job.
        limit: at most this many batches; None is all.
        process_index: of this process in the job.
        process_count: processes of the job; they share the rows as in `train_batches`.

    Raises:
        ValueError: as `train_batches`, or `limit` is not positive.
    """
    _check_batch(dataset.validation, batch_size, process_index, process_count)
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} is not at least 1 batch")
    steps = len(dataset.validation.records) // batch_size
    order = grain.MapDataset.range(min(steps, limit or steps) * batch_size)
    mine = order[process_index::process_count]
    return _batches(mine, dataset.validation, batch_size // process_count, start_step=0)


def _batches(order: grain.MapDataset, side: Windows, size: int, start_step: int) -> Batches:
    # drop_remainder has grain count batches in integers; floats overflow for an endless dataset.
    rows = order.batch(size, drop_remainder=True)
    return Batches(rows.map(lambda rows_B: side.records[rows_B].astype(np.int32)), start_step)


def _check_batch(side: Windows, batch_size: int, process_index: int, process_count: int) -> None:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in [0, {process_count})")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} is not a positive multiple of {process_count} processes"
        )
    if batch_size > len(side.records):
        raise ValueError(
            f"batch_size {batch_size} exceeds the {len(side.records)} windows there are; "
            "expected a smaller batch, a shorter sequence or a larger corpus"
        )


def _pack(
    documents: Sequence[corpus.Document], tokenizer: corpus.Tokenizer, length: int, name: str
) -> Windows:
    window = length + 1
    separator = np.asarray([tokenizer.separator], np.uint8)
    parts = [part for each in documents for part in (tokenizer.encode(each.text), separator)]
    tokens = np.concatenate([separator[:0], *parts])
    if tokens.size < window:
        raise ValueError(
            f"the {name} side has {tokens.size} tokens in {len(documents)} documents; expected at "
            f"least one window of {window} tokens: more documents or a shorter sequence"
        )
    whole = tokens.size // window * window
    return Windows(tokens[:whole].reshape(-1, window), len(documents), tokens.size - whole)


def _write(dataset: TextDataset) -> None:
    from qat.training import packed_text

    metadata = dataclasses.asdict(dataset)
    path = metadata.pop("directory")
    records = {name: metadata[name].pop("records") for name in ("train", "validation")}
    packed_text.write(path, records, metadata)
