"""Rows on disk: whole, readable, identifiable."""

import dataclasses
import json

import pytest

from qat.training.results import hash_of, read_rows, write_rows
from tests.rows import ROW


def test_rows_come_back_as_written(tmp_path):
    diverged = dataclasses.replace(ROW, run_id="b2", loss=float("nan"), status="diverged")
    write_rows(tmp_path / "rows" / "a1.jsonl", [ROW, dataclasses.replace(ROW, ptq_bits=3.0)])
    write_rows(tmp_path / "rows" / "b2.jsonl", [diverged])
    table = read_rows(tmp_path / "rows")
    assert list(table.run_id) == ["a1", "a1", "b2"]
    assert list(table.ptq_bits) == [16.0, 3.0, 16.0]
    assert table.loss.isna().tolist() == [False, False, True]
    assert dataclasses.asdict(ROW) == table.iloc[0].to_dict()


def test_rows_from_before_a_field_was_measured_are_read(tmp_path):
    later = ("ptq_", "init", "teacher")
    older = {k: v for k, v in dataclasses.asdict(ROW).items() if not k.startswith(later)}
    (tmp_path / "a.jsonl").write_text(json.dumps(older))
    assert read_rows(tmp_path).iloc[0].to_dict() == dataclasses.asdict(ROW)


def test_an_interrupted_write_leaves_nothing_to_read(tmp_path):
    def rows():
        yield ROW
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(tmp_path / "a1.jsonl", rows())
    assert read_rows(tmp_path).empty


@pytest.mark.parametrize("text", ["{", '{"loss": 1}\n', "[1]\n"])
def test_a_file_that_holds_no_rows_is_named(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"x\.jsonl"):
        read_rows(tmp_path)


def test_identity_ignores_key_order_and_sees_every_value():
    assert hash_of({"a": 1, "b": {"c": 2, "d": 3}}) == hash_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert hash_of({"a": 1}) != hash_of({"a": 2})
