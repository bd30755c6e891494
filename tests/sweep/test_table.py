"""Tables come back as they were, and nothing is lost without a word."""

import csv
import dataclasses
import gzip
import itertools
import json
import math
import os
import re
import time

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qat.sweep import table as tables
from qat.sweep.table import collect, measured, union, write
from qat.training.results import Row, write_rows
from tests.rows import ROW as ANY_ROW

ROW = dataclasses.replace(ANY_ROW, run_id="00e1", versions="python 3, jax 4")
NAN = float("nan")
NAMES = [field.name for field in dataclasses.fields(Row)]


def row(**changes):
    return dataclasses.replace(ROW, **changes)


def saved(folder, **rows):
    for name, each in rows.items():
        write_rows(folder / f"{name}.jsonl", each)
    return sorted(folder.glob("*.jsonl"))


def left_out(path):
    collected = collect([path])
    return len(collected.table), collected.left_out


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["none", "None", "NaN", "nan", "", "1e5", "007", "true", "a,b", 'q"', "\r", "\n", "\0", " x "]
)
BY_TYPE = {
    str: TEXT,
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(),
}
FIELDS = {field.name: BY_TYPE[field.type] for field in dataclasses.fields(Row)}
ROWS = st.lists(
    st.builds(Row, **(FIELDS | {"status": st.sampled_from(["diverged", "failed"])})),
    unique_by=lambda each: (
        each.run_id,
        each.tokens,
        each.eval_set,
        each.ptq_method,
        each.ptq_quantizer,
    ),
    max_size=4,
)


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(rows=ROWS)
def test_a_table_comes_back_bit_for_bit(name, tmp_path, rows):
    write_rows(tmp_path / "a.jsonl", rows)
    collected = collect([tmp_path / "a.jsonl"])
    assert not collected.left_out
    assert repr(collected.table.to_dict("records")) == repr(list(map(dataclasses.asdict, rows)))
    assert list(collected.table.columns) == NAMES
    write(collected.table, tmp_path)
    again = collect([tmp_path / name])
    assert not again.left_out
    assert repr(again.table.to_dict("records")) == repr(collected.table.to_dict("records"))
    pd.testing.assert_frame_equal(again.table, collected.table, check_exact=True)


@pytest.mark.parametrize("name", ["rows.csv", "a.jsonl"])
def test_a_compressed_file_is_read_as_it_was(tmp_path, name):
    saved(tmp_path, a=[ROW, row(run_id="b")])
    plain = collect([tmp_path / "a.jsonl"]).table
    write(plain, tmp_path)
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    pd.testing.assert_frame_equal(collect([path]).table, plain, check_exact=True)


@pytest.mark.parametrize("damage", ["none of it", "torn"])
def test_a_damaged_compressed_file_is_named(tmp_path, damage):
    content = b"run_id" if damage == "none of it" else gzip.compress(b"run_id" * 99)[:-9]
    (tmp_path / "rows.csv.gz").write_bytes(content)
    count, (line,) = left_out(tmp_path / "rows.csv.gz")
    assert count == 0
    assert "damaged, or not compressed by gzip" in line


def test_other_readers_see_the_same_numbers_and_words(tmp_path):
    (path,) = saved(tmp_path, a=[row(loss=0.1 + 0.2), row(run_id="b", loss=NAN, status="failed")])
    table = collect([path]).table
    write(table, tmp_path)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "rows.parquet"), table)
    by_pandas = pd.read_csv(tmp_path / "rows.csv")
    assert by_pandas.kv_format.tolist() == ["none", "none"]
    assert by_pandas.loss[0] == pytest.approx(0.1 + 0.2, rel=1e-15)
    assert by_pandas.loss.isna().tolist() == [False, True]


