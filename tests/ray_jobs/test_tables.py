"""`sgcd query`, `optimize` and `export` as an analyst types them."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from ray_jobs import cli


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    lake = Lake.open(str(tmp_path_factory.mktemp("lake") / "lake"), create=True)
    row = {"sequence": "T1w", "status": "ok"}
    for site in "AB":
        scan = row | {"scan_id": f"s{site}", "site": site, "uri": f"/{site}", "age": 30.5}
        Catalog(lake).append("scans", [scan])
    return lake.uri


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_what_tables_and_columns_there_are(lake: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "query", "--tables", "--lake", lake, "--json")
    tables = {row["table"]: row for row in json.loads(out)["rows"]}
    assert code == 0
    assert (tables["scans"]["rows"], tables["scans"]["files"], tables["scans"]["version"]) == (
        2, 2, 2,
    )  # fmt: skip
    assert tables["runs"]["version"] is None
    assert run(capsys, "query", "--tables", "--lake", lake, "--out", "t.csv")[0] == 2
    code, out, _ = run(capsys, "query", "--schema", "scans", "--lake", lake)
    assert code == 0
    line = next(line for line in out.splitlines() if " age " in line)
    assert line.split() == ["scans", "age", "double", "years", "age", "at", "the", "scan"]
    code, _, err = run(capsys, "query", "--schema", "scan", "--lake", lake)
    assert code == 2
    assert "nearest: scans" in err


def test_results_go_where_they_are_wanted(
    lake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sql = "SELECT site, age FROM scans ORDER BY site"
    code, out, _ = run(capsys, "query", sql, "--lake", lake, "--format", "csv")
    assert (code, out) == (0, "site,age\nA,30.5\nB,30.5\n")
    target = tmp_path / "new" / "found.parquet"
    code, out, _ = run(capsys, "query", sql, "--lake", lake, "--out", str(target))
    assert (code, out) == (0, f"2 rows in {target}\n")
    assert pq.read_table(target)["site"].to_pylist() == ["A", "B"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(sql + " DESC -- from a file\n"))
    code, out, _ = run(capsys, "query", "-", "--lake", lake, "--json")
    assert [row["site"] for row in json.loads(out)["rows"]] == ["B", "A"]


def test_two_columns_of_one_name_are_both_shown(
    lake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sql = "SELECT a.site, b.site FROM scans a, scans b WHERE a.site < b.site"
    code, out, _ = run(capsys, "query", sql, "--lake", lake)
    assert code == 0
    assert [line.split() for line in out.splitlines()[::2]] == [["site", "site_1"], ["A", "B"]]
    code, out, _ = run(capsys, "query", sql, "--lake", lake, "--json")
    assert (code, json.loads(out)["rows"]) == (0, [{"site": "A", "site_1": "B"}])
    code, out, _ = run(capsys, "query", sql, "--lake", lake, "--format", "csv")
    assert (code, out) == (0, "site,site_1\nA,B\n")
    target = tmp_path / "both.parquet"
    assert run(capsys, "query", sql, "--lake", lake, "--out", str(target))[0] == 0
    assert pq.read_table(target).to_pylist() == [{"site": "A", "site_1": "B"}]


def test_a_refusal_is_one_line_with_a_code(lake: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "query", "DROP VIEW scans", "--lake", lake, "--json")
    assert code == 2
    assert json.loads(out)["code"] == "QUERY-REFUSED"
    assert err.startswith("sgcd query: [QUERY-REFUSED]") and err.count("\n") == 1
    code, _, err = run(capsys, "query", "--lake", lake)
    assert code == 2 and "--tables" in err


def test_optimize_removes_what_killed_writers_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    folder = tmp_path / "lake" / "derivatives" / "global-v1" / "sub-1"
    folder.mkdir(parents=True)
    old, young, kept = (folder / n for n in (".sgcd-tmp-1-a", ".sgcd-tmp-2-b", "sub-1_T1w.json"))
    for file in (old, young, kept):
        file.write_bytes(b"{")
    for file in (old, kept):
        os.utime(file, (0, 0))
    code, out, _ = run(capsys, "optimize", "--lake", lake.uri, "--dry-run")
    assert code == 0 and "1 unfinished file of killed writers" in out
    assert old.exists()
    assert run(capsys, "optimize", "--lake", lake.uri, "--tables", "scans")[0] == 0
    assert old.exists()  # only what was named
    code, out, _ = run(capsys, "optimize", "--lake", lake.uri, "--json")
    assert (code, json.loads(out)["leftovers"]) == (0, 1)
    assert not old.exists() and young.exists() and kept.exists()
    code, out, _ = run(capsys, "optimize", "--lake", lake.uri)
    assert code == 0 and "unfinished" not in out


def test_optimize_and_export(lake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "optimize", "--lake", lake, "--dry-run")
    assert code == 0
    assert "would make 2 files 1, and remove 0" in out
    assert out.rstrip().endswith(f"next: sgcd optimize --lake {lake}")
    code, out, _ = run(capsys, "optimize", "--lake", lake, "--json")
    assert json.loads(out)["tables"] == [
        {"table": "scans", "rows": 2, "files_before": 2, "files_after": 1, "removed": 0}
    ]
    code, _, err = run(capsys, "optimize", "--lake", lake, "--keep-days", "0")
    assert code == 78 and "1 to 400 days" in err
    code, out, _ = run(capsys, "export", "--lake", lake, "--out", str(tmp_path))
    assert (code, out) == (0, f"2 rows in 6 files in {tmp_path}\n")
    assert pq.read_table(tmp_path / "scans.parquet").num_rows == 2
    code, _, err = run(capsys, "export", "--lake", lake, "--out", str(tmp_path), "--as-of", "3")
    assert code == 2 and "takes a date" in err
