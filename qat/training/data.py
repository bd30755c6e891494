"""Batches of text: a pure function of (seed, step, row).

`prepare` reads a source of documents, packs it once into a TFDS dataset and returns its windows.
A window is S = T + 1 tokens: T inputs and, shifted by one, their T targets. Windows do not
overlap, every document is followed by a separator, and attention may look across it, as is usual
in pretraining. Documents are packed in the order they are read, so that a corpus may be larger
than memory; windows are drawn in shuffled order, for training and for validation. The dataset's
directory is named after source, sequence length, contents, tokenizer and split, so a changed
corpus is another dataset and never a stale one. `load` does without the source.

`train_batches` shuffles with grain: an index permutation per epoch, computed and not stored, so
any step can be had at once and resuming is exact. Row r of the batch of a step is element
`step · batch_size + r` of the shuffled windows, however many processes there are; each asks for
the rows it needs, and a run may resume on another number of hosts. 32 windows of 129 tokens take
0.3 ms, so nothing is prefetched.

TFDS is imported when `prepare` or `load` runs, not with this module.
"""

import dataclasses
import hashlib
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grain
import numpy as np
from jaxtyping import Int32, UInt

from qat.training import corpus, sources
from qat.training.tokenizer import Recipe, Tokenizer, from_json, parse_tokenizer

if TYPE_CHECKING:
    from qat.training.packed_text import Rows

# B: windows of a batch, or of the rows asked for; N: windows of a side of the split;
# S = T + 1: tokens of a window, T inputs and their T targets; M: tokens of a document.

SAMPLE_CHARACTERS = 100_000_000  # that a tokenizer is learned from

