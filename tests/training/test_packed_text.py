"""The prepared files: read back by TFDS alone, killed half way, and written by two at once."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from qat.training import packed_text

WINDOW = 9


def make_documents(count=40, dtype=np.uint8):
    random = np.random.default_rng(0)
    sides = random.choice(["train", "validation"], count, p=[0.7, 0.3]).tolist()
    return [(side, random.integers(0, 200, random.integers(1, 60)).astype(dtype)) for side in sides]


METADATA = {"fingerprint": "f", "source": {}, "validation_fraction": 0.1}


def write(data_dir, documents=None, vocabulary_size=256):
    path = packed_text.directory(data_dir, "key")
    documents = make_documents() if documents is None else documents
    packed_text.write(path, documents, WINDOW, vocabulary_size, METADATA)
    return path


def expected(documents, side):
    """Windows and what is left over, by joining everything at once."""
    tokens = np.concatenate([ids for name, ids in documents if name == side])
    whole = tokens.size // WINDOW * WINDOW
    return tokens[:whole].reshape(-1, WINDOW), tokens.size - whole


def assert_whole(path, documents=None):
    documents = make_documents() if documents is None else documents
    records, metadata = packed_text.read(path)
    for side in ("train", "validation"):
        windows_NS, dropped = expected(documents, side)
        assert metadata.pop(side) == {
            "documents": sum(name == side for name, _ in documents),
            "windows": len(windows_NS),
            "dropped_tokens": dropped,
        }
        rows_NS = records[side][np.arange(len(windows_NS))]
        assert rows_NS.dtype == documents[0][1].dtype
        np.testing.assert_array_equal(rows_NS, windows_NS)
        assert records[side].shape == windows_NS.shape
        assert len(records[side]) == len(windows_NS)
    assert metadata == METADATA


def nothing_else(data_dir):
    return [path.name for path in Path(data_dir).iterdir() if not path.name.startswith("ready")]


def run_python(code, *arguments):
    """Starts a process that can import this module and the library."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path)
    assert path == tmp_path / "key" / "packed_text" / "2.0.0"
    assert_whole(path)
    write(tmp_path)
    assert_whole(path)
    assert nothing_else(tmp_path) == ["key"]


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(256, np.uint8), (257, np.uint16), (1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)],
)
def test_ids_are_stored_in_the_smallest_type(tmp_path, size, dtype):
    documents = make_documents(dtype=dtype)
    assert_whole(write(tmp_path, documents, size), documents)


def small_pieces(monkeypatch):
    """Blocks of 3 windows, written 2 or 3 at a time, 4 a shard, read 2 at a time."""
    monkeypatch.setattr(packed_text, "_BLOCK_BYTES", 3 * WINDOW)
    monkeypatch.setattr(packed_text, "_WRITE_BYTES", 7 * WINDOW)
    monkeypatch.setattr(packed_text, "_SHARD_BYTES", 12 * WINDOW)
    monkeypatch.setattr(packed_text, "_READ_BLOCKS", 2)


@pytest.mark.parametrize("in_memory", [True, False])
def test_many_blocks_and_shards(tmp_path, monkeypatch, in_memory):
    small_pieces(monkeypatch)
    if not in_memory:
        monkeypatch.setattr(packed_text, "IN_MEMORY_BYTES", 0)
    path = write(tmp_path)
    assert len(list(path.glob("packed_text-train.array_record-*"))) > 5
    assert_whole(path)
    records, _ = packed_text.read(path)
    assert isinstance(records["train"], np.ndarray) == in_memory
    windows_NS, _ = expected(make_documents(), "train")
    rows_B = np.random.default_rng(1).integers(0, len(windows_NS), 50)
    np.testing.assert_array_equal(records["train"][rows_B], windows_NS[rows_B])
    assert records["train"][rows_B[:0]].shape == (0, WINDOW)


