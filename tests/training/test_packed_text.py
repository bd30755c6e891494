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


def make_records(windows=50, window=9):
    tokens = np.arange(windows * window) * 7 % 256
    tokens_NS = tokens.astype(np.uint8).reshape(windows, window)
    return {"train": tokens_NS, "validation": tokens_NS[::-3].copy()}


def write(data_dir):
    path = packed_text.directory(data_dir, "key")
    packed_text.write(path, make_records(), {"fingerprint": "f", "train": {"documents": 3}})
    return path


def assert_whole(path):
    records, metadata = packed_text.read(path)
    assert records.keys() == make_records().keys()
    for name, expected_NS in make_records().items():
        assert records[name].dtype == np.uint8
        np.testing.assert_array_equal(records[name], expected_NS)
    assert metadata == {"fingerprint": "f", "train": {"documents": 3}}
    assert [each.name for each in path.parent.iterdir() if "incomplete" not in each.name] == [
        "1.0.0"
    ]


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
    assert path == tmp_path / "key" / "packed_text" / "1.0.0"
    assert_whole(path)
    write(tmp_path)
    assert_whole(path)


def test_files_are_array_records_that_tfds_reads(tmp_path):
    builder = tfds.builder_from_directory(write(tmp_path))
    assert builder.info.file_format.value == "array_record"
    assert builder.info.metadata["fingerprint"] == "f"
    for name, records_NS in make_records().items():
        source = builder.as_data_source(name)
        assert len(source) == len(records_NS)
        np.testing.assert_array_equal(source[5]["tokens"], records_NS[5])


def test_nothing_is_read_where_nothing_was_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a prepared dataset"):
        packed_text.read(tmp_path)


def test_a_killed_preparation_is_not_believed(tmp_path):
    code = """
        import os, signal, sys
        import test_packed_text
        from qat.training import packed_text

        def die_half_way(self, name):
            yield from list(examples(self, name))[:20]
            os.kill(os.getpid(), signal.SIGKILL)

        examples = packed_text.PackedText._generate_examples
        packed_text.PackedText._generate_examples = die_half_way
        test_packed_text.write(sys.argv[1])
    """
    killed = run_python(code, tmp_path)
    _, errors = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, errors
    path = packed_text.directory(tmp_path, "key")
    assert list(path.parent.glob("incomplete.*"))
    assert not packed_text.is_prepared(path)
    write(tmp_path)
    assert_whole(path)


def test_the_slower_of_two_writers_takes_the_result_of_the_faster(tmp_path, monkeypatch):
    examples = packed_text.PackedText._generate_examples
    overtakers = iter([write])

    def overtaken(self, name):
        for overtake in overtakers:
            overtake(tmp_path)
        yield from examples(self, name)

    monkeypatch.setattr(packed_text.PackedText, "_generate_examples", overtaken)
    path = write(tmp_path)
    assert_whole(path)
    assert not list(path.parent.glob("incomplete.*"))


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
