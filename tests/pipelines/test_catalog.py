"""The tables: what was appended is read back, once, as the latest row of each key."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines import catalog as catalog_module
from pipelines.catalog import Catalog
from pipelines.catalog_docs import reference_markdown, with_reference
from pipelines.delta import storage_error
from pipelines.lake import Lake
from pipelines.schemas import SCHEMAS
from sgcd_core.errors import StorageError, UsageError
from sgcd_core.io.store import Store


def scan(scan_id: str, **values: Any) -> dict[str, Any]:
    row = {
        "scan_id": scan_id, "dataset": "d", "subject": "01", "session": "a", "site": "A",
        "sequence": "T1w", "split": "train", "uri": f"/data/{scan_id}.nii.gz",
        "shape": [48, 56, 48], "voxel_mm": [4.0, 4.0, 4.0], "status": "ok",
    }  # fmt: skip
    return row | values


def result(scan_id: str, **values: Any) -> dict[str, Any]:
    row = {
        "scan_id": scan_id, "subject": "01", "site": "A", "sequence": "T1w", "model": "m",
        "model_version": 1, "target": "B", "status": "ok",
    }  # fmt: skip
    return row | values


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(Lake(str(tmp_path / "lake")))


@pytest.mark.parametrize("table", sorted(SCHEMAS))
def test_a_table_nobody_wrote_to_is_empty_with_its_schema(catalog: Catalog, table: str) -> None:
    rows = catalog.rows(table)
    assert rows.num_rows == 0
    assert rows.schema.equals(SCHEMAS[table].arrow)
    assert catalog.version(table) is None


def test_the_latest_row_of_a_key_is_read_and_the_history_keeps_all(catalog: Catalog) -> None:
    catalog.append("results", [result("s1", status="failed", code="SCAN-FAILED"), result("s2")])
    catalog.append("results", [result("s1", status="ok", seconds_model=1.5)])
    rows = catalog.rows("results").to_pylist()
    assert [(r["scan_id"], r["status"]) for r in rows] == [("s1", "ok"), ("s2", "ok")]
    assert rows[0]["seconds_model"] == 1.5
    assert rows[0]["code"] is None
    assert catalog.history("results").num_rows == 3


def test_the_last_of_equal_keys_in_one_batch_counts(catalog: Catalog) -> None:
    catalog.append("scans", [scan("s1", site="A"), scan("s1", site="B")])
    assert catalog.rows("scans")["site"].to_pylist() == ["B"]


def test_a_moved_partition_does_not_show_the_old_row(catalog: Catalog) -> None:
    catalog.append("results", [result("s1", site="A")])
    catalog.append("results", [result("s1", site="C")])
    assert catalog.rows("results")["site"].to_pylist() == ["C"]


def test_values_come_back_as_they_went_in(catalog: Catalog) -> None:
    when = datetime(2024, 2, 29, 12, 30, 0, 123456, tzinfo=UTC)
    row = scan("s1", age=61.25, indexed_at=when, site="São Paulo / 3 T =ä", field_strength=None)
    catalog.append("scans", [row])
    (back,) = catalog.rows("scans").to_pylist()
    assert {name: back[name] for name in row} == row


def test_repeating_a_transaction_adds_nothing(catalog: Catalog) -> None:
    assert catalog.append("results", [result("s1")], txn="batch-1") is True
    assert catalog.append("results", [result("s1")], txn="batch-1") is False
    assert catalog.append("results", [result("s2")], txn="batch-2") is True
    assert catalog.history("results").num_rows == 2


def test_racing_writers_of_one_transaction_commit_once_and_others_all_commit(
    catalog: Catalog,
) -> None:
    wrote: list[bool] = []

    def write(txn: str, scan_id: str) -> None:
        wrote.append(catalog.append("scans", [scan(scan_id)], txn=txn))

    jobs = [threading.Thread(target=write, args=("same", "s0")) for _ in range(4)]
    jobs += [threading.Thread(target=write, args=(f"t{i}", f"s{i}")) for i in range(1, 5)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert sorted(wrote) == [False] * 3 + [True] * 5
    assert catalog.history("scans").num_rows == 5


def test_missing_site_and_target_are_partitions_of_their_own(catalog: Catalog) -> None:
    catalog.append("results", [result("s1", site=None), result("s2", site=""), result("s3")])
    assert catalog.rows("results")["site"].to_pylist() == [None, None, "A"]
    unknown = catalog.rows("results", where={"site": None})
    assert unknown["scan_id"].to_pylist() == ["s1", "s2"]


def test_a_filter_on_a_partition_reads_only_its_folder(catalog: Catalog, tmp_path: Path) -> None:
    catalog.append("results", [result("s1", site="A"), result("s2", site="C")])
    for file in (tmp_path / "lake/catalog/results").glob("target=B/site=C/**/*.parquet"):
        file.unlink()
    rows = catalog.rows("results", where={"target": "B", "site": "A", "sequence": "T1w"})
    assert rows["scan_id"].to_pylist() == ["s1"]


@pytest.mark.parametrize("site", ["O'Brien", "a' OR '1'='1", "%", "x--", 'say "hi"', "b\\c"])
def test_a_filter_takes_any_name_literally(catalog: Catalog, site: str) -> None:
    catalog.append("results", [result("s1", site=site), result("s2", site="A")])
    found = catalog.rows("results", where={"site": site, "model_version": 1})
    assert found["scan_id"].to_pylist() == ["s1"]
    assert found["site"].to_pylist() == [site]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"colour": "red"}, "no column 'colour'"),
        ({"status": None}, "'status' needs a value"),
        ({"age": "PRIVATE-123"}, "'age' takes double, got str"),
        ({"shape": [1.5, 2.0, 3.0]}, "'shape' takes list"),
        ({"bytes": 10.5}, "'bytes' takes int64, got float"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_without_quoting_it(
    catalog: Catalog, row: dict[str, Any], said: str
) -> None:
    with pytest.raises(StorageError) as caught:
        catalog.append("scans", [scan("s1"), scan("s2", **row)])
    assert caught.value.code == "TABLE-SCHEMA"
    assert said in str(caught.value)
    assert "PRIVATE" not in str(caught.value)
    assert catalog.rows("scans").num_rows == 0


def test_a_stored_table_of_another_schema_is_named(catalog: Catalog) -> None:
    from deltalake import write_deltalake

    uri = catalog.lake.table("scans")
    write_deltalake(uri, pa.table({"scan_id": ["s1"], "age": ["61"]}))
    for touch in (lambda: catalog.rows("scans"), lambda: catalog.append("scans", [scan("s1")])):
        with pytest.raises(StorageError) as caught:
            touch()
        assert caught.value.code == "TABLE-SCHEMA"
        assert "'age' is stored as string, expected double" in str(caught.value)


def test_a_table_from_before_a_column_was_added_is_read_and_appended_to(catalog: Catalog) -> None:
    from deltalake import write_deltalake

    old = catalog.lake.table("attempts")
    now = datetime.now(UTC)
    write_deltalake(
        old,
        pa.table(
            {"scan_id": ["s1"], "model": ["m"], "model_version": [1], "batch_id": ["b"],
             "attempt": [1], "recorded_at": pa.array([now], pa.timestamp("us", "UTC"))}
        ),
    )  # fmt: skip
    row = {"scan_id": "s1", "model": "m", "model_version": 1, "batch_id": "b", "attempt": 2}
    catalog.append("attempts", [row | {"worker": "w"}])
    assert catalog.rows("attempts")["worker"].to_pylist() == [None, "w"]


def test_other_words_about_a_column_do_not_close_a_table(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.append("scans", [scan("s1")])
    columns = tuple(replace(c, description="reworded") for c in SCHEMAS["scans"].columns)
    reworded = replace(SCHEMAS["scans"], columns=columns)
    monkeypatch.setitem(SCHEMAS, "scans", reworded)
    assert catalog.append("scans", [scan("s2")])
    assert catalog.rows("scans")["scan_id"].to_pylist() == ["s1", "s2"]


def test_a_filter_on_a_column_that_the_stored_table_lacks(catalog: Catalog) -> None:
    from deltalake import write_deltalake

    at = pa.array([datetime.now(UTC)], pa.timestamp("us", "UTC"))
    names = [c.name for c in SCHEMAS["results"].columns if c.name in (
        "scan_id", "model", "site", "target", "status"
    )]  # fmt: skip
    old = pa.table({name: ["a"] for name in names} | {"model_version": [1], "recorded_at": at})
    write_deltalake(catalog.lake.table("results"), old)
    assert catalog.rows("results", where={"lesion_ml": None}).num_rows == 1
    assert catalog.rows("results", where={"code": ["X", None]}).num_rows == 1
    assert catalog.rows("results", where={"code": "X"}).num_rows == 0


def test_as_of_reads_an_old_version_and_names_a_missing_one(catalog: Catalog) -> None:
    catalog.append("scans", [scan("s1")])
    first = catalog.version("scans")
    catalog.append("scans", [scan("s2")])
    before = catalog.history("scans")["recorded_at"].to_pylist()[0]
    assert catalog.rows("scans", as_of=before)["scan_id"].to_pylist() == ["s1"]
    assert catalog.rows("scans", as_of=before.replace(tzinfo=None)).num_rows == 1  # UTC
    assert catalog.rows("scans", as_of=first)["scan_id"].to_pylist() == ["s1"]
    for version in (99, 403):  # no HTTP status
        with pytest.raises(StorageError, match=f"no version {version}; the latest is 2"):
            catalog.rows("scans", as_of=version)


def test_every_column_is_described_once() -> None:
    text = reference_markdown()
    for table in SCHEMAS.values():
        names = [c.name for c in table.columns]
        assert len(set(names)) == len(names)
        assert set(table.key) | set(table.partition_by) <= set(names)
        assert all(c.description for c in table.columns)
        assert f"### {table.name}\n" in text


def test_the_page_of_the_tables_is_up_to_date() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "catalog.md"
    text = page.read_text()
    assert text == with_reference(text), "run: python -m pipelines.catalog_docs docs/catalog.md"
    assert with_reference(text.replace("| age | double |", "| age | string |")) == text


def test_some_columns_and_several_values_are_read(catalog: Catalog) -> None:
    catalog.append("results", [result(f"s{site}", site=site) for site in "ABC"])
    found = catalog.rows("results", where={"site": ["A", "C"]}, columns=["site", "scan_id"])
    assert found.to_pylist() == [{"site": "A", "scan_id": "sA"}, {"site": "C", "scan_id": "sC"}]
    assert catalog.rows("results", where={"site": []}, columns=["site"]).num_rows == 0
    assert catalog.history("results", columns=["status"]).column_names == ["status"]
    with pytest.raises(UsageError, match="no column 'sites' in results; nearest: site"):
        catalog.rows("results", where={"sites": "A"})
    with pytest.raises(UsageError, match="no table 'result'; nearest: results"):
        catalog.rows("result")


@pytest.mark.parametrize("folder", ["a b", "a#b", "läke", "a?b"])
def test_a_lake_may_lie_under_any_folder_name(tmp_path: Path, folder: str) -> None:
    catalog = Catalog(Lake(str(tmp_path / folder)))
    catalog.append("results", [result("s1", site="S/1 %20#")])
    catalog.append("results", [result("s2", site="S/1 %20#")])
    assert catalog.rows("results")["site"].to_pylist() == ["S/1 %20#"] * 2
    assert [p.name for p in tmp_path.iterdir()] == [folder]


def test_a_folder_name_that_the_table_library_would_misread_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        Catalog(Lake(str(tmp_path / "a%20b"))).append("results", [result("s1")])
    assert caught.value.code == "STORE-ADDRESS"
    assert list(tmp_path.iterdir()) == []


#: A process whose files may not grow, as on a full disk.
FULL = """
import os, resource, sys
from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.optimize import optimize
from sgcd_core.errors import StorageError

