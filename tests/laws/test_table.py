"""Reading runs: what absent bits mean, what is left out, and how bad values are named."""

import numpy as np
import pandas as pd
import pytest

from qat.laws import as_table, read_table


def frame(**columns):
    base = {"params": [1e7, 2e7, 4e7], "tokens": [1e9, 2e9, 4e9], "loss": [3.5, 3.2, 3.0]}
    return pd.DataFrame(base | columns)


def test_absent_bits_mean_unquantized():
    table = as_table(frame(weight_bits=[2, 4, 16]))
    columns = table.columns(["weight_bits", "activation_bits", "kv_bits", "ptq_bits"])
    np.testing.assert_array_equal(columns["weight_bits"], [2.0, 4.0, 16.0])
    for name in ("activation_bits", "kv_bits", "ptq_bits"):
        np.testing.assert_array_equal(columns[name], [16.0] * 3)
        assert columns[name].dtype == np.float64


def test_empty_ptq_bits_mean_none_but_other_empty_bits_are_an_error():
    table = as_table(frame(ptq_bits=[np.nan, 16, 3]))
    np.testing.assert_array_equal(table.columns(["ptq_bits"])["ptq_bits"], [16.0, 16.0, 3.0])
    with pytest.raises(ValueError, match=r"kv_bits must be in \(0, 16\].*row 1 has nan"):
        as_table(frame(kv_bits=[16, np.nan, 3]))


def test_rows_that_are_not_ok_are_left_out_and_counted():
    runs = frame(status=["ok", "diverged", "ok"], loss=[3.5, np.nan, 3.0])
    table = as_table(runs)
    assert len(table) == 2
    assert table.left_out == 1
    assert list(table.frame.index) == [0, 2]
    assert len(runs) == 3
    assert "weight_bits" not in runs


def test_other_columns_are_kept():
    table = as_table(frame(seed=[0, 1, 2], group=["a", "a", "b"]))
    assert list(table.frame["group"]) == ["a", "a", "b"]
    assert list(table.frame["seed"]) == [0, 1, 2]


def test_a_table_passes_through():
    table = as_table(frame())
    assert as_table(table) is table


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet"])
def test_files_hold_the_same_table(tmp_path, suffix):
    runs = frame(ptq_bits=[np.nan, 4, 3], group=["a", "b", "c"])
    path = tmp_path / f"runs{suffix}"
    if suffix.startswith(".csv"):
        runs.to_csv(path, index=False)
    elif suffix.startswith(".jsonl"):
        runs.to_json(path, orient="records", lines=True)
    else:
        pytest.importorskip("pyarrow")
        runs.to_parquet(path)
    pd.testing.assert_frame_equal(read_table(path).frame, as_table(runs).frame, check_dtype=False)


def test_unknown_suffix_names_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match=r"'runs.xlsx'.*\.csv, \.parquet, \.jsonl"):
        read_table(tmp_path / "runs.xlsx")


@pytest.mark.parametrize(
    ("column", "values", "value"),
    [
        ("loss", [3.5, -0.25, 3.0], "-0.25"),
        ("loss", [3.5, np.inf, 3.0], "inf"),
        ("loss", [3.5, np.nan, 3.0], "nan"),
        ("loss", ["3.5", "oops", "3.0"], "oops"),
        ("params", [1e7, 0, 1e7], "0"),
        ("tokens", [1e9, -1e9, 1e9], "-1000000000.0"),
        ("weight_bits", [16, 0, 16], "0"),
        ("activation_bits", [16, 32, 16], "32"),
        ("ptq_bits", [16, -4, 16], "-4"),
    ],
)
def test_a_bad_value_is_named_with_its_row(column, values, value):
    with pytest.raises(ValueError, match=rf"{column} must be .*; row 1 has {value}"):
        as_table(frame(**{column: values}))


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match=r"no column tokens, loss; its columns are params"):
        as_table(pd.DataFrame({"params": [1e7]}))
    table = as_table(frame().drop(columns="loss"), required=("params", "tokens"))
    with pytest.raises(ValueError, match="no column loss"):
        as_table(table)
    with pytest.raises(ValueError, match="no column group_size"):
        table.columns(["params", "group_size"])


def test_a_column_that_is_read_must_be_numeric():
    table = as_table(frame(group_size=[32, 64, "all"]))
    with pytest.raises(ValueError, match="group_size must be a finite number; row 2 has all"):
        table.columns(["group_size"])


def test_no_usable_row_is_an_error():
    with pytest.raises(ValueError, match="3 rows, none with status 'ok'"):
        as_table(frame(status=["failed"] * 3))
