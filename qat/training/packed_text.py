"""Packed text as a TFDS dataset: token windows in ArrayRecord, written once and then only read.

TFDS builds in a directory of another name and renames it when everything is written. So a
directory of the right name is a whole dataset, and a killed preparation leaves behind only an
`incomplete.*` directory, which nothing reads. Processes that prepare the same data at once all
write; one rename succeeds and the others take its result, which is equal because the name holds
the corpus fingerprint. That needs no lock file, hence there are no stale locks and no trust in
the locks of a network file system.

Records are read all at once into one array. One by one they cost 150 µs each, more than a small
model's share of a training step; together 15 µs each, once, and a byte of memory per token.

The format and the data source are those TFDS has without TensorFlow. This module is apart from
`data` because importing TFDS is slow.
"""

import contextlib
import io
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

# N: windows; S: tokens of a window.

_POLL_SECONDS = 0.2


class PackedText(tfds.core.GeneratorBasedBuilder):
    """Writes the windows of every split; `read` needs only the files."""

    VERSION = tfds.core.Version("1.0.0")  # of the packing rule

    def __init__(
        self,
        *,
        records: Mapping[str, UInt8[np.ndarray, "N S"]],
        metadata: Mapping[str, Any],
        data_dir: Path,
    ) -> None:
        self._records = records
        self._metadata = metadata
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        window = self._records["train"].shape[1]
        tokens = tfds.features.Tensor(
            shape=(window,), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Text packed into windows of token ids.",
            features=tfds.features.FeaturesDict({"tokens": tokens}),
            disable_shuffling=True,  # records keep packing order, which is shuffled already
            metadata=tfds.core.MetadataDict(self._metadata),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        return {name: self._generate_examples(name) for name in self._records}

    def _generate_examples(self, name: str) -> Iterator[tuple[int, Any]]:
        for key, tokens_S in enumerate(self._records[name]):
            yield key, {"tokens": tokens_S}


def directory(data_dir: str | Path | None, key: str) -> Path:
    """Where the dataset of this key lies; None is TFDS's default data directory."""
    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    return root.joinpath(key, PackedText.name, str(PackedText.VERSION))


def is_prepared(path: Path) -> bool:
    """Whether a whole dataset lies there."""
    return (path / "dataset_info.json").exists()


def write(
    path: Path, records: Mapping[str, UInt8[np.ndarray, "N S"]], metadata: Mapping[str, Any]
) -> None:
    """Writes a dataset, unless this or another process already has.

    Args:
        path: a result of `directory`.
        records: split name to token ids, at least one window each, all of one length.
        metadata: JSON values, kept with the dataset.

    Raises:
        OSError: the file system refuses.
    """
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder = PackedText(records=records, metadata=metadata, data_dir=path.parents[1])
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it announces a download; there is none
            builder.download_and_prepare()
    except OSError:
        if not is_prepared(path):  # else another process was faster, and the rename failed
            raise


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


def read(path: Path) -> tuple[dict[str, UInt8[np.ndarray, "N S"]], dict[str, Any]]:
    """The windows of every split in packing order, and the metadata, of a prepared dataset.

    Raises:
        FileNotFoundError: no prepared dataset lies there.
    """
    if not is_prepared(path):
        raise FileNotFoundError(f"{path} is not a prepared dataset; expected one of `prepare`'s")
    builder = tfds.builder_from_directory(path)
    records = {}
    for name, source in builder.as_data_source().items():
        rows = source.__getitems__(range(len(source)))
        records[name] = np.stack([row["tokens"] for row in rows])
    return records, dict(builder.info.metadata)