_ENCODED_AT_ONCE = 256  # documents
_SECONDS_BETWEEN_REPORTS = 15.0


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """One side of the split, packed.

    Attributes:
        records: ``records[rows_B]`` are token ids, unsigned integers of shape (B, T + 1);
            an array of shape (N, T + 1), or on disk if that is larger than a gigabyte.
        documents: how many documents they were packed from.
        dropped_tokens: how many tokens followed the last whole window, and are left out.
    """

    records: "Rows"
    documents: int
    dropped_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that one pass trains or evaluates on: N·T targets."""
        windows, tokens = self.records.shape
        return windows * (tokens - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class TextDataset:
    """Prepared text.

    Attributes:
        directory: where it is stored.
        source: name of the source it was prepared from.
        fingerprint: identifies contents, token ids and split; goes into every result.
        tokenizer: decodes windows.
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
    tokenizer: Tokenizer
    sequence_length: int
    validation_fraction: float
    train: Windows
    validation: Windows
    unreadable_documents: int
    empty_documents: int

    @property
    def vocabulary_size(self) -> int:
        """Ids are in [0, vocabulary_size)."""
        return self.tokenizer.vocabulary_size

    def epochs(self, tokens: int) -> float:
        """Passes over the training windows that a budget of training tokens takes."""
        return tokens / self.train.tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Batches by step.

    Attributes:
        records: see `Windows`.
        order: grain dataset of window indices, a batch after the other.
        batch_size: windows in a batch of the whole job.
    """

    records: "Rows"
    order: grain.MapDataset
    batch_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of a whole batch, (batch_size, T + 1)."""
        return self.batch_size, self.records.shape[1]

    def batch_at(self, step: int, rows: slice = slice(None)) -> Int32[np.ndarray, "B S"]:
        """Rows of the batch of a step: token ids, int32, shape (B, T + 1).

        Args:
            step: counted from 0.
            rows: which of the `batch_size` rows; all if not given.

        Raises:
            IndexError: there is no such step.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is not in [0, {len(self)})")
        first = step * self.batch_size
        windows = [self.order[first + row] for row in range(self.batch_size)[rows]]
        return self.records[np.asarray(windows, np.int64)].astype(np.int32)

    def __len__(self) -> int:
        """Number of steps, counted from 0; practically endless for training."""
        return len(self.order) // self.batch_size

    def __iter__(self) -> Iterator[Int32[np.ndarray, "B S"]]:
        return map(self.batch_at, range(len(self)))


def prepare(
    source: str | sources.Source = "stdlib",
    sequence_length: int = 128,
    data_dir: str | Path | None = None,
    *,
    tokenizer: str | Tokenizer = "bytes",
    validation_fraction: float | None = 0.05,
    process_index: int = 0,
    wait_seconds: float = 600.0,
    on_progress: Callable[[str], None] = lambda line: None,
) -> TextDataset:
    """Packs a corpus, once per contents, and opens the result.

    In a job of several processes each calls this; process 0 writes and the others wait for its
    result in `data_dir`, which they must share. Processes that read different documents (with
    another Python's standard library, say) wait in vain, and fail. A corpus that takes longer
    than `wait_seconds` is better prepared beforehand by one process.

    Args:
        source: see `sources.parse_source`; or a `sources.Source`.
        sequence_length: T, tokens.
        data_dir: where prepared datasets are kept and "tfds:" sources are found; None is TFDS's
            default (TFDS_DATA_DIR, else ~/tensorflow_datasets).
        tokenizer: see `tokenizer.parse_tokenizer`; one of the corpus is learned from the training
            documents, a sample of `SAMPLE_CHARACTERS` if they have more. Or a tokenizer itself,
            such as that of another `TextDataset`.
        validation_fraction: see `corpus.is_validation`; in (0, 1). None is for text that nothing
            is trained on, not even a tokenizer: all of it is for validation.
        process_index: of this process in the job.
        wait_seconds: how long the other processes wait for process 0.
        on_progress: called with a line now and then when preparation takes long.

    Raises:
        FileNotFoundError: the folder, file or dataset of the source does not exist.
        TimeoutError: process 0 did not deliver.
        ValueError: a bad argument, a damaged source, no text, too little text for the tokenizer,
            or a side of the split shorter than one window.
    """
    from qat.training import packed_text

    if sequence_length < 1:
        raise ValueError(f"sequence_length {sequence_length} is not at least 1")
    if validation_fraction is None:
        validation_fraction = 1.0
    elif not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction {validation_fraction} is not in (0, 1)")
    if isinstance(source, str):
        source = sources.parse_source(source, data_dir)
    recipe = parse_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    told = _telling("read", source, on_progress)
    surveyed = corpus.survey(told, packed_text.root(data_dir) / "surveys")
    key = _hash(surveyed, recipe, validation_fraction)
    name = re.sub(r"[^A-Za-z0-9]+", "-", source.name).strip("-")[-80:]
    path = packed_text.directory(data_dir, f"{name}-t{sequence_length}-{key}")
    if not packed_text.is_prepared(path):
        if process_index == 0:
            _prepare(
                path, source, surveyed, recipe, sequence_length, validation_fraction, on_progress
            )
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
    for side, rows in records.items():
        counts = metadata.pop(side)
        metadata[side] = Windows(rows, counts["documents"], counts["dropped_tokens"])
    tokenizer = from_json(metadata.pop("tokenizer"))
    return TextDataset(directory=Path(directory), tokenizer=tokenizer, **metadata)


def train_batches(dataset: TextDataset, batch_size: int, seed: int) -> Batches:
    """Endless shuffled batches of training windows, reshuffled every epoch.

    Args:
        dataset: prepared text.
        batch_size: windows in a batch of the whole job.
        seed: of the order of windows, at least 0.

    Raises:
        ValueError: an argument is out of range, or the windows do not fill one batch.
    """
    _check_batch(dataset.train, batch_size)
    if seed < 0:
        raise ValueError(f"seed {seed} is not at least 0")
    return Batches(dataset.train.records, _shuffled(dataset.train, seed).repeat(), batch_size)


def validation_batches(dataset: TextDataset, batch_size: int, limit: int | None = None) -> Batches:
    """Batches of validation windows, always in the same shuffled order.

    The first batches are thus a sample of the whole side; what the last batch leaves over is left
    out.

    Args:
        dataset: prepared text.
        batch_size: windows in a batch of the whole job.
        limit: at most this many batches; None is all.

    Raises:
        ValueError: as `train_batches`, or `limit` is not positive.
    """
    _check_batch(dataset.validation, batch_size)
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} is not at least 1 batch")
    steps = len(dataset.validation.records) // batch_size
    order = _shuffled(dataset.validation, seed=0)[: min(steps, limit or steps) * batch_size]
    return Batches(dataset.validation.records, order, batch_size)


def _shuffled(side: Windows, seed: int) -> grain.MapDataset:
    return grain.MapDataset.range(len(side.records)).seed(seed).shuffle()


def _check_batch(side: Windows, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is not at least 1")
    if batch_size > len(side.records):
        raise ValueError(
            f"batch_size {batch_size} exceeds the {len(side.records)} windows there are; "
            "expected a smaller batch, a shorter sequence or a larger corpus"
        )


def _hash(surveyed: corpus.Survey, tokenizer: Tokenizer | Recipe, fraction: float) -> str:
    """Names contents, tokenizer and split: 16 hexadecimal digits."""
    named = f"{surveyed.content} {tokenizer.identity} {float(fraction)!r}"
    return hashlib.blake2b(named.encode(), digest_size=8).hexdigest()


def _prepare(
    path: Path,
    source: sources.Source,
    surveyed: corpus.Survey,
    recipe: Recipe,
    sequence_length: int,
    fraction: float,
    on_progress: Callable[[str], None],
) -> None:
    """Learns the tokenizer if need be, and packs."""
    from qat.training import packed_text

    sampled = _telling("sampled", source, on_progress)
    tokenizer = recipe.fit(lambda: corpus.sample(sampled, surveyed, fraction, SAMPLE_CHARACTERS))
    packed = _telling("packed", source, on_progress)
    packed_text.write(
        path,
        _encoded(packed, surveyed, tokenizer, fraction),
        sequence_length + 1,
        tokenizer.vocabulary_size,
        {
            "source": source.name,
            "fingerprint": _hash(surveyed, tokenizer, fraction),
            "tokenizer": tokenizer.to_json(),
            "sequence_length": sequence_length,
            "validation_fraction": fraction,
            "unreadable_documents": surveyed.unreadable,
            "empty_documents": surveyed.empty,
        },
    )


def _encoded(
    source: sources.Source, surveyed: corpus.Survey, tokenizer: Tokenizer, fraction: float
) -> Iterator[tuple[str, UInt[np.ndarray, " M"]]]:
    """Side and ids of every document, a separator behind each; on all cores.

    Raises:
        ValueError: the documents are not those of the survey.
    """
    content = corpus.Content()
    documents = content.watch(corpus.documents(source))
    with ThreadPoolExecutor() as pool:
        while batch := list(itertools.islice(documents, _ENCODED_AT_ONCE)):
            encoded = pool.map(lambda each: tokenizer.encode(each.text), batch)
            for document, ids in zip(batch, encoded, strict=True):
                side = "validation" if corpus.is_validation(document, fraction) else "train"
                yield side, np.append(ids, ids.dtype.type(tokenizer.separator))
    if str(content) != surveyed.content:
        raise ValueError(f"source {source.name!r} changed while it was read; try again")


def _telling(done: str, source: sources.Source, tell: Callable[[str], None]) -> sources.Source:
    """The same source, which tells now and then how much of it was read."""

    def read() -> Iterable[bytes]:
        size, last = 0, time.monotonic()
        for raw in source.read():
            yield raw
            size += len(raw)
            if time.monotonic() - last > _SECONDS_BETWEEN_REPORTS:
                last = time.monotonic()
                tell(f"{source.name}: {done} {size / 1e6:,.0f} MB")

    return dataclasses.replace(source, read=read)
