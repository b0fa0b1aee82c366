"""Whatever is typed, a query reads the catalog's tables, for a bounded time, or is refused.

Beside each statement lie a file with a secret, a variable with a secret and a server that counts
its visitors. None of them may be noticed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import started

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.query import QueryLimits, run_query
from sgcd_core.errors import UsageError

SECRET = "open-sesame-7f3a"


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    lake = Lake(str(tmp_path_factory.mktemp("lake")))
    row = {"model": "m", "model_version": 1, "target": "T", "site": "A", "sequence": "T1w"}
    Catalog(lake).append("results", [row | {"scan_id": "s0", "status": "ok"}])
    return lake


@pytest.fixture(scope="module")
def visitors() -> Iterator[tuple[int, list[str]]]:
    """Port of a server on this machine, and who came."""
    came: list[str] = []
    server = socket.create_server(("127.0.0.1", 0))

    def wait() -> None:
        while True:
            try:
                connection, address = server.accept()
            except OSError:
                return
            came.append(str(address))
            connection.close()

    threading.Thread(target=wait, daemon=True).start()
    yield server.getsockname()[1], came
    server.close()


REFUSED = [
    # files
    "SELECT * FROM read_csv('{file}')",
    "SELECT * FROM read_csv_auto(['{file}', '/etc/passwd'])",
    "SELECT * FROM read_parquet('{file}')",
    "SELECT * FROM read_text('{file}')",
    "SELECT * FROM read_blob('/proc/self/environ')",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM sniff_csv('{file}')",
    "SELECT * FROM '{file}'",
    'SELECT * FROM "{file}"',
    "SELECT (SELECT max(content) FROM read_text('{file}'))",
    "WITH x AS (SELECT * FROM read_text('{file}')) SELECT * FROM x",
    "SELECT * FROM results r, LATERAL (SELECT * FROM read_text('{file}')) t",
    "SELECT status FROM results UNION ALL SELECT content FROM read_text('{file}')",
    "COPY results TO '{folder}/out.csv'",
    "COPY (SELECT 1) TO '{folder}/out.parquet'",
    "COPY results FROM '{file}'",
    "EXPORT DATABASE '{folder}/out'",
    "IMPORT DATABASE '{folder}'",
    "ATTACH '{folder}/x.db' AS x",
    # network
    "SELECT * FROM read_csv('http://127.0.0.1:{port}/x.csv')",
    "SELECT * FROM 'http://127.0.0.1:{port}/x.parquet'",
    "SELECT * FROM 's3://bucket/x.parquet'",
    "ATTACH 'http://127.0.0.1:{port}/x.db' AS x",
    "COPY results TO 'http://127.0.0.1:{port}/x.csv'",
    # extensions, secrets, settings
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{folder}/evil.duckdb_extension'",
    "CREATE SECRET (TYPE s3, KEY_ID 'a', SECRET 'b')",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM duckdb_settings()",
    "SELECT current_setting('s3_secret_access_key')",
    "SET enable_external_access = true",
    "SET memory_limit = '100GB'",
    "RESET lock_configuration",
    "PRAGMA database_list",
    "CALL enable_logging()",
    # other statements, and statements in statements
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY results TO '{folder}/out.csv'",
    "CREATE TABLE t AS SELECT 1",
    "CREATE MACRO f() AS TABLE SELECT * FROM read_text('{file}')",
    "DROP VIEW results",
    "DELETE FROM results",
    "INSERT INTO results SELECT * FROM results",
    "BEGIN TRANSACTION",
    "EXPLAIN ANALYZE SELECT * FROM read_text('{file}')",
    "SELECT * FROM query('SELECT * FROM read_text(''{file}'')')",
    "SELECT * FROM query_table('{file}')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
    "SELECT * FROM python_map_function()",
    "",
]
INVALID = [
    "SELECT getenv('QUERY_TEST_SECRET')",
    "SELECT * FROM tables",  # a name in the memory of the process
    "SELECT * FROM",
    "SELECT nothing FROM results",
    "SELECT CAST('\x1b[2J' AS INTEGER)",
]
BOMBS = [
    "SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE a.range + b.range = 7",
    "WITH RECURSIVE t AS (SELECT 1 AS x UNION ALL SELECT x + 1 FROM t) SELECT count(*) FROM t",
    "SELECT sleep_ms(1000000)",
    "SELECT list_sum(list_sort(range(1000000000)))",
    "SELECT list(range) FROM range(1000000000)",
    "SELECT repeat(repeat('x', 100000000), 1000)",
    "SELECT string_agg(repeat('x', 1000000), '') FROM range(100000)",
    "SELECT count(*) FROM (SELECT DISTINCT a.range, b.range FROM range(100000) a, range(100000) b)",
    "SELECT range FROM range(1000000000)",
    "SELECT repeat('x', 1000000) FROM range(5000)",
    "SELECT " + "1 + " * 24_000 + "1",
    "SELECT " + "(" * 40_000 + "SELECT 1" + ")" * 40_000,
    "SELECT '" + "x" * 100_000 + "'",
]
#: Deep nesting may be too much for the parser or, flattened, harmless.
HARMLESS = BOMBS[-3:-1]
SMALL = QueryLimits(seconds=1, memory_mb=128, rows=10_000, result_mb=16)


def ended(lake: Lake, sql: str) -> UsageError | None:
    """How a statement ended; its process and its folder must be gone."""
    problem = None
    try:
        run_query(lake, sql, limits=SMALL)
    except UsageError as error:
        problem = error
    assert not started("pipelines.query_child")
    assert not list(Path(tempfile.gettempdir()).glob("sgcd-query-*"))
    return problem


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a secret in a file; another in the environment; temporary files lie here."""
    (tmp_path / "secret.csv").write_text(f"a,b\n1,{SECRET}\n")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in ("QUERY_TEST_SECRET", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    return tmp_path


@pytest.mark.parametrize("sql", REFUSED + INVALID)
def test_everything_but_reading_the_tables_is_refused(
    lake: Lake, folder: Path, visitors: tuple[int, list[str]], sql: str
) -> None:
    port, came = visitors
    before = sorted(folder.rglob("*"))
    text = sql.format(folder=folder, file=folder / "secret.csv", port=port)
    problem = ended(lake, text)
    assert problem is not None
    assert problem.code == ("QUERY-REFUSED" if sql in REFUSED else "QUERY-INVALID")
    assert problem.exit_code == 2
    said = str(problem)
    assert SECRET not in said and "root:" not in said
    assert all(c.isprintable() or c == "\n" for c in said)
    assert sorted(folder.rglob("*")) == before
    assert came == []


@pytest.mark.parametrize("sql", BOMBS, ids=[sql[:40] for sql in BOMBS])
def test_a_query_that_needs_too_much_is_ended(lake: Lake, folder: Path, sql: str) -> None:
    started = time.monotonic()
    problem = ended(lake, sql)
    assert time.monotonic() - started < 120  # a busy machine starts slowly; the limit is 1 s
    if problem is None:
        assert sql in HARMLESS
    else:
        assert problem.code == "QUERY-LIMIT" or sql in HARMLESS
    assert len(str(problem)) < 3000


def test_there_are_forty_of_them() -> None:
    assert len({*REFUSED, *INVALID, *BOMBS}) >= 40


def test_what_is_asked_for_in_bounds_is_answered(lake: Lake, folder: Path) -> None:
    assert run_query(lake, "SELECT status FROM results", limits=SMALL).num_rows == 1
    names = run_query(lake, "SHOW TABLES", limits=SMALL)["name"].to_pylist()
    assert {"scans", "results", "results_all", "metrics"} <= set(names)


def test_the_operating_system_refuses_files_and_sockets_too(folder: Path) -> None:
    code = f"""
import socket
from pipelines.query_child import QueryLimits, _confine
_confine(QueryLimits(seconds=1))
for what in (lambda: open({str(folder / "secret.csv")!r}), lambda: open("new", "w"), socket.socket):
    try:
        what()
    except OSError as error:
        print(error.errno)
"""
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder,
        env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    assert done.stdout.split() == ["24", "24", "24"], done.stderr  # EMFILE
    assert not (folder / "new").exists()
