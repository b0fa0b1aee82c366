"""An analyst reads the tables and nothing else."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.query import QueryLimits, format_result, parse_as_of, run_query
from sgcd_core.errors import StorageError, UsageError


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    lake = Lake(str(tmp_path_factory.mktemp("lake")))
    catalog = Catalog(lake)
    row = {"model": "m", "model_version": 1, "target": "T", "sequence": "T1w"}
    for status in ("failed", "ok"):
        rows = [
            row | {"scan_id": f"s{i}", "site": "AB"[i % 2], "status": status, "seconds_model": i}
            for i in range(4)
        ]
        catalog.append("results", rows)
    return lake


def test_sql_sees_the_latest_rows_and_the_history(lake: Lake) -> None:
    sql = "SELECT site, count(*) AS n, sum(seconds_model) AS s FROM results GROUP BY 1 ORDER BY 1"
    assert run_query(lake, sql).to_pylist() == [
        {"site": "A", "n": 2, "s": 2.0},
        {"site": "B", "n": 2, "s": 4.0},
    ]
    history = run_query(lake, "SELECT count(*) AS n FROM results_history WHERE status = 'failed'")
    assert history["n"].to_pylist() == [4]


def test_a_table_nobody_wrote_to_is_empty(lake: Lake) -> None:
    assert run_query(lake, "SELECT scan_id FROM scans").num_rows == 0


def test_as_of_reads_an_old_version(lake: Lake) -> None:
    sql = "SELECT DISTINCT status FROM results"
    assert run_query(lake, sql)["status"].to_pylist() == ["ok"]
    assert run_query(lake, sql, as_of="results=1")["status"].to_pylist() == ["failed"]
    with pytest.raises(StorageError, match="no version 99"):
        run_query(lake, sql, as_of="99")
    assert parse_as_of("results=1,scans=2") == {"results": 1, "scans": 2}
    assert str(parse_as_of("2026-03-01T12:00")) == "2026-03-01 12:00:00+00:00"
    for wrong in ("yesterday", "nope=1", "results=x"):
        with pytest.raises(UsageError, match="--as-of"):
            parse_as_of(wrong)


ATTACKS = [
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM read_text('/proc/self/environ')",
    "SELECT * FROM glob('/*')",
    "COPY results TO '{folder}/out.csv'",
    "ATTACH '{folder}/x.db' AS x",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "SET memory_limit = '100GB'",
    "SELECT 1; SET threads = 64",
    "PRAGMA database_list",
    "CREATE TABLE t AS SELECT 1",
    "DROP VIEW results",
    "DELETE FROM results",
    "SELECT * FROM tables",
    "SELECT * FROM",
    "",
]


@pytest.mark.parametrize("sql", ATTACKS)
def test_everything_but_reading_the_tables_is_refused(lake: Lake, tmp_path: Path, sql: str) -> None:
    with pytest.raises(UsageError) as caught:
        run_query(lake, sql.format(folder=tmp_path))
    assert caught.value.exit_code == 2
    assert "root:" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_no_credentials_reach_the_query(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "open-sesame")
    try:
        got = str(run_query(lake, "SELECT getenv('AWS_SECRET_ACCESS_KEY') AS k").to_pylist())
    except UsageError as error:
        got = str(error)
    assert "open-sesame" not in got


def test_a_query_that_does_not_end_is_stopped(lake: Lake) -> None:
    bomb = "SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE a.range + b.range = 7"
    started = time.monotonic()
    with pytest.raises(UsageError, match="stopped after 3 s"):
        run_query(lake, bomb, limits=QueryLimits(seconds=3))
    assert time.monotonic() - started < 10


def test_memory_and_result_size_are_bounded(lake: Lake) -> None:
    with pytest.raises(UsageError, match="more than 100 rows"):
        run_query(lake, "SELECT * FROM range(1000)", limits=QueryLimits(rows=100))
    with pytest.raises(UsageError):
        run_query(
            lake,
            "SELECT list(range) FROM range(100000000)",
            limits=QueryLimits(memory_mb=64, seconds=30),
        )


def test_formats(lake: Lake) -> None:
    sql = "SELECT scan_id, site, seconds_model FROM results ORDER BY 1"
    table = run_query(lake, sql)
    text = format_result(table, "table").decode()
    assert text.splitlines()[0].split() == ["scan_id", "site", "seconds_model"]
    assert text.splitlines()[-1] == "(4 rows)"
    rows = list(csv.DictReader(io.StringIO(format_result(table, "csv").decode())))
    assert rows[3] == {"scan_id": "s3", "site": "B", "seconds_model": "3.0"}
    assert json.loads(format_result(table, "json")) == table.to_pylist()
    assert pq.read_table(io.BytesIO(format_result(table, "parquet"))).equals(table)
    with pytest.raises(UsageError, match="no format 'xml'"):
        format_result(table, "xml")


def test_a_cell_cannot_drive_the_terminal(lake: Lake) -> None:
    table = run_query(lake, "SELECT 'a' || chr(27) || '[2Jb' AS x")
    assert b"\x1b" not in format_result(table, "table")
