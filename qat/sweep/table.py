"""One table of all result rows, from files that any process may have left in any state.

A sweep's truth is its files of rows: workers die, disks fill, folders hold what others put there.
So the reader takes every row that is whole and says of everything else where it was and why it was
left out. A row is taken if it has the fields of `Row` and no others, each of its type, and, where
its status is "ok", finite numbers; then nothing that reads the table need check again. Only fields
that have a default may be missing.

Rows come several times: in a run's own file, in the merged table of last week, in a copy. What
makes two rows the same measurement is the key

    run_id, tokens, eval_set, ptq_method, ptq_quantizer, ptq_activations, ptq_kv_cache,
    ptq_calibration

for `run_id` is the hash of the whole config, with seed, budget and branch, and of the data; a run
that is evaluated on its way has rows of fewer tokens; and each model is evaluated as it is and
after every method, with its quantizers and calibration. All other fields follow from these or are
what was measured. Rows of one key that agree are one row; those that differ, even in the time a run
took, are two measurements, and only the first by file name can stand in a table that has every run
once. But a result stands before an attempt that failed or diverged, wherever each was found.

CSV has no types. Text is quoted, and cells are read as what the field is, so a hash of digits stays
text and the format "none" a word; floats have the digits that give the same float back.
"""

import csv
import dataclasses
import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import pandas as pd

from qat.spelling import expected_instead, expected_one_of, nearest
from qat.training.files import write_whole
from qat.training.results import DEFAULTS, Row

KEY = (
    "run_id",
    "tokens",
    "eval_set",
    "ptq_method",
    "ptq_quantizer",
    "ptq_activations",
    "ptq_kv_cache",
    "ptq_calibration",
)
STATUSES = ("ok", "diverged", "failed", "unfinished")
RESULTS = ("ok", "unfinished")  # statuses of what was measured as it was meant

_TYPES: dict[str, type] = get_type_hints(Row)
_DTYPES = {int: "int64", float: "float64", str: "str"}
_WORDS = {int: "a whole number", float: "a number", str: "text"}
_INT64 = range(-(2**63), 2**63)


@dataclasses.dataclass(frozen=True, eq=False)
class Collected:
    """What was found in files of rows.

    Attributes:
        table: one measurement a row; the fields of `Row` as columns, in order, as int64, float64
            and text. Ordered by file name, and as in the file.
        left_out: one line for each file or row that is not in the table: where, and why.
        unreadable: those of these lines that are of whole files.
        ignored: one line for each file with columns that no result row has.
    """

    table: pd.DataFrame
    left_out: tuple[str, ...]
    unreadable: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def collect(paths: Iterable[Path]) -> Collected:
    """Merges files of result rows; see above.

    Args:
        paths: ``.jsonl``, ``.csv`` and ``.parquet`` files, or compressed with ``.gz`` after that,
            in any order. One that cannot be read is left out like one that holds something else.
    """
    found: dict[tuple[Any, ...], tuple[str, dict[str, Any]]] = {}
    left_out, unreadable, ignored = list[str](), list[str](), list[str]()
    for path in sorted(set(paths), key=str):
        try:
            file = _read(path)
        except (OSError, ValueError, csv.Error) as error:
            unreadable.append(f"{path}: {_one_line(error)}")
            left_out.append(unreadable[-1])
            continue
        if file.others:
            ignored.append(
                f"{path}: columns that result rows lack: {', '.join(map(repr, file.others))}"
            )
        for number, raw in enumerate(file.rows, start=1):
            place = f"{path}, row {number}"
            try:
                _add(found, place, _checked(file.parse(raw)))
            except (ValueError, RecursionError) as error:
                left_out.append(f"{place}: {_one_line(error)}")
    table = _frame([row for _, row in found.values()])
    return Collected(table, tuple(left_out), tuple(unreadable), tuple(ignored))


