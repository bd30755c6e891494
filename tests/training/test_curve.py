"""The loss curve as a file: what a kill leaves, and what going on makes of it."""

import numpy as np
import pytest

from qat.training import curve
from qat.training.step import Metrics


def metrics_of(steps, seed=0):
    rows = np.random.default_rng(seed).normal(size=(steps, 3)).astype(np.float32)
    return [Metrics(*row) for row in rows]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "curve.csv"
    assert curve.rewind(path, 0) == 0
    return path


def test_numbers_read_back_as_the_same_float32(path):
    odd = [np.float32(x) for x in (np.pi, 1e-45, 3.4e38, 1 / 3, -0.0, np.inf, np.nan)]
    metrics = [Metrics(x, x, x) for x in odd]
    curve.append(path, len(odd), metrics)
    back = curve.read(path)
    assert list(back) == [1, 2, 3, 4, 5, 6, 7]
    for written, read in zip(metrics, back.values(), strict=True):
        np.testing.assert_array_equal(
            np.array(read).view(np.uint32), np.array(written).view(np.uint32)
        )
    assert path.read_text().splitlines()[:2] == [
        "step,loss,grad_norm,learning_rate",
        "1,3.1415927,3.1415927,3.1415927",
    ]


def test_cut_at_any_byte_it_goes_on_to_the_same_file(path):
    metrics = metrics_of(4)
    curve.append(path, 4, metrics)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        kept = curve.rewind(path, 2)
        assert kept == len(curve.read(path)) <= 2
        curve.append(path, 4, metrics[kept:])
        assert path.read_bytes() == whole


def test_steps_after_the_checkpoint_are_dropped(path):
    curve.append(path, 6, metrics_of(6))
    assert curve.rewind(path, 4) == 4
    assert list(curve.read(path)) == [1, 2, 3, 4]
    stamp = path.stat().st_mtime_ns
    assert curve.rewind(path, 4) == 4
    assert path.stat().st_mtime_ns == stamp


def test_lines_of_garbage_are_dropped_and_counted(path):
    curve.append(path, 3, metrics_of(3))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\xff\x00garbage\n", b"2,1,2\n", lines[3]]))
    assert curve.rewind(path, 3) == 2


def test_another_file_is_left_alone(tmp_path):
    path = tmp_path / "curve.csv"
    path.write_text("name,mark\nAda,1\n")
    with pytest.raises(ValueError, match="is not a loss curve"):
        curve.rewind(path, 3)
    assert path.read_text() == "name,mark\nAda,1\n"


def test_a_curve_that_is_gone_is_named(tmp_path):
    with pytest.raises(OSError, match=r"curve\.csv"):
        curve.append(tmp_path / "curve.csv", 1, metrics_of(1))


def test_a_full_disk_is_one_line_with_the_name(monkeypatch, path):
    def full(descriptor, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*curve\.csv'"):
        curve.append(path, 1, metrics_of(1))
