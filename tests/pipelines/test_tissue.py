"""Task 2: a perfect model keeps the tissues, a changed contrast moves them, the truth is found."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_lake import SHAPE, brain, fake_lake
from scipy.ndimage import gaussian_filter

from pipelines.catalog import Catalog
from pipelines.tissue import REGIONS, TRUTH, evaluate_tissue
from sgcd_core.errors import InputError, ModelError
from sgcd_core.io.nifti import encode_nifti

#: Classes of the published truth for the phantom's shells: white, cortical grey, sulcal CSF.
CLASSES = np.array([3, 2, 1])


def soft(seed, sequence, shape):
    """The phantom with blurred borders, where a curve moves voxels to another tissue."""
    image, mask = brain(seed, sequence, shape)
    return np.where(mask, gaussian_filter(image, 0.7), 0).astype(np.float32), mask


def perfect(scan, truth):
    return truth


def squashed(scan, truth):
    """Grey matter takes on what was white: the border between them moves inwards."""
    return np.where(truth > 0.45, 0.45 + 0.3 * ((truth - 0.45) / 0.3).clip(0, 1) ** 4, truth)


def with_truth(lake, root: Path, shift: float = 0.0):
    """Give the lake's scans addresses in a BIDS tree that holds the traveling subjects' truth."""
    scans = Catalog(lake).rows("scans").to_pylist()
    for number, subject in enumerate(dict.fromkeys(sorted(s["subject"] for s in scans))):
        if subject.startswith("x"):
            # People are numbered as fake_lake makes them: x0, x1 come last.
            image, mask = brain(number, "T1w", SHAPE)
            shells = np.abs(image[..., None] - np.array([0.75, 0.5, 0.15])).argmin(-1)
            labels = np.where(mask, CLASSES[shells], 0)
            # At half the voxel side, as a truth that is finer than the model grid.
            fine = labels.repeat(2, 0).repeat(2, 1).repeat(2, 2)
            affine = np.diag([2.0, 2.0, 2.0, 1.0])
            affine[:3, 3] = -1.0
            folder = root / "derivatives" / "truth" / f"sub-{subject}" / "anat"
            folder.mkdir(parents=True)
            body = encode_nifti(fine, affine, dtype=np.uint8)
            (folder / f"sub-{subject}_desc-tissue_dseg.nii.gz").write_bytes(body)
    (root / "derivatives" / "truth" / "cohort.json").write_text(json.dumps({"shift": shift}))
    for scan in scans:
        name = f"sub-{scan['subject']}"
        place = root / name / f"ses-{scan['site']}" / "anat"
        scan["uri"] = str(place / f"{name}_ses-{scan['site']}_{scan['sequence']}.nii.gz")
        scan["recorded_at"] = None
    Catalog(lake).append("scans", scans)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("tissue")
    # One site, so that subjects sort as they were numbered.
    lake, config = fake_lake(str(root / "lake"), perfect, sites=("A",))
    with_truth(lake, root / "bids")
    return lake, config, evaluate_tissue(lake, "target-T", 1, config, training_sites=["T", "A"])


def figures(found, against, measure, method="sgcd", site="A"):
    lines = [x for x in found.lines if (x.against, x.measure, x.site) == (against, measure, site)]
    assert {line.region for line in lines} == set(REGIONS)
    return [line.by_method[method].mean for line in lines]


def test_a_perfect_model_keeps_volume_and_place_of_the_tissues(good):
    _, _, found = good
    assert (found.pairs, found.truths, found.skipped) == (2, 2, {})
    for against in ("target", TRUTH):
        assert min(figures(found, against, "dice")) > 0.97
        assert min(figures(found, against, "ap")) > 0.95
    # The subject's own scan at the target is held against the truth too.
    assert min(figures(found, TRUTH, "dice", method="raw", site="T")) > 0.97


def test_rows_hold_region_reference_and_segmenter(good):
    lake, _, found = good
    rows = Catalog(lake).frame("metrics")
    assert found.written
    assert set(rows.metric) == {"dice.gmm", "ap.gmm"}
    assert set(rows.region) == {"grey matter", "white matter"}
    # Two people at A by three methods, against two references; and at T against the truth.
    assert len(rows) == 2 * 3 * 2 * 4 + 2 * 4
    at_target = rows[rows.site == "T"]
    assert set(at_target.reference) == {TRUTH} and set(at_target.method) == {"raw"}
    sites = Catalog(lake).frame("site_metrics")
    chosen = sites[(sites.method == "sgcd") & (sites.metric == "dice.grey_matter.target.gmm")]
    assert list(chosen.n) == [2] and (chosen.after >= chosen.before).all()


def test_evaluating_again_adds_nothing_and_another_segmenter_does(good):
    lake, config, first = good
    again = evaluate_tissue(lake, "target-T", 1, config, training_sites=["T", "A"])
    assert again.written is False and again.lines == first.lines
    other = evaluate_tissue(lake, "target-T", 1, config, segmenter="kmeans")
    assert other.written is True
    assert {"dice.gmm", "dice.kmeans"} <= set(Catalog(lake).frame("metrics").metric)


def test_a_contrast_that_moves_the_border_lowers_both_figures(tmp_path):
    found = {}
    for name, output in (("perfect", perfect), ("squashed", squashed)):
        lake, config = fake_lake(str(tmp_path / name), output, sites=("A",), make=soft)
        found[name] = evaluate_tissue(lake, "target-T", 1, config)
        assert found[name].truths == 0
    for measure in ("dice", "ap"):
        before, after = (figures(found[n], "target", measure) for n in ("perfect", "squashed"))
        assert all(bad < good - 0.05 for good, bad in zip(before, after, strict=True))


def test_a_repositioned_cohort_has_no_truth(tmp_path):
    lake, config = fake_lake(str(tmp_path / "lake"), perfect, sites=("A",), traveling=1)
    with_truth(lake, tmp_path / "bids", shift=2.0)
    found = evaluate_tissue(lake, "target-T", 1, config)
    assert (found.pairs, found.truths) == (1, 0)


def failing(folder: Path, body: str) -> str:
    script = folder / "tool.py"
    script.write_text(f"import sys, shutil, os\nfolder = {str(folder)!r}\n{body}")
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(script))} {{mask}} {{output}} {{input}}"


def test_a_program_that_always_fails_ends_with_its_code(tmp_path):
    lake, config = fake_lake(str(tmp_path / "lake"), perfect, sites=("A",), traveling=1)
    command = failing(tmp_path, "sys.exit(3)\n")
    with pytest.raises(InputError) as caught:
        evaluate_tissue(lake, "target-T", 1, config, segmenter=command)
    assert caught.value.code == "SEGMENTER-FAILED"
    assert Catalog(lake).frame("metrics").empty


def test_a_program_that_fails_on_one_scan_leaves_the_others(tmp_path):
    lake, config = fake_lake(str(tmp_path / "lake"), perfect, sites=("A",))
    # The mask itself passes for labels (all fluid); the first run fails.
    body = (
        "count = os.path.join(folder, 'count')\n"
        "if not os.path.exists(count):\n    open(count, 'w').close(); sys.exit(1)\n"
        "shutil.copy(sys.argv[1], sys.argv[2])\n"
    )
    found = evaluate_tissue(lake, "target-T", 1, config, segmenter=failing(tmp_path, body))
    assert found.pairs == 1
    assert list(found.skipped.values()) == ["SEGMENTER-FAILED"]


def test_nothing_harmonized_is_an_error(tmp_lake):
    from fake_lake import make_config

    with pytest.raises(ModelError):
        evaluate_tissue(tmp_lake, "m", 1, make_config())