def test_tables_of_before_there_were_checkpoints_are_read(tmp_path):
    old = pd.DataFrame([dataclasses.asdict(ROW)]).drop(columns=["init", "teacher"])
    old.to_csv(tmp_path / "a.csv", index=False)
    old.to_parquet(tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text(json.dumps(old.to_dict("records")[0]) + "\n")
    collected = collect(sorted(tmp_path.iterdir()))
    assert not collected.left_out
    assert collected.table.to_dict("records") == [dataclasses.asdict(ROW)]


def test_a_csv_that_pandas_wrote_is_read(tmp_path):
    (path,) = saved(tmp_path, a=[row(), row(run_id="b", loss=NAN, status="diverged")])
    table = collect([path]).table
    table.to_csv(tmp_path / "rows.csv", index=False)  # NaN is an empty cell there
    pd.testing.assert_frame_equal(collect([tmp_path / "rows.csv"]).table, table)


def test_no_files_are_an_empty_table_with_columns_and_types(tmp_path):
    nothing, something = collect([]), collect(saved(tmp_path, a=[ROW]))
    assert nothing.left_out == ()
    pd.testing.assert_frame_equal(nothing.table, something.table[:0])


@pytest.mark.parametrize("field", tables.KEY)
def test_rows_that_differ_in_the_key_are_both_there(tmp_path, field):
    other = row(**{field: 21 if field == "tokens" else "x"})
    collected = collect(saved(tmp_path, a=[ROW, other]))
    assert (len(collected.table), collected.left_out) == (2, ())


def test_fields_that_are_newer_than_a_file_have_their_defaults(tmp_path):
    newer = ("ptq_kl", "ptq_agreement", "ptq_activations", "total_bits")
    older = {k: v for k, v in dataclasses.asdict(ROW).items() if k not in newer}
    (tmp_path / "a.jsonl").write_text(json.dumps(older))
    pd.DataFrame([older]).to_csv(tmp_path / "b.csv", index=False)
    pd.DataFrame([older]).to_parquet(tmp_path / "c.parquet", index=False)
    for path in tmp_path.iterdir():
        collected = collect([path])
        assert collected.left_out == ()
        assert collected.table.to_dict("records") == [dataclasses.asdict(ROW)]


def test_equal_rows_of_several_files_are_one(tmp_path):
    rows = [row(run_id=f"r{index}", loss=NAN, status="diverged") for index in range(3)]
    paths = saved(tmp_path, b=rows[1:], a=rows[:2])
    once = collect(paths)
    write(once.table, tmp_path)
    both = [*paths, tmp_path / "rows.csv", tmp_path / "rows.parquet", paths[0]]
    for given_paths in (both, both[::-1]):
        collected = collect(given_paths)
        assert collected.left_out == ()
        pd.testing.assert_frame_equal(collected.table, once.table)


def test_of_two_measurements_the_first_by_file_name_is_kept_and_both_are_named(tmp_path):
    a, b = saved(tmp_path, b=[row(loss=2.0)], a=[row(run_id="x"), ROW])
    for paths in ((a, b), (b, a)):
        collected = collect(paths)
        assert collected.table.loss.tolist() == [1.5, 1.5]
        (line,) = collected.left_out
        assert line.startswith(f"{b}, row 1: another row of run 00e1")
        assert f"loss = 2.0, but 1.5 in {a}, row 2" in line


def changed(**changes):
    return json.dumps({**dataclasses.asdict(ROW), **changes})


def without(name):
    return json.dumps({k: v for k, v in dataclasses.asdict(ROW).items() if k != name})


BAD_ROWS = {
    "torn": (changed()[:-9], "torn, or not JSON"),
    "empty line": ("", "torn, or not JSON"),
    "zeros": ("\0" * 9, "torn, or not JSON"),
    "nested too deep": ("[" * 100_000, "recursion"),
    "not an object": ("[1]", r"expected a JSON object, got \[1\]"),
    "a field missing": (without("loss"), "field 'loss' missing"),
    "two fields missing": ("{}", "field 'run_id' and 21 others missing"),
    "another field": (changed(lsos=1), "unknown field 'lsos', nearest is 'loss'"),
    "text for a number": (changed(loss="1.5"), "loss: expected a number, got '1.5'"),
    "null": (changed(loss=None), "loss: expected a number, got None"),
    "truth for a number": (changed(loss=True), "loss: expected a number, got True"),
    "fraction": (changed(tokens=1.5), "tokens: expected a whole number"),
    "truth for a whole number": (changed(seed=True), "seed: expected a whole number"),
    "too large": (changed(tokens=2**63), "tokens: expected a whole number"),
    "too large for a float": (changed(loss=10**400), "loss: expected a number"),
    "number for text": (changed(run_id=12), "run_id: expected text, got 12"),
    "half a character": (changed(versions="\ud800"), "surrogates"),
    "status": (changed(status="okay"), "unknown status 'okay'.*nearest is 'ok'"),
    "nan": (changed(loss=NAN), "loss: expected a finite number where status"),
    "infinite": (changed(wall_s=math.inf), "wall_s: expected a finite number"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_line_is_left_out_alone_and_named(tmp_path, case):
    line, words = BAD_ROWS[case]
    path = tmp_path / "a.jsonl"
    path.write_text(f"{changed()}\n{line}\n{changed(run_id='b')}\n")
    collected = collect([path])
    assert collected.table.run_id.tolist() == ["00e1", "b"]
    (reason,) = collected.left_out
    assert reason.startswith(f"{path}, row 2: ")
    assert "\n" not in reason
    assert re.search(words, reason), reason


@pytest.mark.parametrize("status", ["diverged", "failed", "unfinished"])
def test_rows_of_runs_without_a_result_may_lack_numbers(tmp_path, status):
    bad = row(loss=NAN, loss_se=NAN, ptq_delta=math.inf, status=status)
    assert left_out(*saved(tmp_path, a=[bad])) == (1, ())


def test_a_whole_number_may_stand_for_a_float(tmp_path):
    (tmp_path / "a.jsonl").write_text(changed(loss=2))
    table = collect([tmp_path / "a.jsonl"]).table
    assert table.loss.dtype == "float64"
    assert table.loss.tolist() == [2.0]


FOREIGN = {
    "curve.csv": (b"step,loss\n1,2.5\n", "unknown field 'step'"),
    "empty.csv": (b"", "field 'run_id' and 21 others missing"),
    "binary.csv": (b"\xff\xfe", "decode"),
    "torn.parquet": (b"PAR1 and no end", "arquet"),
    "row.txt": (b"", r"unknown kind of file '\.txt': expected \.jsonl, \.csv or \.parquet$"),
    "rows.csv.17.partial": (b"", "unknown kind of file '.partial'"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_named_once(tmp_path, name):
    content, words = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    collected = collect([tmp_path / name])
    assert len(collected.table) == 0
    (line,) = collected.left_out
    assert line.startswith(f"{tmp_path / name}: ")
    assert re.search(words, line), line
    assert collected.unreadable == (line,)


def test_what_cannot_be_read_is_named(tmp_path):
    folder, gone = tmp_path / "folder.jsonl", tmp_path / "gone.csv"
    folder.mkdir()
    lines = collect([folder, gone]).left_out
    assert lines == (f"{folder}: Is a directory", f"{gone}: No such file or directory")


def test_foreign_parquet_and_torn_csv_rows_are_named(tmp_path):
    pd.DataFrame({"loss": [1.0]}).to_parquet(tmp_path / "a.parquet")
    assert "missing" in left_out(tmp_path / "a.parquet")[1][0]
    write(collect(saved(tmp_path, a=[ROW, row(run_id="b")])).table, tmp_path)
    path = tmp_path / "rows.csv"
    path.write_text(path.read_text()[:-40])
    count, (line,) = left_out(path)
    assert count == 1
    assert line.startswith(f"{path}, row 2: torn: expected {len(NAMES)} cells")


def test_a_cell_of_another_type_and_a_column_twice_are_named(tmp_path):
    path = tmp_path / "rows.csv"
    cells = list(dataclasses.asdict(ROW).values())
    for header, values, words in (
        (NAMES, [*cells[:1], "ten", *cells[2:]], "params: expected a whole number, got 'ten'"),
        ([*NAMES, "loss"], [*cells, 1.0], "a field is there twice"),
    ):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, values])
        count, (line,) = left_out(path)
        assert count == 0
        assert words in line


def test_a_parquet_of_other_types_is_named(tmp_path):
    table = collect(saved(tmp_path, a=[ROW])).table
    table.astype({"tokens": "float64"}).to_parquet(tmp_path / "a.parquet")
    assert "tokens: expected a whole number" in left_out(tmp_path / "a.parquet")[1][0]


def test_a_full_disk_leaves_the_tables_before(tmp_path, monkeypatch):
    table = collect(saved(tmp_path, a=[ROW])).table
    write(table, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(descriptor, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"rows\.csv"):
        write(table[:0], tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_columns_that_no_row_has_are_ignored_and_named(tmp_path):
    (path,) = saved(tmp_path, a=[ROW, row(run_id="b")])
    table = collect([path]).table
    more = table.assign(note="mine", **{"Unnamed: 0": [0, 1]})
    more.to_csv(tmp_path / "more.csv", index=False)
    more.to_parquet(tmp_path / "more.parquet")
    for name in ("more.csv", "more.parquet"):
        collected = collect([tmp_path / name])
        pd.testing.assert_frame_equal(collected.table, table)
        assert collected.left_out == ()
        (line,) = collected.ignored
        assert line.startswith(f"{tmp_path / name}: ")
        assert line.endswith("'note', 'Unnamed: 0'")


def test_a_result_stands_before_a_failure_wherever_it_is(tmp_path):
    failed, diverged = (row(status=status, loss=NAN) for status in ("failed", "diverged"))
    rounded = row(ptq_method="rtn", ptq_quantizer="int4/channel")
    paths = saved(tmp_path, a=[failed], b=[ROW, rounded], c=[diverged])
    collected = collect(paths)
    assert collected.left_out == ()
    assert sorted(collected.table.status) == ["ok", "ok"]
    tables = [collect([path]).table for path in paths]
    for order in itertools.permutations(tables):
        both = union(order)
        assert measured(both) == {
            "00e1": {
                (20, "none", "none"): "ok",
                (20, "rtn", "int4/channel"): "ok",
            }
        }
    assert union([tables[2], tables[0]]).status.tolist() == ["diverged"]
    assert union([tables[0], tables[2]]).status.tolist() == ["failed"]


def test_ten_thousand_files_are_read_in_seconds(tmp_path):
    for index in range(10_000):
        (tmp_path / f"{index}.jsonl").write_text(changed(run_id=f"{index:012d}"))
    start = time.process_time()
    collected = collect(tmp_path.glob("*.jsonl"))
    assert time.process_time() - start < 5
    assert len(set(collected.table.run_id)) == 10_000
