"""Digital traveling subjects: physics, anatomy, ageing, and the BIDS tree."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipelines.cohort import (
    Anatomy,
    class_fractions,
    load_anatomy,
    make_cohort,
    random_scanner,
    random_sites,
    random_subject,
    render_scan,
    render_truth,
)
from pipelines.cohort.physics import Protocol, longitudinal, signal
from pipelines.cohort.scanner import site_name
from pipelines.cohort.warp import jacobian_determinant, random_displacement
from sgcd_core.errors import ConfigError, InputError, UsageError

SMALL = {"subjects": 4, "sites": 2, "traveling": 1, "unseen_sites": 1, "mm": 6.0, "seed": 3}
CSF, CORTEX, WHITE = 1, 2, 3


@pytest.fixture(scope="module")
def template() -> Anatomy:
    return load_anatomy(mm=2.0)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cohort") / "bids"
    make_cohort(str(out), **SMALL)
    return out


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def scans(folder: Path) -> list[Path]:
    return sorted(folder.glob("sub-*/ses-*/anat/*.nii.gz"))


def test_heads_have_the_size_of_heads(template: Anatomy) -> None:
    volumes: dict[str, list[float]] = {"F": [], "M": []}
    for seed in range(12):
        person = random_subject(template, np.random.default_rng(seed), sex="FM"[seed % 2])
        truth, _ = render_truth(person, 6.0)
        volumes[person.sex].append(float((truth > 0).sum()) * 0.216)
    assert all(1000 < ml < 2000 for part in volumes.values() for ml in part)
    assert np.mean(volumes["F"]) + 50 < np.mean(volumes["M"])


# physics


def test_table_of_t1_agrees_with_the_equations() -> None:
    t1 = np.random.default_rng(0).uniform(200, 5000, 1000).astype(np.float32)
    one, t2 = np.ones_like(t1), np.full_like(t1, 80)
    spin = Protocol(kind="spin_echo", tr=5000, te=100)
    spoiled = Protocol(kind="spoiled_gradient_echo", tr=18, te=4, flip=25)
    wanted = (1 - 2 * np.exp(-(5000 - 50) / t1) + np.exp(-5000 / t1)) * np.exp(-100 / 80)
    np.testing.assert_allclose(signal(spin, one, t1, t2, 3.0), wanted, rtol=4e-3)
    angle, e1 = np.deg2rad(25), np.exp(-18 / t1)
    wanted = np.sin(angle) * (1 - e1) / (1 - np.cos(angle) * e1) * np.exp(-4 / 80 - 4 * 0.0099)
    np.testing.assert_allclose(signal(spoiled, one, t1, t2, 3.0), wanted, rtol=2e-2)


def test_mprage_is_the_fixed_point_of_stepping_through_pulses() -> None:
    how = Protocol(kind="mprage", tr=2300, te=3, ti=900, flip=9, readouts=160, echo_spacing=7)
    t1 = np.array([650.0, 1400.0, 4300.0])
    alpha, m, centre = np.deg2rad(9), np.ones(3), np.zeros(3)
    before = 900 - 80 * 7
    for _ in range(12):
        m = 1 + (-m - 1) * np.exp(-before / t1)
        for pulse in range(160):
            if pulse == 80:
                centre = np.abs(m) * np.sin(alpha)
            m = 1 + (m * np.cos(alpha) - 1) * np.exp(-7 / t1)
        m = 1 + (m - 1) * np.exp(-(2300 - 900 - 80 * 7) / t1)
    np.testing.assert_allclose(longitudinal(how, t1), centre, rtol=1e-6)


# people


def test_warps_are_invertible_and_move_tissue() -> None:
    for seed in range(3):
        field = random_displacement(np.random.default_rng(seed), (40, 48, 40), 4.0)
        assert jacobian_determinant(field, 4.0).min() > 0.2
        assert np.sqrt((field**2).sum(0)).max() > 4.0


def test_a_rough_warp_is_weakened_until_invertible() -> None:
    rng = np.random.default_rng(0)
    field = random_displacement(rng, (24, 24, 24), 4.0, scales=((6.0, 8.0),))
    assert jacobian_determinant(field, 4.0).min() > 0.2


def test_age_shows_and_can_be_predicted(template: Anatomy) -> None:
    from sklearn.linear_model import RidgeCV

    ages, rows = [], []
    for seed in range(36):
        person = random_subject(template, np.random.default_rng(seed))
        volumes = np.array([part.sum() for part in class_fractions(person)])
        ages.append(person.age)
        rows.append(volumes / volumes.sum())
    x, y = np.asarray(rows), np.asarray(ages)
    x = (x - x[:24].mean(0)) / x[:24].std(0)
    assert RidgeCV().fit(x[:24], y[:24]).score(x[24:], y[24:]) > 0.5
    old, young = x[y > 65].mean(0), x[y < 35].mean(0)
    assert old[4] > young[4] and old[0] > young[0] and old[1] < young[1]


# scanners


@pytest.mark.parametrize("seed", range(4))
def test_contrast_is_that_of_t1w_and_t2w_at_every_site(template: Anatomy, seed: int) -> None:
    person = random_subject(template, np.random.default_rng(seed), age=40)
    labels, at = render_truth(person, 2.0)
    inverse = np.linalg.inv(at)
    for scanner in random_sites(seed, 3, 1):
        means = {}
        for sequence in ("T1w", "T2w"):
            data, affine = render_scan(person, scanner, sequence, 3.0, np.random.default_rng(1))
            assert data.min() >= 0 and np.isfinite(data).all()
            spots = np.argwhere(data > 0)
            world = np.c_[spots, np.ones(len(spots))] @ affine.T
            where = np.rint(world @ inverse.T)[:, :3].astype(int)
            where = np.clip(where, 0, np.array(labels.shape) - 1)
            tissue = labels[tuple(where.T)]
            values = data[tuple(spots.T)]
            # the truth lies where the scan lies
            assert (tissue > 0).mean() > 0.93
            means[sequence] = [float(np.median(values[tissue == t])) for t in (5, CORTEX, WHITE)]
        csf, grey, white = means["T1w"]
        assert white > 1.05 * grey and grey > 1.2 * csf
        csf, grey, white = means["T2w"]
        assert csf > 1.15 * grey and grey > 1.03 * white


def test_scans_repeat_and_noise_differs(template: Anatomy) -> None:
    person = random_subject(template, np.random.default_rng(0))
    again = random_subject(template, np.random.default_rng(0))
    scanner = random_scanner(np.random.default_rng(5))
    first, affine = render_scan(person, scanner, "T1w", 6.0, np.random.default_rng(1))
    same, _ = render_scan(again, scanner, "T1w", 6.0, np.random.default_rng(1))
    other, at = render_scan(person, scanner, "T1w", 6.0, np.random.default_rng(2))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()
    np.testing.assert_array_equal(first > 0, other > 0)
    np.testing.assert_array_equal(affine, at)
    assert nib.aff2axcodes(affine) == tuple(scanner.orientation)


def test_repositioning_moves_the_head(template: Anatomy) -> None:
    person = random_subject(template, np.random.default_rng(0))
    scanner = random_scanner(np.random.default_rng(5))
    still, _ = render_scan(person, scanner, "T1w", 6.0, np.random.default_rng(1))
    moved, _ = render_scan(person, scanner, "T1w", 6.0, np.random.default_rng(1), shift=5.0)
    assert ((still > 0) != (moved > 0)).sum() > 50


def test_other_seeds_draw_other_scanners() -> None:
    assert random_sites(1, 5, 1) == random_sites(1, 5, 1)
    drawn = [s.model_dump_json() for seed in range(6) for s in random_sites(seed, 5, 1)]
    assert len(set(drawn)) == len(drawn)
    assert {s.field_strength for s in random_sites(0, 2, 0)} == {1.5, 3.0}
    assert [site_name(n) for n in (0, 25, 26, 701, 702)] == [
        "siteA", "siteZ", "siteAA", "siteZZ", "siteAAA",
    ]  # fmt: skip


def test_an_unknown_sequence_is_refused(template: Anatomy) -> None:
    person = random_subject(template, np.random.default_rng(0))
    scanner = random_scanner(np.random.default_rng(5))
    with pytest.raises(ConfigError):
        render_scan(person, scanner, "FLAIR", 6.0, np.random.default_rng(1))


# the tree


def test_training_is_unpaired_and_travelers_go_everywhere(tree: Path) -> None:
    people = table(tree / "participants.tsv")
    assert list(people[0]) == ["participant_id", "age", "sex", "split", "site"]
    by_site: dict[str, int] = {}
    for person in people:
        folder = tree / person["participant_id"]
        visits = table(folder / f"{person['participant_id']}_sessions.tsv")
        sessions = sorted(p.name for p in folder.glob("ses-*"))
        assert sorted(v["session_id"] for v in visits) == sessions
        assert 20 <= float(person["age"]) <= 80 and person["sex"] in "FM"
        if person["split"] == "train":
            assert [v["site"] for v in visits] == [person["site"]]
            by_site[person["site"]] = by_site.get(person["site"], 0) + 1
        else:
            assert person["split"] == "test" and person["site"] == "n/a"
            assert [v["site"] for v in visits] == ["siteA", "siteB", "siteC"]
    assert by_site == {"siteA": 2, "siteB": 2}


def test_names_and_sidecars_are_bids(tree: Path) -> None:
    pattern = re.compile(
        r"(sub-[a-zA-Z0-9]+)/(ses-[a-zA-Z0-9]+)/anat/\1_\2_(T1w|T2w)\.nii\.gz"
    )  # fmt: skip
    files = scans(tree)
    assert len(files) == (4 + 3) * 2
    for path in files:
        assert pattern.fullmatch(str(path.relative_to(tree)))
        about = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
        assert about["MagneticFieldStrength"] in (1.5, 3.0)
        assert 0 < about["EchoTime"] < 0.2 < about["FlipAngle"]
        assert 0 < about["RepetitionTime"] < 10
        assert about["Manufacturer"] == "digital"
        image = nib.load(path)
        assert image.get_data_dtype() == np.int16
        assert image.header["qform_code"] > 0 and image.header["sform_code"] > 0
    description = json.loads((tree / "dataset_description.json").read_text())
    assert description["DatasetType"] == "raw" and description["GeneratedBy"]
    truth = tree / "derivatives" / "truth"
    assert json.loads((truth / "dataset_description.json").read_text())["GeneratedBy"]
    assert [s["site"] for s in json.loads((truth / "sites.json").read_text())] == [
        "siteA", "siteB", "siteC",
    ]  # fmt: skip


def test_a_traveler_has_one_anatomy_at_every_site(tree: Path) -> None:
    truth = tree / "derivatives/truth/sub-travel01/anat/sub-travel01_desc-brain_mask.nii.gz"
    litres = nib.load(truth).get_fdata().sum() * 6.0**3 / 1e6
    volumes, centres, images = [], [], []
    for path in scans(tree / ".." / tree.name):
        if "travel01" in path.name and "T1w" in path.name:
            image = nib.load(path)
            data = image.get_fdata()
            inside = np.argwhere(data > 0)
            volumes.append(len(inside) * abs(np.linalg.det(image.affine[:3, :3])) / 1e6)
            centres.append((image.affine @ np.append(inside.mean(0), 1))[:3])
            images.append(data)
    assert len(volumes) == 3
    np.testing.assert_allclose(volumes, litres, rtol=0.06)
    assert np.ptp(np.asarray(centres), axis=0).max() < 1.0
    assert len({(i.shape, round(float(i.max()))) for i in images}) == 3


def test_twice_changes_nothing_and_a_lost_scan_comes_back(tree: Path) -> None:
    before = digests(tree)
    assert make_cohort(str(tree), **SMALL).written == 0
    assert digests(tree) == before
    lost = scans(tree)[3]
    lost.unlink()
    lost.with_name(lost.name.replace(".nii.gz", ".json")).unlink()
    assert make_cohort(str(tree), **SMALL).written == 1
    assert digests(tree) == before


def test_other_settings_in_the_same_folder_are_refused(tree: Path) -> None:
    with pytest.raises(ConfigError, match="seed"):
        make_cohort(str(tree), **{**SMALL, "seed": 4})


@pytest.mark.parametrize("name", ["dataset_description.json", "participants.tsv", "sub-1/x.nii"])
def test_a_foreign_folder_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match="not a digital cohort") as refused:
        make_cohort(str(tmp_path), **SMALL)
    assert refused.value.exit_code == 78
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / name]


def test_workers_change_nothing(tree: Path, tmp_path: Path) -> None:
    make_cohort(str(tmp_path / "two"), workers=2, **SMALL)
    assert digests(tmp_path / "two") == digests(tree)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"mm": -1.0}, ConfigError),
        ({"sites": 0}, ConfigError),
        ({"sequences": ("FLAIR",)}, UsageError),
        ({"train_anatomies": ["nobody"]}, ConfigError),
        ({"head": True}, InputError),
    ],
)
def test_wrong_arguments_are_explained(
    tmp_path: Path, values: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        make_cohort(str(tmp_path / "out"), **{**SMALL, **values})


# label maps


def test_label_maps_split_between_training_and_test(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "anatomy"
    if not folder.is_dir():
        pytest.skip(f"no label maps at {folder}")
    out = tmp_path / "bids"
    make_cohort(str(out), subjects=1, sites=1, traveling=1, unseen_sites=0, mm=6.0,
                anatomy=str(folder))  # fmt: skip
    origin = {r["participant_id"]: r["anatomy"]
              for r in table(out / "derivatives/truth/participants.tsv")}  # fmt: skip
    assert origin["sub-001"] == "anatomy-01" and origin["sub-travel01"] == "anatomy-11"
    request = json.loads((out / "derivatives/truth/cohort.json").read_text())
    assert not set(request["train_anatomies"]) & set(request["test_anatomies"])
    truth = nib.load(next((out / "derivatives/truth/sub-001").rglob("*dseg.nii.gz")))
    present = set(np.unique(truth.get_fdata()).astype(int))
    assert present >= {0, CSF, CORTEX, WHITE, 4, 5, 6}
    assert len(scans(out)) == 4


def test_a_folder_without_label_maps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    with pytest.raises(InputError):
        make_cohort(str(tmp_path / "out"), anatomy=str(tmp_path / "maps"), **SMALL)
    nib.save(nib.Nifti1Image(np.full((20, 20, 20), 7, np.int16), np.eye(4)),
             tmp_path / "maps" / "a.nii.gz")  # fmt: skip
    with pytest.raises(InputError, match="FreeSurfer"):
        make_cohort(str(tmp_path / "out"), anatomy=str(tmp_path / "maps"), **SMALL)
