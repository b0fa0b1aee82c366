"""One scan to its row: lesion masks are found and honoured, uncertainty maps are written."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_scan import CONFIG, NATIVE, Site, toy_model

from pipelines.catalog import Catalog
from pipelines.derivative import json_beside
from pipelines.ledger import (
    MAX_ATTEMPTS,
    begin_attempt,
    end_attempts,
    forgive_attempts,
    model_key,
    note_late,
)
from pipelines.lesions import candidates, check_pattern, find_lesion
from pipelines.plan import plan
from pipelines.prepare import load_prepared
from ray_jobs.harmonize import LEAST_SPREAD, Tally
from sgcd_core.diffusion.sampler import noise_for
from sgcd_core.errors import UsageError
from sgcd_core.harmonizer import Harmonizer
from sgcd_core.io.nifti import encode_nifti, read_nifti
from sgcd_core.io.store import Store, sha256_hex
from sgcd_core.volume.lesion import lesion_on_model_grid

#: Lake, model and version of a run.
WHOSE = ("lake", "target-A", 1)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Harmonizer:
    return toy_model(tmp_path_factory.mktemp("train"))


def volume(uri: str) -> np.ndarray:
    return read_nifti(uri).data


def test_a_mask_beside_the_scan_is_honoured_and_said(site: Site, model: Harmonizer) -> None:
    bare = site.run(model, 1)
    assert bare["status"] in ("ok", "flagged") and bare.get("lesion_ml") is None
    file = site.write_mask("sub-01_ses-2_run-1_label-lesion_mask.nii.gz")
    row = site.run(model, 2)
    assert row["lesion_ml"] == pytest.approx((site.lesion & site.mask).sum() * 0.064, rel=1e-6)
    sidecar = json.loads(Store().read_bytes(row["sidecar_uri"]))
    assert sidecar["LesionMask"] == file.as_uri()
    assert sidecar["Sources"] == [site.file.as_uri(), file.as_uri()]
    assert sidecar["LesionMl"] == row["lesion_ml"]
    assert "LesionMask" not in json.loads(Store().read_bytes(bare["sidecar_uri"]))
    # outside the lesion the model-grid output is the same, inside it is a recoloured scan
    held = lesion_on_model_grid(site.lesion, site.geometry) & site.model_mask
    one, two = volume(bare["model_grid_uri"]), volume(row["model_grid_uri"])
    np.testing.assert_array_equal(one[~held], two[~held])
    assert np.abs(one - two)[held].mean() > 0.01
    inner = volume(row["output_uri"])[site.lesion]
    drawn = volume(bare["output_uri"])[site.lesion]
    source = site.scan.data[site.lesion]
    assert np.corrcoef(source, inner)[0, 1] > np.corrcoef(source, drawn)[0, 1]


def test_a_pattern_leads_to_masks_and_none_to_no_mask(site: Site, model: Harmonizer) -> None:
    site.write_mask("sub-01_ses-2_run-1_T1w_label-lesion_roi.nii.gz", np.zeros(NATIVE, bool))
    elsewhere = "../../../derivatives/lesions/sub-01/ses-2/sub-01_ses-2_run-1_T1w_lesion.nii.gz"
    site.write_mask(elsewhere)
    pattern = "derivatives/lesions/{subject}/{session}/{stem}_lesion.nii.gz"
    assert site.run(model, 1, lesions=pattern)["lesion_ml"] > 0
    assert site.run(model, 2, lesions="none").get("lesion_ml") is None
    empty = site.run(model, 3)  # the empty mask beside the scan: nothing changes, but it is said
    assert empty["lesion_ml"] == 0
    np.testing.assert_array_equal(
        volume(empty["output_uri"]), volume(site.run(model, 4, lesions="none")["output_uri"])
    )


def test_a_mask_that_cannot_be_used_is_a_row_with_its_code(site: Site, model: Harmonizer) -> None:
    name = "sub-01_ses-2_run-1_T1w_label-lesion_roi.nii.gz"
    other = encode_nifti(site.lesion, np.diag([2.0, 4.0, 4.0, 1.0]), dtype=np.uint8)
    small = encode_nifti(site.lesion[1:], np.array(site.scan.affine), dtype=np.uint8)
    whole = encode_nifti(site.mask, site.scan, dtype=np.uint8)
    cases = {
        "LESION-GRID": [other, small], "LESION-UNREADABLE": [b"text", whole[:-40]],
        "LESION-TOO-BIG": [whole],
    }  # fmt: skip
    version = 0
    for code, bodies in cases.items():
        for body in bodies:
            version += 1
            (site.folder / name).write_bytes(body)
            row = site.run(model, version)
            assert (row["status"], row["code"]) == ("failed", code)
            assert row.get("output_uri") is None


def test_a_mask_of_another_image_of_the_session_is_left_out_and_said(
    site: Site, model: Harmonizer
) -> None:
    name = "sub-01_ses-2_run-1_label-lesion_mask.nii.gz"
    other = encode_nifti(site.lesion, np.diag([2.0, 4.0, 4.0, 1.0]), dtype=np.uint8)
    (site.folder / name).write_bytes(other)
    row, bare = site.run(model, 1), site.run(model, 2, lesions="none")
    assert row.get("lesion_ml") is None
    assert (row["status"], row["code"]) == (bare["status"], bare["code"])
    assert "lesion mask beside the scan is left out" in row["message"]
    np.testing.assert_array_equal(volume(row["output_uri"]), volume(bare["output_uri"]))
    asked = site.run(
        model, 3, lesions="{subject}/{session}/anat/{entities}_label-lesion_mask.nii.gz"
    )
    assert (asked["status"], asked["code"]) == ("failed", "LESION-GRID")


def test_where_a_mask_is_looked_for() -> None:
    scan = {
        "uri": "s3://b/set/sub-01/anat/sub-01_acq-x_T2w.nii", "subject": "01", "session": None,
        "sequence": "T2w",
    }  # fmt: skip
    beside = "s3://b/set/sub-01/anat/sub-01_acq-x"
    assert candidates(scan, None)[:2] == [
        f"{beside}_T2w_label-lesion_roi.nii.gz", f"{beside}_T2w_label-lesion_roi.nii",
    ]  # fmt: skip
    assert f"{beside}_label-lesion_mask.nii.gz" in candidates(scan, None)
    first = candidates(scan, "derivatives/l/{subject}/{session}/anat/{entities}_{sequence}_m.nii")
    assert first[0] == "s3://b/set/derivatives/l/sub-01/anat/sub-01_acq-x_T2w_m.nii"
    assert candidates(scan, "s3://c/{stem}.nii.gz")[0] == "s3://c/sub-01_acq-x_T2w.nii.gz"
    assert candidates(scan, "/m/{stem}.nii.gz")[0] == "/m/sub-01_acq-x_T2w.nii.gz"
    assert candidates(scan, "none") == []


def test_no_mask_anywhere_is_no_lesion(site: Site) -> None:
    assert find_lesion(site.row, "derivatives/{subject}/{stem}.nii.gz", Store()) is None


@pytest.mark.parametrize("pattern", ["x/{sub}.nii", "x/{subject", "x/{stem!r}", "{stem:>9}", "{}"])
def test_a_pattern_that_cannot_be_filled_in_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match="--lesions"):
        check_pattern(pattern)


def test_uncertainty_is_the_deviation_over_seeded_draws(site: Site, model: Harmonizer) -> None:
    row = site.run(model, 1, samples=3)
    again = site.run(model, 2, samples=3)
    files = load_prepared(site.lake, CONFIG.prepare.digest(), site.row["scan_id"])
    batch = model._batch(files.image, files.mask, "T1w", None)
    with torch.inference_mode():
        denoisers, shape = model._denoisers(batch), tuple(batch["image"].shape)
        noises = [noise_for(site.row["scan_id"], CONFIG.seed, n, shape) for n in range(3)]
        draws = [model._draw(batch, denoisers, noise)[0, 0].numpy() for noise in noises]
    assert np.abs(draws[0] - draws[1]).max() > 1e-3
    spread = np.std(draws, axis=0)
    stem = row["model_grid_uri"].replace("desc-harmonized_", "desc-harmonizedstd_")
    written = volume(stem)
    np.testing.assert_allclose(written, spread, atol=1e-6)
    assert row["uncertainty_mean"] == pytest.approx(float(spread[files.mask].mean()), rel=1e-4)
    np.testing.assert_allclose(volume(row["model_grid_uri"]), np.mean(draws, axis=0), atol=1e-6)
    native = read_nifti(row["uncertainty_uri"])
    assert native.shape == NATIVE and np.array_equal(native.affine, site.scan.affine)
    assert native.data[site.mask].mean() == pytest.approx(row["uncertainty_mean"], rel=0.1)
    assert not native.data[~site.mask].any()
    for uri in (stem, row["uncertainty_uri"]):
        sidecar = json.loads(Store().read_bytes(json_beside(uri)))
        assert sidecar["Units"] == "1" and (sidecar["Samples"], sidecar["Seed"]) == (3, 0)
        assert sidecar["Sources"][0] == site.file.as_uri()
    one, two = (Store().read_bytes(r["uncertainty_uri"]) for r in (row, again))
    assert one == two
    assert json.loads(Store().read_bytes(row["sidecar_uri"]))["UncertaintyMean"] > 0


def test_one_sample_has_no_uncertainty(site: Site, model: Harmonizer) -> None:
    row = site.run(model, 1)
    assert row.get("uncertainty_mean") is None and row.get("uncertainty_uri") is None
    assert not list(Path(site.lake.uri).rglob("*harmonizedstd*"))


def test_maps_of_before_do_not_stay_beside_an_output_without_any(
    site: Site, model: Harmonizer
) -> None:
    site.run(model, 1, samples=2)
    assert site.run(model, 1)["status"] in ("ok", "flagged")
    files = {path.name for path in Path(site.lake.uri).rglob("*desc-harmonized*")}
    assert len(files) == 4 and not any("harmonizedstd" in name for name in files)


def test_no_output_of_before_stays_beside_a_row_that_says_why_there_is_none(
    site: Site, model: Harmonizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outputs() -> list[Path]:
        return list(Path(site.lake.uri).rglob("*desc-harmonized*"))

    assert site.run(model, 1, samples=2)["status"] in ("ok", "flagged") and len(outputs()) == 8
    moved = site.file.rename(site.file.with_suffix(".away"))
    assert site.run(model, 1)["code"] == "SCAN-MISSING" and len(outputs()) == 8
    moved.rename(site.file)
    site.write_mask("sub-01_ses-2_run-1_T1w_label-lesion_roi.nii.gz", np.ones(NATIVE, bool))
    assert site.run(model, 1)["code"] == "LESION-TOO-BIG"
    assert not outputs()


def test_what_the_seeds_drew_in_a_lesion_is_not_in_the_map(site: Site, model: Harmonizer) -> None:
    site.write_mask("sub-01_ses-2_run-1_label-lesion_roi.nii.gz")
    row = site.run(model, 1, samples=2)
    held = lesion_on_model_grid(site.lesion, site.geometry) & site.model_mask
    spread = volume(row["model_grid_uri"].replace("desc-harmonized_", "desc-harmonizedstd_"))
    around = spread[site.model_mask & ~held]
    assert around.min() - 1e-6 <= spread[held].min() and spread[held].max() <= around.max() + 1e-6


def test_maps_of_a_model_whose_seeds_agree_are_said_to_say_nothing(
    site: Site, model: Harmonizer
) -> None:
    row, told = site.run(model, 1, samples=3) | {"status": "ok"}, Tally()
    told.add(site.row, row)
    assert row["uncertainty_mean"] > LEAST_SPREAD and told.notes(*WHOSE) == []
    alike = Tally()
    for spread in (2e-4, 4e-4, 0.0):
        alike.add(site.row, row | {"uncertainty_mean": spread})
    assert "differ by 0.0004 of the range" in alike.notes(*WHOSE)[0]
    alone = Tally()
    alone.add(site.row, row | {"uncertainty_mean": None})
    assert alone.notes(*WHOSE) == []


class Moody:
    """The model, but the first so many calls raise what nobody foresaw."""

    def __init__(self, model: Harmonizer, failures: int) -> None:
        self.model, self.left, self.calls = model, failures, 0

    def harmonize(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise RuntimeError("a patient's name")
        return self.model.harmonize(*args, **options)

    def outlier_score(self, *args: Any) -> float:
        return self.model.outlier_score(*args)


def told(site: Site) -> list[tuple[int, str, str | None]]:
    """What the table `attempts` is given of the last run."""
    return [(item["attempt"], item["ended"], item.get("error")) for item in site.tries]


def test_what_nobody_foresaw_is_tried_once_more(site: Site, model: Harmonizer) -> None:
    assert site.run(Moody(model, 1), 1)["output_uri"]
    assert told(site) == [(1, "raised", "RuntimeError"), (2, "flagged", "FLAG-ANATOMY")]
    row = site.run(Moody(model, 2), 2)
    assert told(site) == [(1, "raised", "RuntimeError"), (2, "raised", "RuntimeError")]
    assert (row["status"], row["code"]) == ("failed", "SCAN-FAILED")
    assert "patient" not in row["message"]


def test_a_scan_whose_row_was_not_committed_is_not_computed_again(
    site: Site, model: Harmonizer
) -> None:
    first = site.run(model, 1)
    again = Moody(model, 0)
    assert site.run(again, 1) == first and again.calls == 0
    assert told(site) == [(1, "uncommitted", None), (2, "adopted", None)]
    other = site.run(again, 1, samples=2)  # not what was asked for then
    assert again.calls == 1 and other["uncertainty_uri"]


@pytest.mark.parametrize(
    "since", [{"subject": "02"}, {"site": "B"}, {"site_look": np.ones(4, np.float32)}], ids=str
)
def test_a_row_that_was_not_committed_counts_under_its_own_labels_and_look_only(
    site: Site, model: Harmonizer, since: dict[str, Any]
) -> None:
    """Labels are corrected, or a look is measured again, after a run that was killed."""
    site.run(model, 1)
    site.row |= since
    again = Moody(model, 0)
    row = site.run(again, 1)
    assert again.calls == 1 and (row["subject"], row["site"]) == (
        site.row["subject"], site.row["site"],
    )  # fmt: skip


def test_outputs_written_over_by_a_run_that_was_killed_are_planned_again(
    site: Site, model: Harmonizer
) -> None:
    """Their row tells of other bytes, until a run commits one that does not."""
    catalog, key, scan_id = Catalog(site.lake), model_key("global", 1), site.row["scan_id"]
    catalog.append("scans", [site.row | {"status": "ok"}])
    catalog.append("results", [site.run(model, 1)])
    end_attempts(site.lake, key, scan_id)
    assert plan(catalog, "global", 1).todo.num_rows == 0
    site.run(model, 1, samples=2)  # as `harmonize --force --samples 2`, killed before its commit
    assert plan(catalog, "global", 1).todo.num_rows == 1
    catalog.append("results", [site.run(model, 1)])
    row = catalog.rows("results").to_pylist()[0]
    assert sha256_hex(Store().read_bytes(row["output_uri"])) == row["output_sha256"]
    assert plan(catalog, "global", 1).todo.num_rows == 0  # killed between commit and clearing
    end_attempts(site.lake, key, scan_id)
    begin_attempt(site.lake, key, scan_id, "stopped")  # Ctrl-C amid a forced try
    forgive_attempts(site.lake, key, "stopped")
    assert plan(catalog, "global", 1).todo.num_rows == 1
    assert plan(catalog, "global", 1, only_new=True).todo.num_rows == 0


def test_a_scan_that_was_late_is_failed_unless_more_time_is_given(
    site: Site, model: Harmonizer
) -> None:
    key, scan_id = model_key("global", 1), site.row["scan_id"]
    begin_attempt(site.lake, key, scan_id)
    note_late(site.lake, key, scan_id, 60.0)
    row = site.run(model, 1, deadline=60.0)
    assert (row["status"], row["code"]) == ("failed", "SCAN-DEADLINE")
    assert told(site) == [(1, "late", None), (2, "failed", "SCAN-DEADLINE")]
    assert site.run(model, 1, deadline=120.0)["output_uri"]


def test_a_scan_that_ended_its_worker_too_often_is_set_aside(site: Site, model: Harmonizer) -> None:
    for _ in range(MAX_ATTEMPTS):
        begin_attempt(site.lake, model_key("global", 1), site.row["scan_id"])
    untouched = Moody(model, 0)
    assert site.run(untouched, 1)["status"] == "quarantined"
    assert untouched.calls == 0
    assert told(site) == [(number, "lost", None) for number in (1, 2, 3)]


def test_a_run_says_why_scans_are_flagged() -> None:
    told = Tally()
    for code in ("FLAG-VOLUMES", "FLAG-ANATOMY", "FLAG-VOLUMES"):
        told.add({"uri": "/a"}, {"status": "flagged", "code": code})
    told.add({"uri": "/b"}, {"status": "ok", "code": None})
    (note,) = told.notes("a lake", 'target-O\'Neill "B"', 2)
    assert "flagged: 2 FLAG-VOLUMES, 1 FLAG-ANATOMY;" in note
    words = shlex.split(note.split("`")[1])
    assert words[:2] == ["sgcd", "query"] and words[3:] == ["--lake", "a lake"]
    assert words[2].endswith("AND model = 'target-O''Neill \"B\"' AND model_version = 2")
