"""Left is left: pictures come out alike however the voxels are stored."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from PIL import Image

from pipelines.report.pictures import CHANGE_LIMIT, Cut, draw, grey, magnitude, signed

Array = np.ndarray[Any, Any]
RAS = np.array([[2.0, 0, 0, -60], [0, 2, 0, -70], [0, 0, 2, -50], [0, 0, 0, 1]])
#: A bright ball at the right, front and top of a grey brain, mm.
BALL = np.array([34.0, 30.0, 26.0])


def phantom(affine: Array, shape: tuple[int, int, int]) -> tuple[Array, Array]:
    """Brain and mask in any placement, from world coordinates alone."""
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    world = voxels @ affine[:3, :3].T + affine[:3, 3]
    mask = (np.abs(world / [50, 60, 42]) ** 2).sum(-1) < 1
    ball = np.linalg.norm(world - BALL, axis=-1) < 14
    return np.where(mask, np.where(ball, 1.0, 0.3), 0).astype(np.float32), mask


def stored(codes: str) -> tuple[Array, tuple[int, int, int]]:
    """Affine and shape of the same field of view with axes in the directions of `codes`."""
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    shape = (60, 70, 50)
    turned = apply_orientation(np.zeros(shape), turn).shape
    return RAS @ inv_ornt_aff(turn, shape), turned


def pictures(affine: Array, shape: tuple[int, int, int]) -> dict[str, Array]:
    volume, mask = phantom(affine, shape)
    cut = Cut.through(mask, affine)
    # cut through the ball, not the middle
    at = np.linalg.inv(to_ras_affine(mask, affine)) @ np.append(BALL, 1)
    cut = Cut(cut.affine, (round(at[0]), round(at[1]), round(at[2])), cut.box, cut.sides)
    found = draw(cut, volume)
    return {name: pixels(uri) for name, uri in found.items()}


def to_ras_affine(mask: Array, affine: Array) -> Array:
    from sgcd_core.io.nifti import to_ras

    return to_ras(mask, affine)[1]


def pixels(uri: str) -> Array:
    head, _, body = uri.partition(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))).convert("L"), float) / 255


def bright_at(picture: Array) -> tuple[float, float]:
    """Where the ball is: shares of the width from the left and of the height from the top."""
    rows, columns = np.nonzero(picture > 0.7)
    return columns.mean() / picture.shape[1], rows.mean() / picture.shape[0]


CODES = ("RAS", "LAS", "LPS", "PIR", "ASL", "SRP", "IPL")


@pytest.mark.parametrize("codes", CODES)
def test_the_persons_right_is_at_the_right_of_the_picture(codes: str) -> None:
    found = pictures(*stored(codes))
    across, down = bright_at(found["axial"])
    assert across > 0.7 and down < 0.4  # right, front
    across, down = bright_at(found["coronal"])
    assert across > 0.7 and down < 0.4  # right, top
    across, down = bright_at(found["sagittal"])
    assert across > 0.6 and down < 0.4  # front, top


def test_a_stored_order_changes_no_pixel() -> None:
    first = pictures(*stored("RAS"))
    for codes in CODES[1:]:
        for name, picture in pictures(*stored(codes)).items():
            assert np.abs(picture - first[name]).max() < 0.02, (codes, name)


def test_an_oblique_scan_keeps_its_sides() -> None:
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    found = pictures(turn @ RAS, (60, 70, 50))
    assert bright_at(found["coronal"])[0] > 0.6
    assert bright_at(found["axial"])[0] > 0.6


def test_thick_slices_are_not_squeezed() -> None:
    thick = RAS @ np.diag([1, 1, 2.5, 1])
    volume, mask = phantom(thick, (60, 70, 20))
    cut = Cut.through(mask, thick)
    width, height = cut.size("coronal")
    assert width / height == pytest.approx(100 / 84, rel=0.12)  # the brain, 100 mm by 84 mm
    assert pixels(draw(cut, volume)["coronal"]).shape == (height, width)


def test_colours_say_what_they_should() -> None:
    values = np.array([[-CHANGE_LIMIT, 0.0, CHANGE_LIMIT]], np.float32)
    below, zero, above = signed(values)[0].astype(int)
    assert below[2] > below[0] + 40 and above[0] > above[2] + 40  # blue, red
    assert zero.max() < 40
    assert magnitude(np.array([[0.0]], np.float32)).max() < 20


def test_what_is_brighter_than_white_matter_stays_brighter() -> None:
    intensities = np.array([[-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 9.0]], np.float32)
    found = grey(intensities)[0].astype(int)
    assert found[0] == found[1] == 0 and found[-1] == found[-2] == 255
    assert found[2] * 2 == pytest.approx(found[3], abs=1)  # linear up to 1
    assert (np.diff(found[1:6]) >= 15).all()


def test_an_empty_mask_is_still_drawn() -> None:
    volume = np.zeros((8, 9, 10), np.float32)
    assert len(draw(Cut.through(volume > 1, np.eye(4)), volume)) == 3
