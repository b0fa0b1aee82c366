"""Preparing into a lake: a row for every scan, whatever happens, and nothing done twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pipelines.prepare as pipeline
from pipelines.lake import Lake
from pipelines.prepare import load_native_mask, load_prepared, prepare_one
from sgcd_core.config import PrepareConfig
from sgcd_core.errors import InputError, StorageError
from sgcd_core.io.nifti import encode_nifti, read_nifti
from sgcd_core.io.store import sha256_hex
from sgcd_core.volume.prepare import prepare_scan
from sgcd_core.volume.template import template

CONFIG = PrepareConfig(bias_correction="none", registration="none")
RECIPE = CONFIG.digest()


@pytest.fixture(scope="module")
def brain_bytes() -> bytes:
    image, mask, affine = template(3.0)
    stored = np.where(mask, 50 + 700 * image, 0)[::-1]
    flipped = affine @ np.diag([-1.0, 1, 1, 1])
    flipped[:3, 3] = (affine @ [image.shape[0] - 1, 0, 0, 1])[:3]
    return encode_nifti(stored, flipped)


@pytest.fixture
def row(tmp_path: Path, brain_bytes: bytes) -> dict[str, str]:
    path = tmp_path / "sub-01_T1w.nii.gz"
    path.write_bytes(brain_bytes)
    return {"scan_id": sha256_hex(brain_bytes)[:32], "uri": str(path), "sequence": "T1w"}


def test_what_is_read_back_is_what_was_prepared(row: dict[str, str], tmp_lake: Lake) -> None:
    out = prepare_one(row, tmp_lake, CONFIG)
    assert (out["status"], out["code"], out["skipped"]) == ("ok", None, False), out["message"]
    scan = read_nifti(row["uri"])
    wanted = prepare_scan(scan, CONFIG, sequence="T1w")
    got = load_prepared(tmp_lake, RECIPE, row["scan_id"])
    again = load_prepared(tmp_lake.uri, RECIPE, row["scan_id"])
    assert np.array_equal(got.image, again.image)
    assert (got.image == wanted.image).all() and got.image.dtype == np.float32
    assert (got.mask == wanted.mask).all() and got.mask.dtype == bool
    assert got.geometry == wanted.geometry
    native = load_native_mask(tmp_lake, RECIPE, row["scan_id"])
    assert (native == wanted.native_mask).all() and native.shape == scan.shape
    stored = read_nifti(f"{tmp_lake.prepared(RECIPE, row['scan_id'])}/native_mask.nii.gz")
    np.testing.assert_array_equal(stored.affine, scan.affine)


def test_the_row_tells_the_time_of_each_phase(row: dict[str, str], tmp_lake: Lake) -> None:
    out = prepare_one(row, tmp_lake, CONFIG)
    phases = ("read", "strip", "bias", "register", "resample", "write")
    parts = [out[f"seconds_{phase}"] for phase in phases]
    assert all(part >= 0 for part in parts)
    assert 0.5 * out["seconds_total"] <= sum(parts) <= out["seconds_total"] + 0.01
    assert 500 < out["brain_ml"] < 2500


def test_a_second_run_does_nothing(
    row: dict[str, str], tmp_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_one(row, tmp_lake, CONFIG)
    files = sorted(Path(first["prepared_uri"]).iterdir())
    before = [(f.name, f.stat().st_mtime_ns) for f in files]
    Path(row["uri"]).unlink()  # not even read again
    second = prepare_one(row, tmp_lake, CONFIG)
    assert second["status"] == "ok" and second["skipped"]
    assert second["brain_ml"] == first["brain_ml"]
    assert [(f.name, f.stat().st_mtime_ns) for f in files] == before


def test_another_recipe_is_another_folder(row: dict[str, str], tmp_lake: Lake) -> None:
    other = CONFIG.model_copy(update={"percentiles": (1.0, 99.0)})
    uris = {prepare_one(row, tmp_lake, c)["prepared_uri"] for c in (CONFIG, other)}
    assert len(uris) == 2 and None not in uris


@pytest.mark.parametrize("damage", [b"", b"{", b'{"format": 0}'])
def test_a_run_that_was_cut_short_is_done_again(
    row: dict[str, str], tmp_lake: Lake, damage: bytes
) -> None:
    first = prepare_one(row, tmp_lake, CONFIG)
    geometry = Path(first["prepared_uri"]) / "geometry.json"
    good = geometry.read_bytes()
    geometry.write_bytes(damage)
    again = prepare_one(row, tmp_lake, CONFIG)
    assert again["status"] == "ok" and not again["skipped"]
    assert geometry.read_bytes() == good


def test_geometry_is_written_last(
    row: dict[str, str], tmp_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    write = pipeline.Store.write_bytes

    def spy(self: pipeline.Store, uri: str, data: bytes, **options: bool) -> str:
        names.append(uri.rsplit("/", 1)[1])
        return write(self, uri, data, **options)

    monkeypatch.setattr(pipeline.Store, "write_bytes", spy)
    prepare_one(row, tmp_lake, CONFIG)
    assert len(names) == 4 and names[-1] == "geometry.json"


def test_every_bad_scan_is_a_row_with_a_code(
    row: dict[str, str], tmp_lake: Lake, tmp_path: Path
) -> None:
    good = Path(row["uri"]).read_bytes()
    cases = {
        "SCAN-TRUNCATED": good[:-4000],
        "SCAN-UNREADABLE": b"not an image" * 100,
        "SCAN-MISSING": None,
        "SCAN-SEQUENCE": good,
    }
    for number, (code, data) in enumerate(cases.items()):
        path = tmp_path / f"bad-{number}.nii.gz"
        if data is not None:
            path.write_bytes(data)
        sequence = "bold" if code == "SCAN-SEQUENCE" else "T1w"
        scan_id = sha256_hex(data or b"")[:32]
        bad = {"scan_id": scan_id, "uri": str(path), "sequence": sequence}
        out = prepare_one(bad, tmp_lake, CONFIG)
        expected = {code, "SCAN-CORRUPT"} if code == "SCAN-TRUNCATED" else {code}
        assert out["status"] == "failed" and out["code"] in expected, out
        assert out["scan_id"] == bad["scan_id"] and out["message"]
        with pytest.raises(InputError, match="SCAN-MISSING"):
            load_prepared(tmp_lake, RECIPE, bad["scan_id"])


def test_a_scan_that_was_replaced_since_it_was_indexed_is_not_taken_for_it(
    row: dict[str, str], tmp_lake: Lake
) -> None:
    path = Path(row["uri"])
    path.write_bytes(path.read_bytes() + b"\0")  # zeros after a gzip stream are allowed
    out = prepare_one(row, tmp_lake, CONFIG)
    assert (out["status"], out["code"]) == ("failed", "SCAN-CHANGED")


def test_a_prepared_volume_that_is_another_one_is_refused(
    row: dict[str, str], tmp_lake: Lake
) -> None:
    folder = Path(prepare_one(row, tmp_lake, CONFIG)["prepared_uri"])
    shifted = read_nifti(f"{folder}/image.nii.gz")
    other = encode_nifti(shifted.data[::-1], shifted)  # valid, and left is right
    (folder / "image.nii.gz").write_bytes(other)
    with pytest.raises(StorageError, match="STORE-DIGEST"):
        load_prepared(tmp_lake, RECIPE, row["scan_id"])


def test_a_fault_nobody_foresaw_is_a_row_without_its_text(
    row: dict[str, str], tmp_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object, **__: object) -> None:
        raise RuntimeError("patient: Jane Roe")

    monkeypatch.setattr(pipeline, "prepare_scan", fault)
    out = prepare_one(row, tmp_lake, CONFIG)
    assert (out["status"], out["code"]) == ("failed", "SCAN-FAILED")
    assert "Jane" not in str(out)


def test_a_row_that_lacks_a_column_is_still_a_row(tmp_lake: Lake) -> None:
    out = prepare_one({"scan_id": "x"}, tmp_lake, CONFIG)
    assert out["status"] == "failed" and out["scan_id"] == "x"
