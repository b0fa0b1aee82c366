"""Addresses of outputs where a lake was copied or moved since they were written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import S3Server

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.schemas import OUTPUT_ADDRESSES, RESULTS
from sgcd_core.io.store import Store, join

KEY = "target-T-v1"


def row(scan_id: str, root: str) -> dict[str, Any]:
    stem = f"{root}/sub-{scan_id}/anat/sub-{scan_id}"
    return {
        "scan_id": scan_id, "model": "target-T", "model_version": 1, "status": "ok",
        "output_uri": f"{stem}_desc-harmonized_T1w.nii.gz",
        "model_grid_uri": f"{stem}_space-MNI152rigid_desc-harmonized_T1w.nii.gz",
        "sidecar_uri": f"{stem}_desc-harmonized_T1w.json", "uncertainty_uri": None,
    }  # fmt: skip


def fill(lake: Lake, *rows: dict[str, Any]) -> None:
    about = join(lake.derivatives(KEY), "dataset_description.json")
    Store().write_bytes(about, b"{}")
    Catalog(lake).append("results", rows)


def addresses(lake: Lake) -> list[list[str]]:
    table = Catalog(lake).rows("results", columns=OUTPUT_ADDRESSES)
    return [[uri for uri in one.values() if uri] for one in table.to_pylist()]


def expected(scan_id: str, root: str) -> list[str]:
    found = row(scan_id, root)
    return [found[name] for name in OUTPUT_ADDRESSES if found[name]]


def test_every_address_of_results_is_known() -> None:
    named = {c.name for c in RESULTS.columns if c.name.endswith("_uri")}
    assert named == set(OUTPUT_ADDRESSES)


@pytest.mark.parametrize("word", ["new place (2)", "derivatives/of/all"])
def test_a_moved_lake_names_its_own_outputs(tmp_lake: Lake, tmp_path: Path, word: str) -> None:
    fill(tmp_lake, row("01", tmp_lake.derivatives(KEY)))
    new = Lake(str(tmp_path / word))
    shutil.copytree(tmp_lake.uri, new.uri)
    fill(new, row("02", new.derivatives(KEY)))  # harmonized there
    assert addresses(new) == [expected(s, new.derivatives(KEY)) for s in ("01", "02")]
    assert addresses(tmp_lake) == [expected("01", tmp_lake.derivatives(KEY))]
    old = Catalog(new).history("results", as_of=1, columns=("output_uri",))
    assert old["output_uri"].to_pylist() == expected("01", new.derivatives(KEY))[:1]
    asked = Catalog(new).query("SELECT output_uri FROM results WHERE scan_id = '01'")
    assert asked["output_uri"].to_pylist() == old["output_uri"].to_pylist()
    again = Lake(str(tmp_path / "moved"))
    Path(new.uri).rename(again.uri)
    assert addresses(again) == [expected(s, again.derivatives(KEY)) for s in ("01", "02")]


def test_however_its_address_is_written(
    tmp_lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_lake, row("01", tmp_lake.derivatives(KEY)))
    monkeypatch.chdir(tmp_path)
    for uri in ("lake", "./lake", Path(tmp_lake.uri).as_uri()):
        assert addresses(Lake(uri)) == [expected("01", tmp_lake.derivatives(KEY))]


def test_outputs_that_lie_beside_the_lake_stay(tmp_lake: Lake, tmp_path: Path) -> None:
    """Those of a BIDS App, also under a folder of the like name."""
    roots = [str(tmp_path / "out"), str(tmp_path / "derivatives" / KEY)]
    rows = [row(f"0{i}", root) for i, root in enumerate(roots)]
    Catalog(tmp_lake).append("results", [*rows, row("3", "x") | {"output_uri": None}])
    found = addresses(tmp_lake)
    assert found[:2] == [expected(f"0{i}", root) for i, root in enumerate(roots)]
    assert found[2] == expected("3", "x")[1:]


@pytest.mark.s3
def test_a_lake_brought_to_s3_and_back(tmp_lake: Lake, s3_server: S3Server, tmp_path: Path) -> None:
    fill(tmp_lake, row("01", tmp_lake.derivatives(KEY)))
    cloud, back = Lake(s3_server.uri("moved/lake")), Lake(str(tmp_path / "back"))
    store = Store()
    for path in (p for p in Path(tmp_lake.uri).rglob("*") if p.is_file()):
        name = str(path.relative_to(tmp_lake.uri))
        store.write_bytes(join(cloud.uri, name), path.read_bytes())
    assert addresses(cloud) == [expected("01", cloud.derivatives(KEY))]
    fill(cloud, row("02", cloud.derivatives(KEY)))
    for item in store.list(cloud.uri + "/"):
        name = item.uri.removeprefix(cloud.uri + "/")
        store.write_bytes(join(back.uri, name), store.read_bytes(item.uri, max_bytes=10**7))
    assert addresses(back) == [expected(s, back.derivatives(KEY)) for s in ("01", "02")]
