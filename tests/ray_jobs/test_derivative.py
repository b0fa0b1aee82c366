"""Names and sidecars of outputs."""

from __future__ import annotations

import json

import pyarrow as pa

from pipelines.bids_links import Links
from pipelines.derivative import IN_SIDECAR, Names, sidecar_bytes, stems
from pipelines.schemas import STRING


def scan(scan_id: str, **more: str | None) -> dict[str, str | None]:
    base: dict[str, str | None] = {
        "scan_id": scan_id, "subject": "01", "session": None, "sequence": "T1w",
        "indexed_at": "2026-01-01", "uri": "/d/sub-01/anat/sub-01_T1w.nii.gz",
    }  # fmt: skip
    return base | more


def named(*scans: dict[str, str | None]) -> dict[str, str]:
    schema = pa.schema([(name, STRING) for name in scan("a")])
    table = stems(pa.Table.from_pylist(list(scans), schema=schema))
    return {row["scan_id"]: row["stem"] for row in table.to_pylist()}


def test_names_are_bids_and_keep_the_scans_entities() -> None:
    uri = "/d/sub-01/ses-2/anat/sub-01_ses-2_acq-mprage_run-1_T1w.nii.gz"
    stem = named(scan("a" * 32, session="2", uri=uri))["a" * 32]
    names = Names("/lake/derivatives/m-v1", stem)
    folder = "/lake/derivatives/m-v1/sub-01/ses-2/anat"
    assert names.native == f"{folder}/sub-01_ses-2_acq-mprage_run-1_desc-harmonized_T1w.nii.gz"
    assert names.sidecar == names.native.removesuffix(".nii.gz") + ".json"
    assert "_space-MNI152rigid_desc-harmonized_T1w.nii.gz" in names.model_grid


def test_two_data_sets_with_the_same_subject_do_not_overwrite_each_other() -> None:
    first, second = "a" * 32, "b" * 32
    found = named(scan(second, uri="/e/sub-01/anat/sub-01_T1w.nii.gz"), scan(first))
    assert len(set(found.values())) == 2
    assert found[first] == "sub-01/anat/sub-01_T1w"


def test_the_sidecar_says_what_made_the_scan() -> None:
    row = {"scan_id": "a", "model": "target-A", "model_version": 2, "gradient_correlation": 0.9}
    body = json.loads(sidecar_bytes(row, links=Links(), source="s3://b/sub-01_T1w.nii.gz"))
    assert body["Sources"] == ["s3://b/sub-01_T1w.nii.gz"] and body["SkullStripped"] is True
    assert (body["Model"], body["ModelVersion"]) == ("target-A", 2)
    assert body["GradientCorrelation"] == 0.9
    assert "gradient_correlation" in IN_SIDECAR


def test_what_json_has_no_word_for_is_left_out() -> None:
    """A sequence the model never saw is infinitely far from training."""
    row = {"scan_id": "a", "outlier_score": float("inf"), "volume_drift": float("nan")}
    text = sidecar_bytes(row, links=Links(), source="s3://b/sub-01_T1w.nii.gz").decode()
    assert "Infinity" not in text and "NaN" not in text
    assert json.loads(text)["ScanId"] == "a" and "OutlierScore" not in json.loads(text)
