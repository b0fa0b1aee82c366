"""Names and sidecars of outputs."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest

from pipelines import derivative
from pipelines.bids_links import Links
from pipelines.catalog import Catalog
from pipelines.derivative import (
    IN_SIDECAR,
    Names,
    bids_label,
    misnamed_outputs,
    output_names,
    sidecar_bytes,
    stems,
)
from pipelines.lake import Lake
from pipelines.plan import LABELS
from pipelines.schemas import STRING
from sgcd_core.io.bids import parse_name
from sgcd_core.io.store import Store


def scan(scan_id: str, **more: str | None) -> dict[str, str | None]:
    base: dict[str, str | None] = {
        "scan_id": scan_id, "subject": "01", "session": None, "sequence": "T1w",
        "dataset": "d", "indexed_at": "2026-01-01", "status": "ok",
        "uri": "/d/sub-01/anat/sub-01_T1w.nii.gz",
    }  # fmt: skip
    return base | more


def named(*scans: dict[str, str | None], given: dict[str, str] | None = None) -> dict[str, str]:
    schema = pa.schema([(name, STRING) for name in scan("a")])
    table = stems(pa.Table.from_pylist(list(scans), schema=schema), given)
    return {row["scan_id"]: row["stem"] for row in table.to_pylist()}


def test_names_are_bids_and_keep_the_scans_entities() -> None:
    uri = "/d/sub-01/ses-2/anat/sub-01_ses-2_acq-mprage_run-1_T1w.nii.gz"
    stem = named(scan("a" * 32, session="2", uri=uri))["a" * 32]
    names = Names("/lake/derivatives/m-v1", stem)
    folder = "/lake/derivatives/m-v1/sub-01/ses-2/anat"
    assert names.native == f"{folder}/sub-01_ses-2_acq-mprage_run-1_desc-harmonized_T1w.nii.gz"
    assert names.sidecar == names.native.removesuffix(".nii.gz") + ".json"
    assert "_space-MNI152rigid_desc-harmonized_T1w.nii.gz" in names.model_grid


def test_a_label_keeps_its_plus() -> None:
    uri = "/d/sub-01/anat/sub-01_acq-hi+lo_T1w.nii.gz"
    plain = "/d/sub-01/anat/sub-01_acq-hi_T1w.nii.gz"
    found = named(scan("a" * 32, uri=uri), scan("b" * 32, uri=plain))
    assert found == {
        "a" * 32: "sub-01/anat/sub-01_acq-hi+lo_T1w", "b" * 32: "sub-01/anat/sub-01_acq-hi_T1w",
    }  # fmt: skip


def test_two_data_sets_with_the_same_subject_do_not_overwrite_each_other() -> None:
    first, second = "a" * 32, "b" * 32
    found = named(scan(second, uri="/e/sub-01/anat/sub-01_T1w.nii.gz"), scan(first))
    assert len(set(found.values())) == 2
    assert found[first] == "sub-01/anat/sub-01_T1w"


def test_people_of_one_label_are_told_apart_and_one_person_is_not() -> None:
    first = scan("a" * 32, indexed_at="2025-01-01")
    other = scan("b" * 32, dataset="e", sequence="T2w", uri="/e/sub-01/anat/sub-01_T2w.nii")
    later = scan("c" * 32, dataset="e", session="2", uri="/e/sub-01/ses-2/anat/sub-01_T1w.nii")
    found = named(first, other, later)
    who = [found[key * 32].partition("/")[0] for key in "abc"]
    assert who[0] == "sub-01" != who[1] == who[2]
    again = scan("d" * 32, dataset="e", session="3", uri=later["uri"], indexed_at="2026-02-01")
    old = {"a" * 32: found["a" * 32], "b" * 32: "sub-01/anat/sub-01_acq-bbbbbbbb_T2w"}
    more = named(first, other, again, given=old)
    assert more["d" * 32].startswith("sub-01/"), "who has an output keeps the label"
    kept = named(first, other, given={"b" * 32: "sub-01/anat/sub-01_T2w"})
    assert kept["b" * 32] == "sub-01/anat/sub-01_T2w" and not kept["a" * 32].startswith("sub-01/")


def test_of_several_images_of_each_person_the_same_kind_has_the_plain_name() -> None:
    scans = []
    for number in range(12):
        who, ids = f"{number:02d}", (f"{n:032x}" for n in (number * 7919 % 23, 100 - number))
        for scan_id, kind in zip(ids, ("desc-preproc", "space-MNI_desc-preproc"), strict=True):
            uri = f"/d/sub-{who}/anat/sub-{who}_{kind}_T1w.nii.gz"
            scans.append(scan(scan_id, subject=who, uri=uri))
    found = named(*scans)
    for row in scans:
        standard = "space-MNI" in str(row["uri"])
        assert ("_acq-spaceMNIdescpreproc_" in found[str(row["scan_id"])]) == standard


def test_entities_are_in_the_order_of_bids() -> None:
    uri = "/d/sub-01/anat/sub-01_task-rest_run-1_chunk-2_T1w.nii.gz"
    plain, second = named(scan("a" * 32, uri=uri), scan("b" * 32, uri=uri)).values()
    assert Names("", second).native.endswith(
        "sub-01_task-rest_acq-bbbbbbbb_run-1_chunk-2_desc-harmonized_T1w.nii.gz"
    )
    assert Names("", plain).model_grid.endswith(
        "sub-01_task-rest_run-1_space-MNI152rigid_chunk-2_desc-harmonized_T1w.nii.gz"
    )


def test_a_name_that_was_given_stays_and_others_go_to_scans_that_can_be_used() -> None:
    old, new = scan("b" * 32, status="failed"), scan("a" * 32, indexed_at="2026-01-02")
    plain = "sub-01/anat/sub-01_T1w"
    assert named(old, new)["a" * 32] == plain
    found = named(old, new, given={"b" * 32: plain})
    assert found == {"b" * 32: plain, "a" * 32: "sub-01/anat/sub-01_acq-aaaaaaaa_T1w"}


def test_outputs_keep_their_names_whatever_is_indexed_later(tmp_lake: Lake) -> None:
    catalog, plain = Catalog(tmp_lake), "sub-01/anat/sub-01_T1w"
    first, second = scan("b" * 32), scan("a" * 32, uri="/e/sub-01/anat/sub-01_T1w.nii.gz")

    def index(row: dict[str, str | None], day: int) -> None:
        catalog.append("scans", [row | {"indexed_at": datetime(2026, 1, day, tzinfo=UTC)}])

    def names(version: int = 1) -> dict[str, str]:
        table = output_names(catalog, catalog.rows("scans"), "m", version)
        return {row["scan_id"]: row["stem"] for row in table.to_pylist()}

    index(first, 1)
    index(second, 2)
    index(first, 3)  # a corrected age, say
    assert names()["b" * 32] == plain != names()["a" * 32]
    root = tmp_lake.derivatives("m-v1")
    labels = {name: first.get(name) for name in LABELS}
    row = labels | {"scan_id": "a" * 32, "model": "m", "model_version": 1, "status": "ok",
                    "output_uri": Names(root, plain).native}  # fmt: skip
    catalog.append("results", [row])
    assert names()["a" * 32] == plain != names()["b" * 32]
    assert names(version=2)["b" * 32] == plain
    catalog.append("results", [row | {"scan_id": "b" * 32}])  # as lakes of before may have it
    assert names()["b" * 32] == plain != names()["a" * 32]


def test_scans_that_exchanged_subjects_exchange_their_names(tmp_lake: Lake) -> None:
    catalog, root = Catalog(tmp_lake), tmp_lake.derivatives("m-v1")
    now = datetime(2026, 1, 1, tzinfo=UTC)
    a, b = (
        scan(key * 32, subject=key, uri=f"/d/sub-{key}/anat/sub-{key}_T1w.nii.gz")
        | {"indexed_at": now} for key in "ab"
    )  # fmt: skip

    def harmonize(row: dict[str, Any]) -> str:
        """Write a result, and the file that it is of, under the name that is planned."""
        table = output_names(catalog, catalog.rows("scans"), "m", 1).to_pylist()
        names = Names(root, {r["scan_id"]: r["stem"] for r in table}[row["scan_id"]])
        Store().write_bytes(names.native, row["scan_id"].encode())
        result = {name: row.get(name) for name in LABELS} | {
            "scan_id": row["scan_id"], "model": "m", "model_version": 1, "status": "ok",
            "output_uri": names.native,
        }  # fmt: skip
        catalog.append("results", [result])
        return names.native

    def misnamed() -> list[str]:
        found = misnamed_outputs(catalog, catalog.rows("scans"), root, "m", 1)
        return [names.native for names in found]

    catalog.append("scans", [a, b])
    one, two = harmonize(a), harmonize(b)
    swapped = [
        a | {"subject": "b", "uri": b["uri"]}, b | {"subject": "a", "uri": a["uri"]},
    ]  # fmt: skip
    catalog.append("scans", swapped)
    assert misnamed() == [], "no other output has taken their place yet"
    assert [harmonize(row) for row in swapped] == [two, one]
    assert misnamed() == [], "both names are used again"
    assert Store().read_bytes(two) == a["scan_id"].encode()

    catalog.append("scans", [renamed := swapped[0] | {"subject": "c"}])
    assert misnamed() == []
    three = harmonize(renamed)
    assert "sub-c" in three and misnamed() == [two]
    elsewhere = tmp_lake.derivatives("of-another-lake")
    Store().write_bytes(two.replace(root, elsewhere), b"")
    assert misnamed_outputs(catalog, catalog.rows("scans"), elsewhere, "m", 1) == []
    Store().delete(two)
    assert misnamed() == []


@pytest.mark.parametrize("few", [100, 0], ids=["asked for each", "listed"])
def test_a_removal_that_was_cut_off_is_found_again(
    tmp_lake: Lake, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(derivative, "_FEW", few)
    catalog, root = Catalog(tmp_lake), tmp_lake.derivatives("m-v1")
    old, new = (Names(root, f"sub-{who}/anat/sub-{who}_T1w") for who in ("01", "02"))
    catalog.append("scans", [scan("a" * 32, subject="02") | {"indexed_at": None}])
    for who, names in (("01", old), ("02", new)):
        labels = {"subject": who, "session": None, "site": None, "sequence": "T1w"}
        catalog.append("results", [labels | {
            "scan_id": "a" * 32, "model": "m", "model_version": 1, "status": "ok",
            "output_uri": names.native,
        }])  # fmt: skip
    for uri in old.files:
        Store().write_bytes(uri, b"")
    for uri in old.files:
        assert misnamed_outputs(catalog, catalog.rows("scans"), root, "m", 1) == [old]
        Store().delete(uri)
    assert misnamed_outputs(catalog, catalog.rows("scans"), root, "m", 1) == []
    assert not any(Store().exists(uri) for uri in old.files)


@pytest.mark.parametrize("word", ["MR_001", "IXI002-Guys", "../../../../etc/x", "Ärger"])
def test_a_manifests_labels_become_bids_labels(word: str) -> None:
    stem = named(scan("a" * 32, subject=word, session="2019-03-01", uri="/d/x.nii.gz"))["a" * 32]
    name = parse_name(stem.rpartition("/")[2] + ".nii.gz")
    assert name is not None and stem.count("/") == 3
    assert stem.startswith(f"sub-{name.subject}/ses-{name.session}/anat/")


def test_labels_that_only_lose_what_bids_forbids_stay_two() -> None:
    assert bids_label("A1") == "A1"
    assert len({bids_label(word) for word in ("A1", "A_1", "A-1")}) == 3


def test_the_sidecar_says_what_made_the_scan() -> None:
    row = {"scan_id": "a", "model": "target-A", "model_version": 2, "gradient_correlation": 0.9}
    body = json.loads(sidecar_bytes(row, links=Links(), source="s3://b/sub-01_T1w.nii.gz"))
    assert body["Sources"] == ["s3://b/sub-01_T1w.nii.gz"] and body["SkullStripped"] is True
    assert (body["Model"], body["ModelVersion"]) == ("target-A", 2)
    assert body["GradientCorrelation"] == 0.9
    assert "target site" not in body["Description"]  # a global model has none
    tuned = sidecar_bytes(row | {"target": "A"}, links=Links(), source="s3://b/sub-01_T1w.nii.gz")
    assert "target site" in json.loads(tuned)["Description"]
    assert "gradient_correlation" in IN_SIDECAR


def test_what_json_has_no_word_for_is_left_out() -> None:
    """A sequence the model never saw is infinitely far from training."""
    row = {"scan_id": "a", "outlier_score": float("inf"), "volume_drift": float("nan")}
    text = sidecar_bytes(row, links=Links(), source="s3://b/sub-01_T1w.nii.gz").decode()
    assert "Infinity" not in text and "NaN" not in text
    assert json.loads(text)["ScanId"] == "a" and "OutlierScore" not in json.loads(text)
