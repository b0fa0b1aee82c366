"""An analyst reads the tables and nothing else."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.query import parse_as_of, run_query
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
    history = run_query(lake, "SELECT count(*) AS n FROM results_all WHERE status = 'failed'")
    assert history["n"].to_pylist() == [4]


def test_columns_of_one_name_all_come_out(lake: Lake) -> None:
    sql = "SELECT 1 AS status, 2 AS status, 3 AS status_1, 4 AS status, 5 AS status"
    found = run_query(lake, sql).to_pylist()
    assert found == [{"status": 1, "status_2": 2, "status_1": 3, "status_3": 4, "status_4": 5}]


def test_sums_of_whole_numbers_are_whole_numbers(lake: Lake) -> None:
    sql = "SELECT sum(model_version) AS n, sum(9223372036854775807::HUGEINT) AS m FROM results"
    found = run_query(lake, sql)
    assert found.schema.field("n").type == pa.int64()
    assert found.to_pylist() == [{"n": 4, "m": 4 * (2**63 - 1)}]


def test_days_are_those_of_utc(lake: Lake) -> None:
    sql = "SELECT CAST(TIMESTAMPTZ '2026-03-01 23:30:00Z' AS VARCHAR) AS at"
    assert run_query(lake, sql)["at"].to_pylist() == ["2026-03-01 23:30:00+00"]


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
    for wrong in ("yesterday", "nope=1", "results=x", "²", "results=²"):
        with pytest.raises(UsageError, match="--as-of"):
            parse_as_of(wrong)


def test_a_version_belongs_to_one_table(lake: Lake) -> None:
    both = "SELECT count(*) FROM results, scans"
    with pytest.raises(UsageError, match="belongs to one table"):
        run_query(lake, both, as_of=1)
    assert run_query(lake, both, as_of="results=1").num_rows == 1


def test_a_date_needs_no_old_files_and_never_cuts_a_batch(lake: Lake) -> None:
    catalog = Catalog(lake)
    stamps = catalog.history("results")["recorded_at"].to_pylist()
    sql = "SELECT status, count(*) AS n FROM results_all GROUP BY status ORDER BY status"
    failed, both = [{"status": "failed", "n": 4}], [4, 4]
    # The first batch has four rows, a microsecond apart.
    for moment in (stamps[0], stamps[3], stamps[4] - timedelta(microseconds=1)):
        assert run_query(lake, sql, as_of=moment).to_pylist() == failed
        assert run_query(lake, sql, as_of=moment.isoformat()).to_pylist() == failed
    assert run_query(lake, sql, as_of=stamps[5])["n"].to_pylist() == both
    assert run_query(lake, sql, as_of="2000-01-01").num_rows == 0


def test_a_misspelt_name_is_answered_with_the_nearest(lake: Lake) -> None:
    for sql, said in (
        ("SELECT sites FROM results", "no column 'sites' in results; nearest: site"),
        ("SELECT r.secondsmodel FROM results r", "nearest: seconds_model"),
        ("SELECT * FROM reslts", "no table 'reslts'; nearest: results"),
    ):
        with pytest.raises(UsageError) as caught:
            run_query(lake, sql)
        assert caught.value.code == "QUERY-INVALID"
        assert said in str(caught.value)


def test_a_filter_on_partitions_opens_no_other_file(tmp_path: Path) -> None:
    catalog = Catalog(Lake.open(str(tmp_path), create=True))
    base = {"model": "m", "model_version": 1, "sequence": "T1w", "status": "ok"}
    rows = [
        base | {"scan_id": f"{target}{site}", "target": target, "site": site}
        for target in "TU"
        for site in "ABC"
    ]
    catalog.append("results", rows)
    gone = [p for p in tmp_path.glob("catalog/results/target=*/**/*.parquet")
            if "/target=T/site=B/" not in str(p)]  # fmt: skip
    assert len(gone) == 5
    for file in gone:
        file.unlink()
    where = "WHERE target = 'T' AND site = 'B' AND sequence = 'T1w'"
    for view in ("results", "results_all"):
        found = catalog.query(f"SELECT scan_id FROM {view} {where}")
        assert found["scan_id"].to_pylist() == ["TB"]
    with pytest.raises(StorageError):
        catalog.query("SELECT scan_id FROM results WHERE target = 'T'")


def test_a_corrected_site_is_not_answered_with_the_old_row(tmp_path: Path) -> None:
    catalog = Catalog(Lake.open(str(tmp_path), create=True))
    base = {"model": "m", "model_version": 1, "target": "T", "sequence": "T1w", "status": "ok"}
    for site in ("wrong", "right"):
        scan = {"scan_id": "s", "site": site, "sequence": "T1w", "uri": "u", "status": "ok"}
        catalog.append("scans", [scan])
        catalog.append("results", [base | {"scan_id": "s", "site": site}])
    count = "SELECT count(*) AS n FROM {} WHERE target = 'T' AND site = 'wrong'"
    assert catalog.query(count.format("results"))["n"].to_pylist() == [0]
    assert catalog.query(count.format("results_all"))["n"].to_pylist() == [1]


def test_both_views_of_a_table_are_one_snapshot(lake: Lake) -> None:
    latest = "SELECT count(*) FROM results WHERE site = 'A'"
    sql = f"SELECT ({latest}) AS a, count(*) AS n FROM results_all"
    assert run_query(lake, sql).to_pylist() == [{"a": 2, "n": 8}]


@pytest.mark.s3
def test_the_python_door_on_s3(s3_server: Any) -> None:
    lake = Lake.open(s3_server.uri("query-test"), create=True)
    row = {"model": "m", "model_version": 1, "target": "T", "sequence": "T1w", "status": "ok"}
    Catalog(lake).append("results", [row | {"scan_id": site, "site": site} for site in "AB"])
    door = Catalog(lake.uri)
    found = door.query("SELECT scan_id FROM results WHERE target = 'T' AND site = 'B'")
    assert found["scan_id"].to_pylist() == ["B"]
    assert door.tables()[1]["rows"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize("limit", ["-v 6000000", "-t 100"])
def test_a_query_works_under_an_administrators_limits(lake: Lake, limit: str) -> None:
    code = (
        "from pipelines.lake import Lake; from pipelines.query import run_query;"
        f"print(run_query(Lake({lake.uri!r}), 'SELECT count(*) AS n FROM results')['n'][0])"
    )
    command = f"ulimit {limit}; exec {shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr[-2000:]


def test_packages_may_lie_where_only_this_program_knows(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own site-packages, PYTHONPATH, a module system: all are in sys.path."""
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    seen: list[str] = []
    real = subprocess.Popen

    def popen(*words: Any, env: dict[str, str], **options: Any) -> Any:
        seen.append(env["PYTHONPATH"])
        return real(*words, env=env, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    assert run_query(lake, "SELECT 1 AS one").num_rows == 1
    assert str(tmp_path / "packages") in seen[0].split(os.pathsep)