def union(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The rows of several tables of `collect`: of one key a result if there is one, else the first.

    Ordered by table, and as in the table.
    """
    rows = pd.concat(tables, ignore_index=True)
    results_first = (~rows["status"].isin(RESULTS)).sort_values(kind="stable").index
    kept = rows.loc[results_first].drop_duplicates(list(KEY))
    return kept.sort_index().reset_index(drop=True)


def write(table: pd.DataFrame, workdir: Path) -> None:
    """Writes `rows.csv` and `rows.parquet`, each whole or not at all.

    `collect` reads the same table back from either.

    Args:
        table: that of `collect`.
        workdir: folder; made if it is missing.

    Raises:
        OSError: a file cannot be written; the one before is untouched.
    """
    write_whole(workdir / "rows.csv", as_csv(table))
    write_whole(workdir / "rows.parquet", table.to_parquet(index=False))


def as_csv(table: pd.DataFrame) -> str:
    """The table as text that `collect` reads back bit for bit."""
    text: str = table.to_csv(
        index=False, na_rep="NaN", quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n"
    )
    return text


def measured(table: pd.DataFrame) -> dict[str, dict[tuple[int, str, str], str]]:
    """By run id, the status of each of its rows by tokens, method and quantizer."""
    found: dict[str, dict[tuple[int, str, str], str]] = {}
    columns = ("run_id", "tokens", "ptq_method", "ptq_quantizer", "status")
    for run_id, *key, status in zip(*(table[name].tolist() for name in columns), strict=True):
        found.setdefault(run_id, {})[key[0], key[1], key[2]] = status
    return found


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of rows.

    Attributes:
        rows: as they lie there.
        parse: makes a dict of one.
        others: columns that result rows do not have.
    """

    rows: Sequence[Any]
    parse: Callable[[Any], Any]
    others: tuple[str, ...] = ()


def _read(path: Path) -> _File:
    """The rows of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no table of result rows.
    """
    compressed = path.suffix == ".gz"
    kind = Path(path.stem).suffix if compressed else path.suffix
    if kind not in _READERS:
        *most, last = _READERS
        raise ValueError(f"unknown kind of file {kind!r}: expected {', '.join(most)} or {last}")
    content = path.read_bytes()
    return _READERS[kind](_decompressed(content) if compressed else content)


def _decompressed(content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"damaged, or not compressed by gzip: {error}") from None


def _read_json_lines(content: bytes) -> _File:
    return _File(content.splitlines(), _from_json)


def _read_csv(content: bytes) -> _File:
    header, *rows = list(csv.reader(io.StringIO(content.decode(), newline=""))) or [[]]
    others = _other_columns(header)
    return _File(rows, lambda cells: _without(others, _from_cells(header, cells)), others)


def _read_parquet(content: bytes) -> _File:
    table = pd.read_parquet(io.BytesIO(content))
    others = _other_columns(list(table.columns))
    return _File(table.to_dict("records"), lambda row: _without(others, row), others)


_READERS: dict[str, Callable[[bytes], _File]] = {
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _add(
    found: dict[tuple[Any, ...], tuple[str, dict[str, Any]]], place: str, row: dict[str, Any]
) -> None:
    """Adds a row, unless its key has one that stands before it.

    Raises:
        ValueError: both are results, or neither, and they differ.
    """
    key = tuple(row[name] for name in KEY)
    first, kept = found.setdefault(key, (place, row))
    if row["status"] in RESULTS and kept["status"] not in RESULTS:
        found[key] = place, row
    elif (row["status"] in RESULTS) == (kept["status"] in RESULTS):
        _check_same(row, kept, first)


def _other_columns(names: list[str]) -> tuple[str, ...]:
    """Columns of a table that result rows do not have.

    Raises:
        ValueError: one that they have is missing, or there twice.
    """
    others = tuple(name for name in names if name not in _TYPES)
    if _TYPES.keys() - DEFAULTS.keys() <= set(names):
        names = [name for name in names if name in _TYPES]
    _check_fields(names)
    return others


def _without(others: Collection[str], row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in others}


def _from_json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"torn, or not JSON: {error}") from None


def _from_cells(header: list[str], cells: list[str]) -> dict[str, Any]:
    """A row from text; an empty cell of a float is NaN."""
    if len(cells) != len(header):
        raise ValueError(f"torn: expected {len(header)} cells, got {len(cells)}")
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for name, kind in _TYPES.items():
        if name not in row:
            continue
        try:
            row[name] = math.nan if kind is float and not row[name] else kind(row[name])
        except ValueError:
            raise ValueError(expected_instead(name, _WORDS[kind], row[name])) from None
    return row


def _check_fields(names: Collection[str]) -> None:
    """Raises ValueError for other fields than a result row's, or without those it must have."""
    for name in names:
        if name not in _TYPES:
            near = nearest(name, _TYPES)
            raise ValueError(f"not result rows: unknown field {name!r}, nearest is {near!r}")
    if missing := [name for name in _TYPES if name not in names and name not in DEFAULTS]:
        others = f" and {len(missing) - 1} others" if missing[1:] else ""
        raise ValueError(f"not result rows: field {missing[0]!r}{others} missing")
    if len(names) > len(set(names)):
        raise ValueError("not result rows: a field is there twice")


def _checked(row: Any) -> dict[str, Any]:
    """The fields of a row in their order and types.

    Raises:
        ValueError: something is missing, unknown, of another type or not finite.
    """
    if not isinstance(row, dict):
        raise ValueError(expected_instead("not a result row", "a JSON object", row))
    _check_fields(row)
    row = {**DEFAULTS, **row}
    fields = {name: _typed(name, kind, row[name]) for name, kind in _TYPES.items()}
    if fields["status"] not in STATUSES:
        raise ValueError(expected_one_of("status", fields["status"], STATUSES))
    if fields["status"] == "ok":
        for name, kind in _TYPES.items():
            if kind is float and not math.isfinite(fields[name]):
                expected = 'a finite number where status is "ok"'
                raise ValueError(expected_instead(name, expected, fields[name]))
    return fields


def _typed(name: str, kind: type, value: Any) -> Any:
    """The value as a field's type; a whole number may stand for a float.

    Raises:
        ValueError: it is something else, or no file could hold it.
    """
    if kind is float and type(value) is int and value in _INT64:
        return float(value)
    if type(value) is not kind or (kind is int and value not in _INT64):
        raise ValueError(expected_instead(name, _WORDS[kind], value))
    if kind is str:
        str(value).encode()  # a UnicodeEncodeError, which is a ValueError, for half a character
    return value


def _check_same(row: dict[str, Any], kept: dict[str, Any], first: str) -> None:
    """Raises ValueError where a row differs from the one of its key that is in the table."""
    differ = [name for name in _TYPES if repr(row[name]) != repr(kept[name])]  # nan is nan
    if differ:
        name = differ[0]
        raise ValueError(
            f"another row of run {row['run_id']}, {row['ptq_method']} {row['ptq_quantizer']}: "
            f"{name} = {row[name]!r}, but {kept[name]!r} in {first}, which is kept"
        )


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    columns = {
        name: pd.Series([row[name] for row in rows], dtype=_DTYPES[kind])
        for name, kind in _TYPES.items()
    }
    return pd.DataFrame(columns)


def _one_line(error: Exception) -> str:
    """What is wrong, without the name of a file."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return " ".join(str(reason).split())
