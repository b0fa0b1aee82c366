"""The result as text for people and as files for programs."""

from __future__ import annotations

import csv
import io
import json
import math
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.query_format import format_of, format_result, plain_rows
from sgcd_core.errors import UsageError

TABLE = pa.table(
    {"scan_id": ["s0", "s1"], "seconds": [0.5, 3.0], "version": pa.array([7, None], pa.int64())}
)


def test_formats() -> None:
    text = format_result(TABLE, "table").decode()
    assert text.splitlines()[0].split() == ["scan_id", "seconds", "version"]
    assert text.splitlines()[-1] == "(2 rows)"
    rows = list(csv.DictReader(io.StringIO(format_result(TABLE, "csv").decode())))
    assert rows[0] == {"scan_id": "s0", "seconds": "0.5", "version": "7"}
    assert rows[1]["version"] == ""
    assert json.loads(format_result(TABLE, "json")) == TABLE.to_pylist()
    assert pq.read_table(io.BytesIO(format_result(TABLE, "parquet"))).equals(TABLE)
    with pytest.raises(UsageError, match="no format 'xml'"):
        format_result(TABLE, "xml")


def test_json_has_no_nan_and_times_in_iso() -> None:
    moment = datetime(2026, 3, 1, tzinfo=UTC)
    table = pa.table({"x": [float("nan")], "at": [moment], "sides": [[1.0, float("inf")]]})
    assert json.loads(format_result(table, "json"), parse_constant=pytest.fail) == [
        {"x": None, "at": "2026-03-01T00:00:00+00:00", "sides": [1.0, None]}
    ]


def test_numbers_beyond_64_bits_and_long_lists_are_whole() -> None:
    lists = [list(range(1200)), [1 / 3, math.nan], None]
    table = pa.table({
        "n": pa.array([2**70, 1, None], pa.decimal128(38, 0)),
        "share": pa.array(["0.25", "7", None]).cast(pa.decimal128(9, 2)),
        "list": pa.array(lists, pa.list_(pa.float64())),
        "struct": [{"a": "ä"}, None, None],
    })  # fmt: skip
    first, second, _ = plain_rows(table)
    assert (first["n"], first["share"], second["share"]) == (2**70, 0.25, 7)
    text = format_result(table, "csv").decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert json.loads(rows[0]["list"]) == lists[0] and rows[1]["list"] == f"[{1 / 3}, null]"
    assert (rows[0]["struct"], rows[0]["n"], rows[2]["list"]) == ('{"a": "ä"}', str(2**70), "")
    assert format_result(table.select(["n"])).decode().splitlines()[3].endswith(" 1")


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.timestamp("us", "UTC"), pa.date32()])
@pytest.mark.parametrize("format", ["table", "csv", "json"])
def test_infinity_as_a_date_is_to_be_asked_for_as_text(kind: pa.DataType, format: str) -> None:
    bits = pa.int32() if pa.types.is_date(kind) else pa.int64()
    infinity = pa.array([0, 2 ** (bits.bit_width - 1) - 1], bits).cast(kind)  # as DuckDB has it
    with pytest.raises(UsageError, match="AS VARCHAR") as caught:
        format_result(pa.table({"at": infinity}), format)
    assert caught.value.code == "QUERY-INVALID"


def test_a_span_of_time_is_no_column_of_a_parquet_file() -> None:
    spans = pa.array([(1, 2, 3)], pa.month_day_nano_interval())
    with pytest.raises(UsageError, match="parquet output cannot"):
        format_result(pa.table({"span": spans}), "parquet")


def test_a_span_of_time_is_written_as_sql_has_it() -> None:
    spans = pa.array(
        [(1, -2, 5_400_500_000_000), (0, 0, -90_000_000_000), None, (0, 0, 0)],
        pa.month_day_nano_interval(),
    )
    found = pa.table({"span": spans})
    words = ["1 month -2 days 01:30:00.5", "-00:01:30", None, "00:00:00"]
    assert [row["span"] for row in plain_rows(found)] == words
    lines = format_result(found, "csv").decode().splitlines()
    assert [line.strip('"') or None for line in lines[1:]] == words
    assert "1 month -2 days 01:30:00.5" in format_result(found, "table").decode()


def test_another_programs_ending_is_not_given_the_terminals_table() -> None:
    for name in ("a.tsv", "s3://b/a.xlsx"):
        with pytest.raises(UsageError, match="--format"):
            format_of(name)
    assert [format_of(name) for name in ("s3://b.c/a", "a.2024-05", "a.")] == ["table"] * 3


def test_the_file_name_says_the_format() -> None:
    assert [format_of(name) for name in ("a.CSV", "s3://b/a.parquet", "a.txt", None)] == [
        "csv", "parquet", "table", "table",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "a\nb", "a\u202eb"])
def test_a_cell_cannot_drive_the_terminal(text: str) -> None:
    shown = format_result(pa.table({"x": [text]}), "table").decode()
    assert shown.splitlines()[2] == "a�" + text[2:]
