"""Plain Parquet that explains itself."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from analyst_lake import analyst_lake

from pipelines.catalog import Catalog
from pipelines.export import export
from pipelines.schemas import SCHEMAS


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return Catalog(analyst_lake(str(tmp_path_factory.mktemp("analyst") / "lake")))


def test_every_table_is_a_file_with_units_and_descriptions(
    catalog: Catalog, tmp_path: Path
) -> None:
    done = export(catalog, str(tmp_path))
    assert [Path(file.uri).name for file in done] == [f"{name}.parquet" for name in SCHEMAS]
    for file, (name, schema) in zip(done, SCHEMAS.items(), strict=True):
        table = pq.read_table(file.uri)
        assert table.num_rows == file.rows == catalog.rows(name).num_rows
        assert table.schema.metadata[b"description"] == schema.description.encode()
        for column in schema.columns:
            about = table.schema.field(column.name).metadata
            assert about[b"unit"] == column.unit.encode()
            assert about[b"description"] == column.description.encode()
    readme = (tmp_path / "README.md").read_text()
    assert "`results.parquet`: 14 rows." in readme
    assert "| age | double | years | age at the scan |" in readme


def test_a_reader_without_this_program(catalog: Catalog, tmp_path: Path) -> None:
    export(catalog, str(tmp_path), history=True)
    sql = f"SELECT count(*) FROM '{tmp_path}/{{}}.parquet' WHERE subject = '01'"
    assert duckdb.sql(sql.format("results")).fetchall() == [(2,)]
    assert duckdb.sql(sql.format("results_all")).fetchall() == [(3,)]


def test_twice_is_the_same_and_a_date_goes_back(catalog: Catalog, tmp_path: Path) -> None:
    export(catalog, str(tmp_path))
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    export(catalog, str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    moment = catalog.history("results")["recorded_at"].to_pylist()[0]
    before = export(catalog, str(tmp_path / "before"), as_of=moment)
    assert {Path(f.uri).stem: f.rows for f in before} == {
        "scans": 8, "results": 1, "metrics": 0, "site_metrics": 0, "runs": 0, "attempts": 0,
    }  # fmt: skip
