"""Packed text as a TFDS dataset: token windows in ArrayRecord, written once and then only read.

Windows are written as they come, shard by shard, so a corpus may be larger than memory. A record
is a block of windows, about 64 KB: one window a record would cost 15 µs each to read, 1.4 s at
the start of a run on the standard library. The last block of a side is filled up with zeros, and
the number of windows is kept with the dataset.

A dataset is written in a folder of another name and renamed when it is whole. So a folder of the
right name is a whole dataset, and a killed preparation leaves behind only an `incomplete.*`
folder, which nothing reads. Processes that prepare the same data at once all write; one rename
succeeds and the others take its result, which is equal because the name holds what decides it.
That needs no lock file, hence there are no stale locks and no trust in the locks of a network
file system.

A side of up to a gigabyte is read into one array; rows of a larger one are read when they are
asked for, a block a row.

The format and the reader are those TFDS has without TensorFlow. This module is apart from `data`
because importing TFDS is slow.
"""

import dataclasses
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, Shaped, UInt

# N: windows of a side; S: tokens of a window; R: windows of a block; K: blocks;
# M: tokens of a document; B: windows asked for.

IN_MEMORY_BYTES = 1 << 30

_NAME = "packed_text"
_VERSION = "2.0.0"  # of the packing rule
_BLOCK_BYTES = 1 << 16
_WRITE_BYTES = 1 << 23  # TFDS writes its description again at every call
_SHARD_BYTES = 1 << 28
_READ_BLOCKS = 64
_POLL_SECONDS = 0.2
_FRACTION = "validation_fraction"


class Rows(Protocol):
    """Windows by their index; a NumPy array of shape (N, S) is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, S)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows_B: Int[np.ndarray, " B"], /) -> UInt[np.ndarray, "B S"]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class RowsOnDisk:
    """Windows that stay in their files.

    Attributes:
        blocks: TFDS's random access to the blocks.
        shape: (N, S).
    """

    blocks: Any
    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows_B: Int[np.ndarray, " B"]) -> UInt[np.ndarray, "B S"]:
        """Windows of these indices; every block they lie in is read once."""
        count, window = _tokens(self.blocks.dataset_info).shape
        needed_K, which_B = np.unique(rows_B // count, return_inverse=True)
        read = self.blocks.__getitems__(needed_K.tolist())
        tokens_BS = np.empty((len(rows_B), window), _tokens(self.blocks.dataset_info).np_dtype)
        for i, (block, row) in enumerate(zip(which_B, rows_B % count, strict=True)):
            tokens_BS[i] = read[block]["tokens"][row]
        return tokens_BS


def directory(data_dir: str | Path | None, key: str) -> Path:
    """Where the dataset of this key lies; None is TFDS's default data directory."""
    return root(data_dir).joinpath(key, _NAME, _VERSION)


def root(data_dir: str | Path | None) -> Path:
    """The folder of all prepared data; None is TFDS's default data directory."""
    return Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()


def is_prepared(path: Path) -> bool:
    """Whether a whole dataset lies there."""
    return (path / "dataset_info.json").exists()


def write(
    path: Path,
    documents: Iterable[tuple[str, UInt[np.ndarray, " M"]]],
    window: int,
    vocabulary_size: int,
    metadata: Mapping[str, Any],
) -> None:
    """Packs documents, unless this or another process already has.

    Args:
        path: a result of `directory`.
        documents: (side, token ids) one after another, each with its separator at the end; the
            sides are "train" and "validation". An error of this iterator leaves nothing behind.
        window: S, tokens.
        vocabulary_size: of the ids, which decides their type.
        metadata: JSON values, kept with the dataset; `validation_fraction` among them.

    Raises:
        OSError: the file system refuses.
        ValueError: a side that has a share of the split is shorter than one window.
    """
    partial = path.parents[2] / f"incomplete.{path.parents[1].name}.{secrets.token_hex(4)}"
    partial.mkdir(parents=True)
    try:
        _write(partial, documents, window, np.min_scalar_type(vocabulary_size - 1), metadata)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(path)
    except OSError:
        if not is_prepared(path):  # else another process was faster, and the rename failed
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def wait(path: Path, seconds: float) -> None:
    """Returns when another process has written the dataset.

    Raises:
        TimeoutError: it has not, in this time.
    """
    deadline = time.monotonic() + seconds
    while not is_prepared(path):
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{path} was not prepared within {seconds} s; expected process 0 to share this "
                "directory, to read the same documents, and to succeed"
            )
        time.sleep(_POLL_SECONDS)


def read(path: Path) -> tuple[dict[str, Rows], dict[str, Any]]:
    """The windows of both sides in packing order, and the metadata, of a prepared dataset.

    The metadata have for each side, under its name, `documents`, `windows` and `dropped_tokens`.

    Raises:
        FileNotFoundError: no prepared dataset lies there.
    """
    if not is_prepared(path):
        raise FileNotFoundError(f"{path} is not a prepared dataset; expected one of `prepare`'s")
    builder = tfds.builder_from_directory(path)
    metadata = dict(builder.info.metadata)
    return {side: _rows(builder, side) for side in ("train", "validation")}, metadata