def test_writing_holds_a_few_blocks_at_most(tmp_path, monkeypatch):
    small_pieces(monkeypatch)
    written = []
    add = tfds.core.SequentialWriter.add_examples

    def counted(self, examples):
        written.extend(block["tokens"].shape[0] for each in examples.values() for block in each)
        add(self, examples)

    monkeypatch.setattr(tfds.core.SequentialWriter, "add_examples", counted)

    def documents():
        seen = 0
        for side, tokens in make_documents():
            yield side, tokens
            seen += tokens.size
            assert seen - sum(written) * WINDOW < 2 * (7 * WINDOW + 60)

    write(tmp_path, documents())


def test_files_are_array_records_that_tfds_reads(tmp_path):
    builder = tfds.builder_from_directory(write(tmp_path))
    assert builder.info.file_format.value == "array_record"
    assert builder.info.metadata["fingerprint"] == "f"
    for side in ("train", "validation"):
        windows_NS, _ = expected(make_documents(), side)
        block = builder.as_data_source(side)[0]["tokens"]
        np.testing.assert_array_equal(block[: len(windows_NS)], windows_NS)
        assert not block[len(windows_NS) :].any()


def test_nothing_is_read_where_nothing_was_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a prepared dataset"):
        packed_text.read(tmp_path)


@pytest.mark.parametrize("error", [ValueError("source"), OSError("disk"), KeyboardInterrupt()])
def test_an_error_of_the_documents_leaves_nothing(tmp_path, error):
    def documents():
        yield from make_documents()
        raise error

    with pytest.raises(type(error)):
        write(tmp_path, documents())
    assert nothing_else(tmp_path) == []


def test_a_side_shorter_than_a_window_is_an_error(tmp_path):
    documents = [each for each in make_documents() if each[0] == "train"]
    with pytest.raises(ValueError, match=r"larger data.validation_fraction than 0\.1$"):
        write(tmp_path, documents)
    with pytest.raises(ValueError, match=f"8 tokens in 1 of the {len(documents) + 1} doc"):
        write(tmp_path, [*documents, ("validation", np.zeros(8, np.uint8))])
    assert nothing_else(tmp_path) == []


def test_a_killed_preparation_is_not_believed(tmp_path):
    code = """
        import os, signal, sys
        import test_packed_text

        def die_half_way():
            yield from test_packed_text.make_documents()[:20]
            os.kill(os.getpid(), signal.SIGKILL)

        test_packed_text.write(sys.argv[1], die_half_way())
    """
    killed = run_python(code, tmp_path)
    _, errors = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, errors
    path = packed_text.directory(tmp_path, "key")
    assert list(tmp_path.glob("incomplete.*"))
    assert not packed_text.is_prepared(path)
    write(tmp_path)
    assert_whole(path)


def test_the_slower_of_two_writers_takes_the_result_of_the_faster(tmp_path):
    def overtaken():
        write(tmp_path)
        yield from make_documents()

    path = write(tmp_path, overtaken())
    assert_whole(path)
    assert nothing_else(tmp_path) == ["key"]


def test_two_processes_write_at_once(tmp_path):
    code = """
        import pathlib, sys, time
        import test_packed_text

        directory, name = pathlib.Path(sys.argv[1]), sys.argv[2]
        (directory / f"ready{name}").touch()
        while len(list(directory.glob("ready*"))) < 2:
            time.sleep(0.001)
        test_packed_text.assert_whole(test_packed_text.write(directory))
    """
    processes = [run_python(code, tmp_path, name) for name in "ab"]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert_whole(packed_text.directory(tmp_path, "key"))
    assert nothing_else(tmp_path) == ["key"]


def test_other_failures_of_the_file_system_are_not_hidden(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(NotADirectoryError):
        write(blocked)


def test_waiting_ends_in_time(tmp_path):
    path = packed_text.directory(tmp_path, "key")
    with pytest.raises(TimeoutError, match=r"was not prepared within 0\.1 s"):
        packed_text.wait(path, 0.1)
    write(tmp_path)
    packed_text.wait(path, 0.0)
