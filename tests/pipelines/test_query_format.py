"""The result as text for people and as files for programs."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.query_format import format_of, format_result
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


def test_the_file_name_says_the_format() -> None:
    assert [format_of(name) for name in ("a.CSV", "s3://b/a.parquet", "a.txt", None)] == [
        "csv", "parquet", "table", "table",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "a\nb", "a\u202eb"])
def test_a_cell_cannot_drive_the_terminal(text: str) -> None:
    shown = format_result(pa.table({"x": [text]}), "table").decode()
    assert shown.splitlines()[2] == "a�" + text[2:]
