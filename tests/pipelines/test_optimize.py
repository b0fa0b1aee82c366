"""Fewer files, the same rows; old files go when nobody can be reading them any more."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from pipelines.catalog import Catalog
from pipelines.delta import PROPERTIES
from pipelines.lake import Lake
from pipelines.optimize import optimize
from sgcd_core.errors import ConfigError, StorageError, UsageError


def result(scan_id: str, **values: Any) -> dict[str, Any]:
    return {
        "scan_id": scan_id, "site": "A", "sequence": "T1w", "model": "m", "model_version": 1,
        "target": "T", "status": "ok",
    } | values  # fmt: skip


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Six commits in two sites, one of them oddly named; one scan twice; transaction ids."""
    catalog = Catalog(Lake.open(str(tmp_path / "lake"), create=True))
    for number in range(6):
        rows = [result(f"s{number}"), result(f"t{number}", site="S/1 %20#ä")]
        catalog.append("results", rows, txn=f"b{number}")
    catalog.append("results", [result("s0", status="flagged")])
    return catalog


def replaced_long_ago(catalog: Catalog, days: float) -> None:
    """Set back the time at which the log says that files were replaced."""
    for path in Path(catalog.lake.table("results"), "_delta_log").iterdir():
        if path.suffix != ".json":
            path.unlink()  # a checkpoint would have it too
            continue
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            if "remove" in line:
                line["remove"]["deletionTimestamp"] = int((time.time() - days * 86400) * 1000)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def parquet_files(catalog: Catalog) -> int:
    return len(list(Path(catalog.lake.table("results")).rglob("part-*.parquet")))


def test_compaction_keeps_every_row_and_their_order(catalog: Catalog) -> None:
    before, rows = catalog.history("results"), catalog.rows("results")
    (done,) = optimize(catalog)
    assert (done.rows, done.files_before, done.files_after, done.removed) == (13, 13, 2, 0)
    assert catalog.history("results").equals(before)
    assert catalog.rows("results").equals(rows)
    assert catalog.append("results", [result("s1")], txn="b1") is False  # ids are remembered
    (again,) = optimize(catalog)
    assert (again.files_before, again.files_after, again.removed) == (2, 2, 0)


def test_a_dry_run_changes_nothing_and_foretells(catalog: Catalog) -> None:
    version = catalog.version("results")
    (told,) = optimize(catalog, dry_run=True)
    assert catalog.version("results") == version
    assert told == optimize(catalog)[0]


def test_within_the_horizon_old_versions_and_running_readers_find_their_files(
    catalog: Catalog,
) -> None:
    reader = DeltaTable(catalog.lake.table("results"))  # opened, nothing read yet
    old = catalog.history("results", as_of=3)
    optimize(catalog)
    replaced_long_ago(catalog, days=6)
    assert optimize(catalog, keep=timedelta(days=7))[0].removed == 0
    assert catalog.history("results", as_of=3).equals(old)
    assert pa.table(reader.scan()).num_rows == 13


def test_beyond_the_horizon_files_go_and_the_rows_stay(catalog: Catalog) -> None:
    rows = catalog.history("results")
    moment = rows["recorded_at"].to_pylist()[5]
    optimize(catalog)
    replaced_long_ago(catalog, days=8)
    assert parquet_files(catalog) == 15
    assert optimize(catalog, keep=timedelta(days=7), dry_run=True)[0].removed == 13
    assert parquet_files(catalog) == 15
    assert optimize(catalog, keep=timedelta(days=7))[0].removed == 13
    assert parquet_files(catalog) == 2
    assert catalog.history("results").equals(rows)
    # A date does not need the old files; a version does, and says so.
    assert catalog.history("results", as_of=moment).equals(rows.slice(0, 6))
    with pytest.raises(StorageError, match="no version 3; its files are gone") as caught:
        catalog.history("results", as_of=3)
    assert caught.value.code == "TABLE-VERSION"


@pytest.mark.parametrize("days", [0, 0.5, 401])
def test_a_horizon_that_would_break_readers_is_refused(catalog: Catalog, days: float) -> None:
    with pytest.raises(ConfigError, match="kept for 1 to 400 days"):
        optimize(catalog, keep=timedelta(days=days))


def test_tables_are_append_only_whoever_writes(catalog: Catalog) -> None:
    table = DeltaTable(catalog.lake.table("results"))
    assert table.metadata().configuration == PROPERTIES
    with pytest.raises(Exception, match="append-only"):
        table.delete("site = 'A'")


def test_a_table_from_before_gets_the_properties(catalog: Catalog) -> None:
    DeltaTable.create(
        catalog.lake.table("runs"), pa.schema([("run_id", pa.string()), ("status", pa.string())])
    )
    optimize(catalog, tables=["runs"])
    assert DeltaTable(catalog.lake.table("runs")).metadata().configuration == PROPERTIES
    assert catalog.append("runs", [{"run_id": "r"}]) is True


def test_an_unknown_table_is_named(catalog: Catalog) -> None:
    with pytest.raises(UsageError, match="no table 'result'; nearest: results"):
        optimize(catalog, tables=["result"])


@pytest.mark.s3
def test_the_same_on_s3(s3_server: Any) -> None:
    catalog = Catalog(Lake.open(s3_server.uri("optimize-test"), create=True))
    for number in range(3):
        catalog.append("results", [result(f"s{number}")])
    rows = catalog.history("results")
    (done,) = optimize(catalog)
    assert (done.files_before, done.files_after) == (3, 1)
    assert catalog.history("results").equals(rows)
    assert catalog.history("results", as_of=2).num_rows == 2