class _Side:
    """Tokens of one side on their way into blocks."""

    def __init__(self, block_windows: int, window: int, dtype: np.dtype) -> None:
        self._shape = (block_windows, window)
        self._dtype = dtype
        self._parts: list[np.ndarray] = []
        self._size = 0
        self.documents = self.windows = 0

    def add(self, tokens_M: UInt[np.ndarray, " M"]) -> bool:
        """Takes a document; says whether there is enough to be written."""
        self.documents += 1
        self._parts.append(tokens_M)
        self._size += tokens_M.size
        return self._size * self._dtype.itemsize >= _WRITE_BYTES

    def blocks(self, last: bool = False) -> Iterator[Shaped[np.ndarray, "R S"]]:
        """Takes out whole blocks; at the last call whole windows, filled up with zeros."""
        tokens = np.concatenate([np.zeros(0, self._dtype), *self._parts])
        count, window = self._shape
        unit = window if last else count * window
        whole, rest = np.split(tokens, [tokens.size // unit * unit])
        self._parts, self._size = [rest], rest.size
        self.windows += whole.size // window
        padding = -whole.size % (count * window)
        padded = np.pad(whole, (0, padding)) if padding else whole
        yield from padded.reshape(-1, count, window)

    def counts(self, side: str, documents: int, fraction: float) -> dict[str, int]:
        """What to keep with the dataset, after the last blocks.

        Args:
            side: "train" or "validation".
            documents: of both sides.
            fraction: of the split.
        """
        if not self.windows and not (side == "train" and fraction == 1):
            other = "larger" if side == "validation" else "smaller"
            split = f", or a {other} data.validation_fraction than {fraction}"
            raise ValueError(
                f"the {side} side has {self._size} tokens in {self.documents} of the {documents} "
                f"documents; expected at least one window of {self._shape[1]} tokens: more "
                "documents (one is a whole file, line of JSON or record, unless it is long) or a "
                f"shorter sequence{split if fraction < 1 else ''}"
            )
        return {
            "documents": self.documents,
            "windows": self.windows,
            "dropped_tokens": self._size,
        }


def _write(
    folder: Path,
    documents: Iterable[tuple[str, UInt[np.ndarray, " M"]]],
    window: int,
    dtype: np.dtype,
    metadata: Mapping[str, Any],
) -> None:
    count = max(1, _BLOCK_BYTES // (window * dtype.itemsize))
    info = _info(folder, (count, window), dtype)
    writer = tfds.core.SequentialWriter(
        info,
        max_examples_per_shard=max(1, _SHARD_BYTES // (count * window * dtype.itemsize)),
        file_format="array_record",
    )
    sides = {name: _Side(count, window, dtype) for name in ("train", "validation")}
    writer.initialize_splits(list(sides))

    def write(name: str, last: bool = False) -> None:
        writer.add_examples({name: [{"tokens": each} for each in sides[name].blocks(last)]})

    for name, tokens_M in documents:
        if sides[name].add(tokens_M):
            write(name)
    for name in sides:
        write(name, last=True)
    writer.close_all()
    total, fraction = sum(side.documents for side in sides.values()), metadata[_FRACTION]
    counts = {name: side.counts(name, total, fraction) for name, side in sides.items()}
    info.metadata.update(metadata, **counts)
    info.write_to_directory(folder)


def _info(folder: Path, shape: tuple[int, int], dtype: np.dtype) -> tfds.core.DatasetInfo:
    encoding = tfds.features.Encoding.BYTES
    tokens = tfds.features.Tensor(shape=shape, dtype=dtype.type, encoding=encoding)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=_NAME, version=tfds.core.Version(_VERSION), data_dir=os.fspath(folder), module_name=""
    )
    return tfds.core.DatasetInfo(
        builder=identity,
        description="Text packed into blocks of windows of token ids.",
        features=tfds.features.FeaturesDict({"tokens": tokens}),
        disable_shuffling=True,  # blocks keep packing order
        metadata=tfds.core.MetadataDict(),
    )


def _tokens(info: tfds.core.DatasetInfo) -> tfds.features.Tensor:
    """The feature that says shape (R, S) and type of a block."""
    return info.features["tokens"]


def _rows(builder: tfds.core.DatasetBuilder, side: str) -> Rows:
    """The windows of one side."""
    tokens = _tokens(builder.info)
    shape = (builder.info.metadata[side]["windows"], tokens.shape[1])
    if not shape[0]:  # then there are no files, which TFDS does not read
        return np.zeros(shape, tokens.np_dtype)
    on_disk = RowsOnDisk(builder.as_data_source(side), shape)
    small = shape[0] * shape[1] * np.dtype(tokens.np_dtype).itemsize <= IN_MEMORY_BYTES
    return _in_memory(on_disk) if small else on_disk


def _in_memory(rows: RowsOnDisk) -> UInt[np.ndarray, "N S"]:
    """All windows; a few blocks at a time, so that there are never two copies."""
    blocks, tokens = rows.blocks, _tokens(rows.blocks.dataset_info)
    tokens_KRS: UInt[np.ndarray, "K R S"] = np.empty((len(blocks), *tokens.shape), tokens.np_dtype)
    for start in range(0, len(blocks), _READ_BLOCKS):
        wanted = range(start, min(start + _READ_BLOCKS, len(blocks)))
        for index, block in zip(wanted, blocks.__getitems__(wanted), strict=True):
            tokens_KRS[index] = block["tokens"]
    return tokens_KRS.reshape(-1, tokens.shape[1])[: len(rows)]
