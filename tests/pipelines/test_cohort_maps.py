"""Label maps that a cohort is made from: whose they are, on which grid, under which names."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from pipelines.cohort import (
    Anatomy,
    load_anatomy,
    make,
    make_cohort,
    random_subject,
)
from pipelines.cohort.plan import choose_anatomies
from pipelines.cohort.tissues import Tissue
from sgcd_core.errors import ConfigError, InputError

ONE = {"subjects": 2, "sites": 1, "traveling": 0, "unseen_sites": 0, "mm": 6.0,
       "sequences": ("T1w",)}  # fmt: skip
Labels = NDArray[np.int16]
#: Half axes of a brain, mm.
SIZE = (70.0, 85.0, 60.0)


def write_map(
    path: Path,
    *,
    sides: tuple[float, float, float] = (2.0, 2.0, 2.0),
    turn: float = 0.0,
    size: tuple[float, float, float] = SIZE,
    head: bool = False,
    change: Callable[[Labels], NDArray[np.generic]] = lambda labels: labels,
) -> str:
    """An ellipsoid as a label map: cortex around white matter, ventricles; `turn` in degrees."""
    shape = np.ceil(np.array([180.0, 210.0, 160.0]) / sides).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("y", turn, degrees=True).as_matrix() @ np.diag(sides)
    affine[:3, 3] = -affine[:3, :3] @ ((shape - 1) / 2)
    world = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    depth = (np.linalg.norm(world / np.array(size), axis=-1) - 1) * 60
    labels = np.zeros(shape, np.int16)
    if head:
        labels[depth < 20], labels[depth < 16], labels[depth < 12] = 511, 515, 24
    right = world[..., 0] > 0
    ventricles = np.linalg.norm(world / np.array([12, 30, 14]), axis=-1) < 1
    for where, left_label, right_label in ((depth < 0, 3, 42), (depth < -4, 2, 41),
                                           (ventricles, 4, 43)):  # fmt: skip
        labels[where & ~right], labels[where & right] = left_label, right_label
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(change(labels), affine), path)
    return str(path)


def renumbered(numbers: dict[int, int]) -> Callable[[Labels], Labels]:
    def change(labels: Labels) -> Labels:
        out = labels.copy()
        for old, new in numbers.items():
            out[labels == old] = new
        return out

    return change


def mostly_gone(labels: Labels) -> Labels:
    """All but 100 voxels of the left cortex are 0."""
    out = labels.ravel().copy()
    out[np.flatnonzero(out == 3)[100:]] = 0
    return out.reshape(labels.shape)


def intensities(labels: Labels) -> Labels:
    """What a T1w scan holds: whole numbers, of them a few that are labels too."""
    values = np.random.default_rng(0).integers(0, 256, labels.shape)
    return np.where(labels > 0, values, 0).astype(np.int16)


# whose labels


@pytest.mark.parametrize(
    "change",
    [
        renumbered({3: 1, 42: 1, 2: 2, 41: 2, 4: 3, 43: 3}),
        renumbered({3: 2, 42: 2, 2: 3, 41: 3, 4: 1, 43: 1}),
        renumbered({3: 2, 42: 2, 2: 3, 41: 3, 4: 0, 43: 0}),
        renumbered({41: 0, 42: 0, 43: 0}),
        mostly_gone,
        intensities,
        lambda labels: labels + np.float32(0.3) * (labels > 0),
    ],
    ids=["fmriprep", "fast", "fast without fluid", "half", "rest of cortex", "T1w", "not whole"],
)  # fmt: skip
def test_what_is_not_freesurfers_is_refused(
    tmp_path: Path, change: Callable[[Labels], NDArray[np.generic]]
) -> None:
    uri = write_map(tmp_path / "map.nii.gz", change=change)
    with pytest.raises(InputError, match=r"FreeSurfer.*2 and 41 white matter, 3 and 42") as refused:
        load_anatomy(uri, mm=2.0)
    assert refused.value.code == "BIDS-INVALID"


@pytest.mark.parametrize("left, right", [(1015, 2030), (11120, 12175)])
def test_parcels_are_cortex(tmp_path: Path, left: int, right: int) -> None:
    whole = load_anatomy(write_map(tmp_path / "aseg.nii.gz"), mm=2.0)
    parcels = renumbered({3: left, 42: right})
    parts = load_anatomy(write_map(tmp_path / "aparc.nii.gz", change=parcels), mm=2.0)
    np.testing.assert_array_equal(parts.main, whole.main)


def test_numbers_of_newer_atlases_are_those_of_freesurfer(tmp_path: Path) -> None:
    """SAMSEG's of today: head tissues and fluid from 902 on, crowns of white matter, air as 517."""
    plain = write_map(tmp_path / "plain.nii.gz", head=True)

    def today(labels: Labels) -> Labels:
        labels = renumbered({511: 911, 515: 915, 24: 520})(labels)
        labels[:, ::2][labels[:, ::2] == 2] = 34
        return np.where(labels == 0, 517, labels).astype(np.int16)

    newer = write_map(tmp_path / "newer.nii.gz", head=True, change=today)
    one, two = (load_anatomy(uri, mm=2.0, head=True) for uri in (plain, newer))
    for name in ("index", "main", "brain"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_a_few_unknown_labels_are_air(tmp_path: Path) -> None:
    uri = write_map(tmp_path / "aseg.nii.gz", change=renumbered({4: 80}))
    assert (load_anatomy(uri, mm=2.0).main == Tissue.VENTRICLE).any()


# on which grid


def hull_ml(anatomy: Anatomy) -> float:
    return float(anatomy.brain.sum() * abs(np.linalg.det(anatomy.affine[:3, :3])) / 1000)


@pytest.mark.parametrize(
    ("sides", "turn"),
    [((2.0, 2.0, 2.0), 25.0), ((2.0, 2.0, 4.0), 0.0), ((4.0, 2.0, 2.0), 10.0),
     ((1.0, 1.0, 1.0), 0.0), ((0.6, 2.0, 2.0), 0.0)],
)  # fmt: skip
def test_a_head_has_one_size_on_every_grid(
    tmp_path: Path, sides: tuple[float, float, float], turn: float
) -> None:
    plain = load_anatomy(write_map(tmp_path / "plain.nii.gz"), mm=2.0)
    other = load_anatomy(write_map(tmp_path / "map.nii.gz", sides=sides, turn=turn), mm=2.0)
    np.testing.assert_allclose(other.affine[:3, :3], np.eye(3) * other.mm, atol=1e-6)
    assert hull_ml(other) == pytest.approx(hull_ml(plain), rel=0.03)


def test_fluid_does_not_depend_on_the_side_of_a_voxel(tmp_path: Path) -> None:
    fine, coarse = (
        load_anatomy(write_map(tmp_path / f"{side}.nii.gz", sides=(side,) * 3), mm=2.0)
        for side in (1.0, 2.0)
    )
    shares = [(a.main == Tissue.SULCAL_CSF).sum() / a.brain.sum() for a in (fine, coarse)]
    assert shares[1] == pytest.approx(shares[0], rel=0.05)


def test_fluid_outside_the_hull_stays_fluid(tmp_path: Path) -> None:
    anatomy = load_anatomy(write_map(tmp_path / "head.nii.gz", head=True), mm=2.0, head=True)
    person = random_subject(anatomy, np.random.default_rng(0), age=60.0)
    outside = (anatomy.main == Tissue.SULCAL_CSF) & ~anatomy.brain
    assert outside.sum() > 1000
    assert (person.share[outside] == 1).all() and (person.fluid[outside] == 0).all()


# under which names


def test_maps_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for place in ("sub-01/mri/aseg", "sub-02/mri/aseg", "sub-03/mri/aseg", "other"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{place}.nii.gz").write_bytes(b"")
    found, train, test = choose_anatomies(str(tmp_path) + "/", None, None)
    names = ["other", *(f"sub-0{n}/mri/aseg.nii.gz" for n in (1, 2, 3))]
    assert sorted(found) == names and len(set(found.values())) == 4
    assert not set(train) & set(test)
    assert choose_anatomies(str(tmp_path), None, None)[0].keys() == found.keys()


def test_a_cohort_beside_its_maps_is_no_map(tmp_path: Path) -> None:
    write_map(tmp_path / "one.nii.gz")
    out = tmp_path / "bids"
    assert make_cohort(str(out), anatomy=str(tmp_path), **ONE).written == 2
    assert make_cohort(str(out), anatomy=str(tmp_path), **ONE).written == 0


# before anything is written


def test_a_bad_map_or_a_head_of_the_template_claims_nothing(tmp_path: Path) -> None:
    out, maps = tmp_path / "bids", tmp_path / "maps"
    write_map(maps / "a.nii.gz")
    write_map(maps / "b.nii.gz", change=renumbered({3: 1, 42: 1}))
    for values in (
        {"head": True},
        {"anatomy": str(maps / "c.nii.gz")},
        {"anatomy": str(maps)},
    ):
        with pytest.raises(InputError):
            make_cohort(str(out), **{**ONE, "sites": 2}, **values)
        assert not out.exists()
    (maps / "b.nii.gz").unlink()
    assert make_cohort(str(out), anatomy=str(maps), **{**ONE, "sites": 2}).written == 2


def test_after_an_error_what_waits_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def one(out: str, request: object, member: make.Member, *_: object) -> int:
        begun.append(member.label)
        if len(begun) == 1:
            raise InputError("broken.")
        time.sleep(0.1)
        return 1

    monkeypatch.setattr(make, "make_subject", one)
    monkeypatch.setattr(make, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    with pytest.raises(InputError, match="broken"):
        make_cohort(str(tmp_path / "bids"), **{**ONE, "subjects": 30}, workers=2)
    assert len(begun) < 15


def test_other_maps_of_the_same_names_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "bids"
    write_map(tmp_path / "a" / "one.nii.gz")
    write_map(tmp_path / "b" / "one.nii.gz", size=(60.0, 85.0, 70.0))
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    make_cohort(str(out), anatomy=str(tmp_path / "a"), **ONE)
    next(out.glob("sub-002/ses-*/anat/*_T1w.json")).unlink()
    with pytest.raises(ConfigError, match="same names"):
        make_cohort(str(out), anatomy=str(tmp_path / "b"), **ONE)
    assert make_cohort(str(out), anatomy=str(tmp_path / "copy"), **ONE).written == 1


def test_a_cohort_without_digests_goes_on(tmp_path: Path) -> None:
    out, maps = tmp_path / "bids", write_map(tmp_path / "one.nii.gz")
    make_cohort(str(out), anatomy=maps, **ONE)
    about = out / "derivatives" / "truth" / "cohort.json"
    request = json.loads(about.read_text())
    assert set(request.pop("maps")) == {"one"}
    about.write_text(json.dumps(request, indent=2, ensure_ascii=False) + "\n")
    before = about.read_bytes()
    assert make_cohort(str(out), anatomy=maps, **ONE).written == 0
    assert about.read_bytes() == before
    with pytest.raises(ConfigError, match="seed"):
        make_cohort(str(out), anatomy=maps, seed=1, **ONE)
