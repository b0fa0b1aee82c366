"""Alignment: the same brain lands on the same voxels, whatever scanner showed it."""

import itertools

import numpy as np
import pytest

from pipelines.cohort import list_anatomies, load_anatomy, random_sites, random_subject, render_scan
from pipelines.truth import displacement
from sgcd_core.config import PrepareConfig
from sgcd_core.errors import InputError
from sgcd_core.io.nifti import decode_nifti, encode_nifti
from sgcd_core.volume.prepare import prepare_scan
from sgcd_core.volume.register import (
    align_rigid,
    cut_faces,
    like_t1w,
    register_rigid,
    rotation_degrees,
)
from sgcd_core.volume.resample import bounding_box, resample_masked, shifted, voxel_ml
from sgcd_core.volume.template import template

MM = 2.4


@pytest.fixture(scope="module")
def subject():
    return random_subject(load_anatomy(list_anatomies(None)[0], mm=2.0), np.random.default_rng(5))


def placed(subject, sequence, sites=4):
    """World → template of one brain's scans by scanners that differ in all but where it lies."""
    for number, scanner in enumerate(random_sites(3, sites - 1, 1)):
        data, affine = render_scan(subject, scanner, sequence, MM, np.random.default_rng(number))
        scan = decode_nifti(encode_nifti(data, affine), where="memory", max_inflated=10**9)
        prepared = prepare_scan(scan, PrepareConfig(), sequence=sequence)
        yield np.array(prepared.geometry.world_to_template)


@pytest.mark.parametrize(("sequence", "most"), [("T1w", 1.0), ("T2w", 1.2)])
def test_scanners_put_one_brain_in_one_place(subject, sequence, most):
    _, mask, grid = template(4.0)
    found = list(placed(subject, sequence))
    apart = [
        displacement(a @ np.linalg.inv(b), grid, mask) for a, b in itertools.combinations(found, 2)
    ]
    assert np.mean(apart) < most


@pytest.mark.parametrize(
    "face", [(2, 1), (1, 1), (1, 0)], ids=["top 40 mm", "front 40 mm", "back 40 mm"]
)
def test_a_field_of_view_that_cuts_the_brain_leaves_it_in_its_place(subject, face):
    scanner = random_sites(3, 1, 0)[0]
    data, affine = render_scan(subject, scanner, "T1w", MM, np.random.default_rng(0))
    left = list(bounding_box(data > 0, margin=2))
    axis, end = face
    start, stop, gone = left[axis].start, left[axis].stop, 2 + round(40 / MM)
    left[axis] = slice(start, stop - gone) if end else slice(start + gone, stop)
    seen, there = data[tuple(left)], shifted(affine, tuple(left))
    assert cut_faces(data > 0, affine) == () and cut_faces(seen > 0, there) == (face,)
    whole, cut = register_rigid(data, data > 0, affine), register_rigid(seen, seen > 0, there)
    _, mask, grid = template(4.0)
    assert displacement(cut @ np.linalg.inv(whole), grid, mask) < 2.5


def test_a_small_brain_is_judged_by_where_it_lies(subject):
    scanner = random_sites(3, 1, 0)[0]
    data, affine = render_scan(subject, scanner, "T1w", MM, np.random.default_rng(0))
    share = 700.0 / ((data > 0).sum() * voxel_ml(affine))
    small = affine @ np.diag([np.cbrt(share)] * 3 + [1.0])
    assert rotation_degrees(register_rigid(data, data > 0, small)) < 30


def test_what_has_not_the_shape_of_a_brain_is_refused():
    rod = np.zeros((30, 30, 70), bool)
    rod[5:25, 5:25, 5:65] = True  # 650 ml, 240 mm long
    image = rod * np.random.default_rng(0).random(rod.shape).astype(np.float32)
    with pytest.raises(InputError, match="overlaps") as caught:
        register_rigid(image, rod, np.diag([3.0, 3.0, 4.0, 1.0]))
    assert caught.value.code == "SCAN-REGISTRATION"


@pytest.mark.parametrize("half", ["hemisphere", "upper half"])
def test_half_a_brain_is_refused_for_its_shape(subject, half):
    """As an extraction that failed leaves it; what a field of view cuts meets a face instead."""
    scanner = random_sites(3, 1, 0)[0]
    data, affine = render_scan(subject, scanner, "T1w", MM, np.random.default_rng(0))
    data = np.pad(data, 4)
    affine = affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.full(3, 4.0)
    axis = 0 if half == "hemisphere" else 2
    index = np.arange(data.shape[axis])
    middle = (data > 0).sum(axis=tuple({0, 1, 2} - {axis})) @ index / (data > 0).sum()
    keep = np.expand_dims(index > middle, tuple({0, 1, 2} - {axis}))
    data = np.where(keep, data, 0)
    with pytest.raises(InputError, match="overlaps") as caught:
        register_rigid(data, data > 0, affine)
    assert caught.value.code == "SCAN-REGISTRATION"


TURNS = {
    "half about x": np.diag([1.0, -1, -1, 1]),
    "quarter about z": np.array([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNS)
def test_a_header_with_the_axes_wrong_is_refused(subject, name):
    scanner = random_sites(3, 1, 0)[0]
    data, affine = render_scan(subject, scanner, "T1w", MM, np.random.default_rng(0))
    mask = data > 0
    plain = register_rigid(data, mask, affine)
    assert rotation_degrees(plain) < 30
    with pytest.raises(InputError) as caught:
        register_rigid(data, mask, TURNS[name] @ affine)
    assert caught.value.code == "SCAN-REGISTRATION" and "right angles" in str(caught.value)


@pytest.mark.parametrize(("sequence", "label"), [("T1w", "T2w"), ("T2w", "T1w")])
def test_a_scan_labelled_as_the_other_sequence_is_refused(subject, sequence, label):
    scanner = random_sites(3, 1, 0)[0]
    data, affine = render_scan(subject, scanner, sequence, MM, np.random.default_rng(0))
    with pytest.raises(InputError, match=f"labelled {label}.* that of a {sequence}") as caught:
        register_rigid(data, data > 0, affine, sequence=label)
    assert caught.value.code == "SCAN-SEQUENCE"


def test_one_scan_is_laid_on_another_of_the_same_brain():
    image, mask, grid = template(3.0)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.03), -np.sin(0.03)], [np.sin(0.03), np.cos(0.03)]]
    turn[:3, 3] = 1.0, -0.7, 0.5
    moved, inside = resample_masked(image, mask, turn @ grid, grid, image.shape)
    other = np.where(inside, moved**0.6, 0).astype(np.float32)
    found = align_rigid(other, inside, image, mask, grid, "T1w")
    assert displacement(turn, grid, mask) > 1.5
    assert displacement(found @ turn, grid, mask) < 0.15


def test_a_t2w_scan_is_shown_with_dark_fluid_and_bright_white_matter():
    image, mask, _ = template(4.0)
    shown = like_t1w((1.1 - image) * mask, mask, "T2w")
    assert np.corrcoef(shown[mask], image[mask])[0, 1] > 0.97
    assert not shown[~mask].any()
    other = like_t1w(image, mask, "FLAIR")
    np.testing.assert_array_equal(other, image)
