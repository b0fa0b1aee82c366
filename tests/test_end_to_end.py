"""The whole path through the command line, with real Ray, Delta and MLflow, on a tiny cohort."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import S3Server
from toy_lake import SET, TARGET, Place, settle

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from ray_jobs import cli
from ray_jobs.session import session
from sgcd_core.io.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def place(toy_lake: Place, s3_server: S3Server) -> Iterator[Place]:
    """The lake after every step, and an open Ray for what is run once more.

    The S3 server comes first, because Ray's workers get the environment Ray was started in.
    """
    with pytest.MonkeyPatch.context() as patch:
        settle(patch, toy_lake.lake.parent)
        with session():
            yield toy_lake


def test_every_scan_has_exactly_one_result(place: Place) -> None:
    scans = place.catalog.rows("scans").to_pylist()
    results = place.catalog.history("results").to_pylist()
    assert len(scans) == len(list(place.cohort.glob("sub-*/**/*w.nii.gz"))) == 14
    assert sorted(r["scan_id"] for r in results) == sorted(s["scan_id"] for s in scans)


def test_the_damaged_scan_is_a_row_that_says_why(place: Place) -> None:
    results = place.catalog.rows("results").to_pylist()
    bad = [row for row in results if row["status"] == "failed"]
    assert [row["code"] for row in bad] == ["SCAN-CORRUPT"] or [row["code"] for row in bad] == [
        "SCAN-TRUNCATED"
    ]
    assert all(row["status"] in ("ok", "flagged") for row in results if row not in bad)


def test_outputs_lie_on_the_grid_of_their_scan(place: Place) -> None:
    uris = {s["scan_id"]: s["uri"] for s in place.catalog.rows("scans").to_pylist()}
    done = [r for r in place.catalog.rows("results").to_pylist() if r["output_uri"]]
    assert len(done) == 13
    for row in done:
        before, after = nib.load(uris[row["scan_id"]]), nib.load(row["output_uri"])
        assert before.shape == after.shape
        assert np.array_equal(before.affine, after.affine)
        for form in ("qform", "sform"):
            old, code = getattr(before, f"get_{form}")(coded=True)
            new, new_code = getattr(after, f"get_{form}")(coded=True)
            assert code == new_code and np.array_equal(old, new)
        data = np.asarray(after.dataobj)
        assert np.isfinite(data).all() and data.any()
        sidecar = json.loads(Path(row["sidecar_uri"]).read_text())
        assert sidecar["ScanId"] == row["scan_id"] and sidecar["SkullStripped"] is True


def test_nothing_learned_from_test_subjects(place: Place) -> None:
    pack = json.loads((place.lake / "models" / "global" / "1" / "pack.json").read_text())
    scans = place.catalog.rows("scans").to_pylist()
    train = [s for s in scans if s["split"] != "test" and s["status"] == "ok"]
    assert pack["meta"]["scans"] == len(train)
    assert pack["meta"]["training_sites"] == ["siteA", "siteB"]  # siteC is never seen


def test_the_look_of_a_site_is_measured_once_on_scans_free_to_learn_from(place: Place) -> None:
    scans = place.catalog.rows("scans").to_pylist()
    (folder,) = (p for p in (place.lake / "prepared").glob("*/looks-*"))
    looks = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert set(looks) == {f"site{s}_{q}" for s in "ABC" for q in ("T1w", "T2w")}
    for look in looks.values():
        mine = [
            s for s in scans
            if s["status"] == "ok"
            and (s["site"], s["sequence"]) == (look["site"], look["sequence"])
        ]  # fmt: skip
        free = [s for s in mine if s["split"] != "test"] or mine
        assert look["scans"] == len(free) > 0


def test_evaluation_covers_both_sites_and_both_rivals(place: Place) -> None:
    rows = place.catalog.rows("metrics").to_pylist()
    assert {r["site"] for r in rows} <= {"siteB", "siteC"}
    assert {r["method"] for r in rows} == {"raw", "nyul", "sgcd"}
    assert {r["metric"] for r in rows} >= {"ssim", "psnr", "pcc", "wasserstein"}
    assert {r["seen"] for r in rows if r["site"] == "siteC"} == {False}
    page = next((place.lake / "reports").glob("*/index.html")).read_text()
    assert "siteC" in page and "http://" not in page.split("<body")[1].split("src=")[0]


def test_losses_and_model_are_tracked(place: Place) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place.lake / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    by_command = {run.data.tags["command"]: run for run in runs}
    assert by_command["train"].data.tags["scans_version"].isdecimal()
    assert by_command["evaluate"].data.tags["results_version"].isdecimal()
    assert set(by_command) >= {"train", "tune", "harmonize", "evaluate"}
    losses = client.get_metric_history(by_command["train"].info.run_id, "loss")
    assert [m.step for m in losses] == list(range(6))
    found = client.get_model_version_by_alias(f"target-{TARGET}", "candidate")
    assert found.tags["lake_version"] == "1"
    copy = Path(client.download_artifacts(found.run_id, "modelpack"))
    own = place.lake / "models" / f"target-{TARGET}" / "1"
    names = {path.name for path in copy.iterdir()}
    assert names == {path.name for path in own.iterdir()} - {"FIGURES.md"}
    assert all((copy / name).read_bytes() == (own / name).read_bytes() for name in names)
    evaluated = by_command["evaluate"]
    assert {"siteC/T1w/sgcd/psnr", "siteC/T1w/raw/psnr"} <= set(evaluated.data.metrics)
    figures = {Path(f.path).name for f in client.list_artifacts(evaluated.info.run_id, "figures")}
    kinds = ("measures", "histograms", "distances")
    assert figures >= {f"{kind}_{sequence}.png" for kind in kinds for sequence in ("T1w", "T2w")}


def test_a_promoted_model_is_found_and_its_version_pinned(place: Place) -> None:
    name = f"target-{TARGET}"
    assert place.sgcd("promote", f"{name}@1") == 0
    assert place.sgcd("harmonize", "--model", f"{name}@champion") == 0  # nothing to do
    rows = place.catalog.rows("results", where={"model": name}).to_pylist()
    assert {row["model_version"] for row in rows} == {1}


def test_the_derivative_says_what_was_done(place: Place) -> None:
    root = place.lake / "derivatives" / f"target-{TARGET}-v1"
    text = (root / "logs" / "CITATION.md").read_text()
    assert "13 scans (T1w 6, T2w 7)" in text and f"the look of site {TARGET}" in text
    assert "1 could not be harmonized (SCAN-" in text and "PyTorch" in text
    assert "2 steps with" in text and "statistics" in text
    description = json.loads((root / "dataset_description.json").read_text())
    assert description["DatasetLinks"] == {"cohort": place.cohort.as_uri()}
    people = (root / "participants.tsv").read_text().splitlines()
    done = {row["subject"] for row in place.catalog.rows("results").to_pylist()
            if row["output_uri"]}  # fmt: skip
    assert {line.split("\t")[0] for line in people[1:]} == {f"sub-{s}" for s in done}


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """Everything in the lake that must not move, with size and time."""
    kept = ("prepared", "derivatives", "models", "catalog/scans", "catalog/results")
    files = [p for name in kept for p in (root / name).rglob("*") if p.is_file()]
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


def test_a_second_run_changes_nothing(place: Place) -> None:
    before = snapshot(place.lake)
    assert place.sgcd("index", str(place.cohort)) in (0, 1)
    assert place.sgcd("prepare", *SET) == 0
    assert place.sgcd("train", *SET) == 0
    assert place.sgcd("tune", "--target", TARGET) == 0
    assert place.sgcd("harmonize", "--model", f"target-{TARGET}") == 0
    assert snapshot(place.lake) == before


def test_built_in_settings_cannot_be_changed_after_training(place: Place) -> None:
    words = ["--model", f"target-{TARGET}", "--set", "prepare.mm=4"]
    assert place.sgcd("harmonize", *words) == 78


def test_tuning_leaves_stage_1_untouched(place: Place) -> None:
    folder = place.lake / "models"
    first = (folder / "global" / "1" / "network.safetensors").read_bytes()
    beside = folder / f"target-{TARGET}" / "1" / "global_network.safetensors"
    assert beside.read_bytes() == first
    assert (folder / f"target-{TARGET}" / "1" / "network.safetensors").read_bytes() != first


def test_the_same_scans_from_s3_give_the_same_voxels(place: Place, s3_server: S3Server) -> None:
    """Index, prepare and harmonize in a bucket; a damaged scan beside is a row there as well."""
    store, data, lake = Store(), s3_server.uri("path/cohort"), s3_server.uri("path/lake")
    here = {r["scan_id"]: r for r in place.catalog.rows("results").to_pylist()}
    scans = place.catalog.rows("scans").to_pylist()
    bad = next(s for s in scans if s["status"] != "ok")
    # all of a site: its look is measured on them
    good = [
        s for s in scans
        if s["status"] == "ok" and s["site"] == "siteB" and s["split"] == "train"
    ]  # fmt: skip
    for scan in (bad, *good):
        name = Path(scan["uri"]).relative_to(place.cohort)
        store.write_bytes(f"{data}/{name}", Path(scan["uri"]).read_bytes())
    table = (place.cohort / "participants.tsv").read_bytes()
    store.write_bytes(f"{data}/participants.tsv", table)
    for path in (place.lake / "models").rglob("*"):
        if path.is_file():
            store.write_bytes(f"{lake}/{path.relative_to(place.lake)}", path.read_bytes())
    model = f"target-{TARGET}"
    assert cli.main(["index", data, "--lake", lake]) == 1
    assert cli.main(["prepare", *SET, "--lake", lake]) == 0
    assert cli.main(["harmonize", "--model", model, "--lake", lake]) == 1
    rows = Catalog(Lake(lake)).rows("results").to_pylist()
    there = {(r["subject"], r["sequence"]): r for r in rows}
    assert len(rows) == len(there) == 1 + len(good)
    for scan in good:
        row = there[scan["subject"], scan["sequence"]]
        assert row["output_uri"].startswith("s3://")
        assert row["output_sha256"] == here[scan["scan_id"]]["output_sha256"]
    assert there[bad["subject"], bad["sequence"]]["code"] == here[bad["scan_id"]]["code"]
    assert cli.main(["harmonize", "--model", model, "--lake", lake]) == 0  # nothing to do
    assert len(Catalog(Lake(lake)).history("results").to_pylist()) == len(rows)