row = {"run_id": "r", "command": "index", "status": "ok"}
old, new = Catalog(Lake(sys.argv[1])), Catalog(Lake(sys.argv[2]))
old.append("runs", [row])
for part in range(3):  # each fits below the limit, all in one file do not
    old.append("runs", [row | {"run_id": os.urandom(60).hex()} for _ in range(900)])
writers = ((lambda: optimize(old), 150_000), (lambda: old.append("runs", [row]), 0),
           (lambda: new.append("runs", [row]), 0), (lambda: optimize(old), 0))
for write, limit in writers:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        write()
    except StorageError as error:
        sys.stdout.write(f"{error}\\n")
"""


def test_a_full_disk_is_a_sentence_with_its_reason_and_no_more(tmp_path: Path) -> None:
    """The table library's writer panics there, which is printed past Python."""
    lakes = [str(tmp_path / name) for name in ("old", "new")]
    done = subprocess.run([sys.executable, "-c", FULL, *lakes], capture_output=True, text=True)
    why = "writing failed: File too large. Check free space and that the folder can be written."
    tables = [Lake(lakes[i]).table("runs") for i in (0, 0, 1, 0)]
    assert done.stdout.splitlines() == [f"[STORE-WRITE] {table}: {why}" for table in tables]
    assert done.stderr == ""
    assert not list(Path(lakes[0], "catalog", "runs").glob("tmp*"))


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (errno.ENOSPC, "STORE-WRITE", "writing failed: No space left on device."),
        (errno.EROFS, "STORE-DENIED", "writing failed: Read-only file system."),
        (errno.EACCES, "STORE-DENIED", "this user may not have it written."),
    ],
)
def test_a_disk_that_refuses_in_the_middle_of_a_commit_is_not_asked_again(
    number: int, code: str, words: str, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deltalake
    from deltalake.exceptions import CommitFailedError

    calls = []

    def refuse(*_: object, **__: object) -> None:
        calls.append(1)
        raise CommitFailedError(f"Generic LocalFileSystem error: … (os error {number})")

    catalog.append("scans", [scan("s1")])
    monkeypatch.setattr(deltalake, "write_deltalake", refuse)
    with pytest.raises(StorageError, match=words) as caught:
        catalog.append("scans", [scan("s2")])
    assert (caught.value.code, len(calls)) == (code, 1)


def test_a_commit_that_loses_a_race_is_tried_again(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deltalake
    from deltalake.exceptions import CommitFailedError

    write, lost = deltalake.write_deltalake, [1, 2]

    def race(*words: Any, **options: Any) -> None:
        if lost:
            lost.pop()
            raise CommitFailedError(f"File exists (os error {errno.EEXIST})")
        write(*words, **options)

    monkeypatch.setattr(deltalake, "write_deltalake", race)
    monkeypatch.setattr(catalog_module.time, "sleep", lambda seconds: None)
    catalog.append("scans", [scan("s1")])
    assert catalog.rows("scans").num_rows == 1 and not lost


def test_what_is_said_of_a_disk_is_not_said_of_a_store() -> None:
    error = OSError("Generic S3 error: connection refused (os error 13)")
    remote = storage_error(error, "s3://b/lake/catalog/runs")
    assert remote.code == "STORE-UNREACHABLE" and "credentials" in str(remote)
    unwritten = storage_error(error, "s3://b/lake/catalog/runs", writing=True)
    assert unwritten.code == "STORE-UNREACHABLE" and "cannot be written" in str(unwritten)
    local = storage_error(OSError("damaged"), "/lake/catalog/runs")
    assert local.code == "STORE-UNREACHABLE" and "credentials" not in str(local)


@pytest.mark.s3
def test_the_same_on_s3(s3_server: Any) -> None:
    catalog = Catalog(Lake(s3_server.uri("catalog-test")))
    assert catalog.rows("results").num_rows == 0
    assert catalog.append("results", [result("s1", site=None)], txn="b") is True
    assert catalog.append("results", [result("s1", site=None)], txn="b") is False
    assert catalog.append("results", [result("s2")], txn="c") is True
    assert catalog.rows("results")["scan_id"].to_pylist() == ["s1", "s2"]


@pytest.mark.s3
@pytest.mark.parametrize("name", ["a [1] ü", "a#b", "a?b", "a+b", "a:b", "a^b"])
def test_a_prefix_of_any_name_holds_a_table_where_the_rest_of_the_lake_is(
    name: str, s3_server: Any
) -> None:
    lake = Lake(s3_server.uri(f"names/{name}"))
    catalog = Catalog(lake)
    catalog.append("results", [result("s1", site="A [x]")])
    catalog.append("results", [result("s2")])
    assert catalog.rows("results").num_rows == 2
    assert Store().has_any(f"{lake.uri}/catalog/results/_delta_log")


@pytest.mark.s3
@pytest.mark.parametrize("name", ["a%41b", "a\\b"])
def test_a_prefix_that_the_table_library_would_misread_is_refused(
    name: str, s3_server: Any
) -> None:
    with pytest.raises(StorageError) as caught:
        Catalog(Lake(s3_server.uri(f"names/{name}"))).append("results", [result("s1")])
    assert caught.value.code == "STORE-ADDRESS"
