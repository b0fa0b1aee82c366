"""pyarrow, DuckDB and Polars read a lake without our code, and while it is written."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.optimize import optimize

PAGE = Path(__file__).resolve().parents[2] / "docs" / "catalog.md"
#: The latest row of each key in plain SQL, as the page gives it.
LATEST = re.findall(r"```sql\n(.+?)```", PAGE.read_text(), re.DOTALL)[0]
WANTED = {("A", "flagged"): 1, ("A", "ok"): 4, ("B", "ok"): 4}


def result(scan_id: str, **values: Any) -> dict[str, Any]:
    return {
        "scan_id": scan_id, "site": "A", "sequence": "T1w", "model": "m", "model_version": 1,
        "target": "T", "status": "ok",
    } | values  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of `results` with small files, compacted files, and replaced ones beside them."""
    catalog = Catalog(Lake.open(str(tmp_path_factory.mktemp("lake")), create=True))
    for number in range(4):
        catalog.append("results", [result(f"s{number}"), result(f"t{number}", site="B")])
        if number == 2:
            optimize(catalog)
    catalog.append("results", [result("s0", status="flagged")])
    return catalog.lake.table("results")


def test_pyarrow(table: str) -> None:
    import pyarrow.compute as pc
    from deltalake import DeltaTable

    dataset = DeltaTable(table).to_pyarrow_dataset()
    counts = dataset.to_table(columns=["site", "status"]).group_by(["site", "status"])
    found = counts.aggregate([([], "count_all")]).to_pylist()
    assert {(r["site"], r["status"]): r["count_all"] for r in found} == WANTED
    only = list(dataset.get_fragments(pc.field("site") == "B"))
    assert 0 < len(only) < len(list(dataset.get_fragments()))  # partitions are seen


def test_duckdb(table: str) -> None:
    import duckdb
    from deltalake import DeltaTable

    results = DeltaTable(table).to_pyarrow_dataset()
    with duckdb.connect() as engine:
        engine.register("results", results)
        rows = engine.execute("SELECT site, status, count(*) FROM results GROUP BY ALL").fetchall()
        latest = engine.execute(LATEST).fetchall()
    assert {(site, status): n for site, status, n in rows} == WANTED
    assert ("s0", "flagged") in latest and len(latest) == 8


def test_units_and_descriptions_are_in_the_table_itself(table: str) -> None:
    from deltalake import DeltaTable

    about = DeltaTable(table).to_pyarrow_dataset().schema.field("seconds_read").metadata
    assert about == {b"unit": b"s", b"description": b"reading the scan"}


def test_polars(table: str) -> None:
    polars = pytest.importorskip("polars")
    rows = polars.scan_delta(table).group_by("site", "status").len().collect().rows()
    assert {(site, status): n for site, status, n in rows} == WANTED


def test_readers_see_whole_batches_while_200_commits_run(tmp_path: Path) -> None:
    """Each batch has five rows in two partitions; tables are compacted meanwhile."""
    catalog = Catalog(Lake.open(str(tmp_path / "lake"), create=True))
    done, problems, seen = threading.Event(), [], []

    def write() -> None:
        try:
            for number in range(200):
                rows = [
                    result(f"{number}-{i}", site="AB"[i % 2], batch_id=str(number))
                    for i in range(5)
                ]
                catalog.append("results", rows, txn=f"b{number}")
                if number in (80, 160):
                    optimize(catalog)
        except Exception as error:
            problems.append(error)
        finally:
            done.set()

    def read() -> None:
        last = 0
        try:
            while not done.is_set():
                batches = Counter(catalog.history("results")["batch_id"].to_pylist())
                assert set(batches.values()) <= {5}, "part of a batch was seen"
                assert set(batches) == {str(i) for i in range(len(batches))}, "a batch was left out"
                assert len(batches) >= last, "a batch went away"
                last = len(batches)
                seen.append(last)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=write), threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(set(seen)) >= 10, "the reader did not look often enough while it was written"
    assert catalog.history("results").num_rows == 1000


def test_the_python_door_is_light() -> None:
    code = (
        "import sys; from pipelines.catalog import Catalog; "
        "heavy = {'pandas', 'deltalake', 'duckdb', 'torch', 'ray', 'botocore', 'nibabel', "
        "'scipy', 'mlflow'} & set(sys.modules); sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_address_without_a_lake_is_an_error_not_empty_tables(tmp_path: Path) -> None:
    from sgcd_core.errors import StorageError

    with pytest.raises(StorageError) as caught:
        Catalog(str(tmp_path / "misspelt"))
    assert caught.value.code == "LAKE-MISSING"
