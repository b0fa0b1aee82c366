"""The benchmark of real scans: people are told apart, lesions found and lost, pages drawn."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image as Picture
from scipy.ndimage import binary_dilation, gaussian_filter

FILE = Path(__file__).parents[2] / "benchmarks" / "real_scans.py"
SHAPE = (40, 48, 40)
#: x = 0 in the middle of the first axis.
GRID = np.array([[4.0, 0, 0, -78.0], [0, 4.0, 0, -94.0], [0, 0, 4.0, -78.0], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def real() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_scans", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["real_scans"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def head(seed: int, *, white_is_dark: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """White inside grey, alike on both sides but for a little texture, [0.1, 0.9]."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes))
    folds = gaussian_filter(rng.normal(size=SHAPE), 2.0)
    folds = (folds + folds[::-1]) / folds.std()
    image = np.where(radius + 0.05 * folds < 0.7, 0.75, 0.45)
    image = image + 0.02 * folds + 0.01 * rng.normal(size=SHAPE)
    mask = radius < 0.95
    image = 1.1 - image if white_is_dark else image
    return np.where(mask, np.clip(image, 0.1, 0.95), 0).astype(np.float32), mask


def with_lesion(image: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """A ball of 20 mm radius on one side."""
    where = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
    ball = ((where - np.array([12, 26, 22])[:, None, None, None]) ** 2).sum(0) < 25
    return np.where(ball, level, image).astype(np.float32), ball


def pairs(real: ModuleType, change, sites=("T", "A", "A")):
    out = []
    for number, site in enumerate(sites):
        image, mask = head(number)
        after = np.where(mask, change(image, number), 0).astype(np.float32)
        out.append(real.Pair(f"p{number}", site, "T1w", image, after, mask, GRID))
    return out


def test_outputs_of_the_right_person_are_counted(real: ModuleType) -> None:
    found = real.identity(pairs(real, lambda image, number: image**1.5))
    assert all(own > other for _, own, other in found)
    assert "3 of 3 outputs correlate most" in real.identity_text("T1w", found)
    swapped = real.identity(pairs(real, lambda image, number: head(0)[0]))
    text = real.identity_text("T1w", swapped)
    assert "1 of 3" in text and "not p1, p2" in text
    alone = real.identity(pairs(real, lambda image, number: image, sites=("T",)))
    assert "nobody" in real.identity_text("T1w", alone)


@pytest.mark.parametrize(("dark", "level"), [(True, 0.12), (False, 0.88)])
def test_a_lesion_of_one_side_is_found_whatever_the_contrast(
    real: ModuleType, dark: bool, level: float
) -> None:
    plain, mask = head(5, white_is_dark=not dark)
    image, ball = with_lesion(plain, level)

    def lesion(scan: np.ndarray) -> np.ndarray:
        regions = real.unlike_regions(real.ranks(scan, mask), mask, GRID, dark=dark)
        return real.most(regions, regions > 0)

    first = lesion(image)
    assert real.dice(first, ball) > 0.8
    # A rising map of all intensities changes no rank.
    curved = np.where(mask, 0.2 + 0.5 * image**3, 0).astype(np.float32)
    np.testing.assert_array_equal(lesion(curved), first)
    np.testing.assert_array_equal(real.mirror(first[::-1].astype(np.float32), GRID) > 0.5, first)
    assert not (lesion(plain) & ball).sum() > 0.2 * ball.sum()


def test_a_lesion_that_shrinks_or_goes_is_in_the_row(real: ModuleType) -> None:
    plain, mask = head(5)
    image, ball = with_lesion(plain, 0.12)
    kept = real.Pair("kept", "A", "T1w", image, image**2, mask, GRID)
    gone = real.Pair("gone", "A", "T1w", image, plain, mask, GRID)
    rows, drawn = real.lesion_rows([kept, gone])
    subject, sequence, before, after, ratio, overlap, elsewhere, *_ = rows[0]
    assert (subject, sequence) == ("kept", "T1w")
    assert before == after == pytest.approx(ball.sum() * 0.064, rel=0.4)
    assert (ratio, overlap, elsewhere) == (1.0, 1.0, "no")
    assert rows[1][5] < 0.2
    assert len(drawn) == 2


def test_a_lesion_is_found_again_beside_a_larger_one(real: ModuleType) -> None:
    plain, mask = head(5)
    image, ball = with_lesion(plain, 0.12)
    both = np.where(binary_dilation(np.roll(ball, 12, axis=1), iterations=2), 0.12, image)
    both = np.where(mask, both, 0).astype(np.float32)
    ((*_, ratio, overlap, elsewhere, was, now),), _ = real.lesion_rows(
        [real.Pair("x", "A", "T1w", image, both, mask, GRID)]
    )
    assert overlap > 0.8 and ratio == pytest.approx(1, abs=0.3)
    assert elsewhere == pytest.approx(0.064 * (both != image).sum(), rel=0.5)
    here, there = (float(x) for x in now.split(" : "))
    assert here < 0.3 < 0.6 < there  # dark now, as its mirror image is not
    assert abs(np.subtract(*(float(x) for x in was.split(" : ")))) < 0.2


def test_an_output_that_is_moved_mirrored_or_damaged_is_told(real: ModuleType) -> None:
    image, _ = with_lesion(head(5)[0], 0.88)
    skewed = np.array([[0, -3.0, 0, 50], [-2.9, 0, 0.1, 40], [0.1, 0, 4, -60], [0, 0, 0, 1]])
    scan = real.Nifti(image, skewed)
    good = real.Nifti((image**2)[..., None], skewed)  # a fourth axis of one is nothing
    same, finite, own, mirrored = real.compare_files(scan, good)
    assert (same, finite) == (True, True) and own > 0.9 > mirrored + 0.02
    flipped = real.compare_files(scan, real.Nifti(image[:, ::-1] ** 2, skewed))
    assert flipped[2:] == pytest.approx((mirrored, own), abs=0.02)
    moved = skewed + np.array([[0, 0, 0, 1e-3], *np.zeros((3, 4))])
    assert not real.compare_files(scan, real.Nifti(image, moved))[0]
    coded = real.Nifti(image, skewed)
    coded.set_qform(skewed, code=1)
    assert not real.compare_files(scan, coded)[0]
    assert real.compare_files(scan, real.Nifti(image[1:], skewed))[:2] == (False, False)
    holed = image.copy()
    holed[20, 20, 20] = np.nan
    bad = real.compare_files(scan, real.Nifti(holed, skewed))
    assert bad[:2] == (True, False)
    text = real.geometry_text([(same, finite, own, mirrored), (False, True, 0.5, 0.1)])
    assert text.startswith("1 of 2") and "2 only finite" in text and "0.500 to" in text


def test_histograms_of_sites_are_means_and_the_goal_is_the_targets_own(real: ModuleType) -> None:
    made = pairs(real, lambda image, number: image**2)
    sites, goal = real.site_histograms(made, "T")
    assert set(sites) == {"A", "T"}
    np.testing.assert_array_equal(goal, sites["T"][0])
    each = [real.masked_histogram(p.after, p.mask) for p in made[1:]]
    np.testing.assert_allclose(sites["A"][1], np.mean(each, axis=0))
    assert real.site_histograms(made, None)[1] is None


def test_sheet_and_outlines_have_a_row_for_every_scan(real: ModuleType) -> None:
    made = pairs(real, lambda image, number: image**2)
    rows = [(p.subject, p.before, p.after) for p in made]
    one, three = (Picture.open(io.BytesIO(real.figures.contact_sheet(rows[:n]))) for n in (1, 3))
    assert three.width == one.width and three.height > 2 * one.height
    # The difference is drawn: an unchanged scan leaves its third column without colour.
    same = Picture.open(io.BytesIO(real.figures.contact_sheet([("x", rows[0][1], rows[0][1])])))
    spread = [np.ptp(np.asarray(p.convert("RGB")).astype(int), axis=2).max() for p in (one, same)]
    assert spread[0] > spread[1] + 50
    image, ball = with_lesion(rows[0][1], 0.9)
    drawn = real.figures.outlines([("x", image, ball, image, np.zeros_like(ball))])
    pixels = np.asarray(Picture.open(io.BytesIO(drawn)).convert("RGB")).astype(int)
    coloured = np.ptp(pixels, axis=2) > 100
    half = pixels.shape[1] // 2
    assert coloured[:, :half].any() and not coloured[:, half:].any()
