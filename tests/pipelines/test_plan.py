"""A plan holds every scan once, to do or with the reason it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.plan import LABELS, Plan, plan, replaced_scans
from sgcd_core.errors import InputError

SCANS: list[tuple[str, dict[str, Any]]] = [
    ("a1", {"site": "A"}),
    ("a2", {"site": "A", "sequence": "T2w"}),
    ("a3", {"site": "A", "split": "test"}),
    ("b1", {"site": "B"}),
    ("bad", {"site": "B", "status": "failed", "code": "SCAN-CORRUPT", "message": "damaged"}),
    ("flair", {"site": "B", "sequence": "FLAIR"}),
    ("lost", {"site": None}),
]
KNOWN = ("T1w", "T2w")


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    catalog = Catalog(Lake(str(tmp_path)))
    base = {"subject": "1", "sequence": "T1w", "split": "train", "status": "ok"}
    catalog.append("scans", [{"scan_id": key, "uri": f"/{key}"} | base | row for key, row in SCANS])
    return catalog


def record(catalog: Catalog, scan_id: str, status: str, code: str | None = None) -> None:
    scan = catalog.rows("scans", where={"scan_id": scan_id}).to_pylist()[0]
    row = {"scan_id": scan_id, "model": "m", "model_version": 1, "status": status, "code": code}
    catalog.append("results", [row | {name: scan[name] for name in LABELS}])


def ids(made: Plan) -> list[str]:
    return made.todo["scan_id"].to_pylist()


def reasons(made: Plan) -> dict[str, str]:
    return {row["scan_id"]: row["reason"] for row in made.skipped.to_pylist()}


def test_every_scan_is_in_the_plan_once(catalog: Catalog) -> None:
    made = plan(catalog, "m", 1, sequences=KNOWN)
    assert ids(made) == ["a1", "a3", "a2", "b1"]
    assert reasons(made) == {
        "bad": "failed at index",
        "flair": "other sequence",
        "lost": "no site",
    }
    assert made.todo.num_rows + made.skipped.num_rows == len(SCANS)
    told = {row["scan_id"]: (row["code"], row["message"]) for row in made.skipped.to_pylist()}
    assert told["bad"] == ("SCAN-CORRUPT", "damaged")
    assert told["flair"] == ("SCAN-SEQUENCE", None)
    assert made.sentence().startswith("4 to do, 3 skipped (1 ")
    assert "1 failed at index" in made.sentence()


def test_choosing_sites_sequences_splits_and_leaving_the_target_out(catalog: Catalog) -> None:
    assert ids(plan(catalog, "m", 1, sites=["A"], sequences=["T1w"])) == ["a1", "a3"]
    assert ids(plan(catalog, "m", 1, known=["T2w"])) == ["a2"]
    assert ids(plan(catalog, "m", 1, sequences=KNOWN, split="train", target="B")) == ["a1", "a2"]
    assert reasons(plan(catalog, "m", 1, target="B"))["b1"] == "at the target site"


def test_a_plan_of_some_answers_for_no_bad_scan_of_others(catalog: Catalog) -> None:
    assert reasons(plan(catalog, "m", 1, sites=["A"]))["bad"] == "other site"
    assert reasons(plan(catalog, "m", 1, sequences=["T2w"]))["bad"] == "other sequence"
    assert reasons(plan(catalog, "m", 1, split="test"))["bad"] == "other split"
    mine = plan(catalog, "m", 1, sites=["B"], sequences=["T1w"], split="train")
    assert reasons(mine)["bad"] == "failed at index"
    # whoever asks for no sequence learns of all, also of those that no model knows
    assert reasons(plan(catalog, "m", 1, known=["T2w"]))["bad"] == "failed at index"


def test_planning_again_resumes(catalog: Catalog) -> None:
    record(catalog, "a1", "ok")
    record(catalog, "a2", "flagged", "FLAG-ANATOMY")
    record(catalog, "a3", "failed", "SCAN-NO-BRAIN")
    record(catalog, "b1", "quarantined", "SCAN-QUARANTINED")
    made = plan(catalog, "m", 1, sequences=KNOWN)
    assert ids(made) == []
    assert reasons(made) | {"a1": "done", "a2": "done", "a3": "failed before"} == reasons(made)
    assert reasons(made)["b1"] == "quarantined"
    assert ids(plan(catalog, "m", 1, sequences=KNOWN, retry_failed=True)) == ["a3"]
    assert len(ids(plan(catalog, "m", 1, sequences=KNOWN, force=True))) == 4
    assert len(ids(plan(catalog, "m", 2, sequences=KNOWN))) == 4, "another version starts anew"


def test_a_failure_of_the_store_is_tried_again_unless_only_new(catalog: Catalog) -> None:
    record(catalog, "a1", "failed", "STORE-UNREACHABLE")
    assert "a1" in ids(plan(catalog, "m", 1, sequences=KNOWN))
    assert "a1" not in ids(plan(catalog, "m", 1, sequences=KNOWN, only_new=True))


def test_force_does_not_touch_what_cannot_be_used(catalog: Catalog) -> None:
    assert "bad" not in ids(plan(catalog, "m", 1, force=True))


def test_an_unknown_site_and_an_empty_lake_are_errors(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no site 'Z'; it has A, B"):
        plan(catalog, "m", 1, sites=["Z"])
    with pytest.raises(InputError) as caught:
        plan(Catalog(Lake(str(tmp_path / "empty"))), "m", 1)
    assert caught.value.code == "LAKE-EMPTY"


def test_the_scan_of_a_replaced_file_is_no_failure_of_the_index(catalog: Catalog) -> None:
    row = {"scan_id": "old", "uri": "/a1", "subject": "1", "sequence": "T1w", "site": "A",
           "status": "failed", "code": "SCAN-REPLACED", "message": "replaced"}  # fmt: skip
    catalog.append("scans", [row])
    assert reasons(plan(catalog, "m", 1, sites=["B"]))["old"] == "replaced since"
    assert reasons(plan(catalog, "m", 1, sequences=KNOWN))["old"] == "replaced since"
    assert replaced_scans(catalog).to_pylist() == ["old"]


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("status", ["ok", "flagged", "failed", "quarantined"])
def test_a_result_under_a_label_that_was_corrected_settles_nothing(
    catalog: Catalog, label: str, status: str
) -> None:
    record(catalog, "a1", status, "SCAN-EMPTY")
    assert "a1" not in ids(plan(catalog, "m", 1))
    scan = catalog.rows("scans", where={"scan_id": "a1"}).to_pylist()[0]
    catalog.append("scans", [scan | {label: "B", "recorded_at": None}])
    made = plan(catalog, "m", 1)
    again = status != "quarantined"
    assert ("a1" in ids(made)) is again and made.relabelled == again
    assert ("labels were corrected" in made.sentence()) is again
    assert ("a1" in ids(plan(catalog, "m", 1, only_new=True))) is again
