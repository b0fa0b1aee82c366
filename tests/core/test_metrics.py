"""Laws of the measures, and examples worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sgcd_core.metrics import (
    MEASURES,
    ap,
    bootstrap_interval,
    dice,
    histogram_distance,
    intensity_quantiles,
    masked_histogram,
    measure_all,
    pcc,
    psnr,
    ssim,
    wasserstein,
)

SHAPE = (14, 13, 15)


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    a = rng.random(SHAPE, dtype=np.float32)
    b = np.clip(a + rng.normal(0, 0.1, SHAPE), 0, 1).astype(np.float32)
    mask = np.zeros(SHAPE, bool)
    mask[2:11, 1:12, 3:13] = True
    return a, b, mask


def test_equal_images_are_perfect(pair):
    a, _, mask = pair
    got = measure_all(a, a.copy(), mask)
    assert got["ssim"] == pytest.approx(1)
    assert got["psnr"] == math.inf
    assert got["pcc"] == pytest.approx(1)
    assert got["wasserstein"] == 0


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_the_order_of_the_images_does_not_matter(pair, name):
    a, b, mask = pair
    assert measure_all(a, b, mask)[name] == pytest.approx(measure_all(b, a, mask)[name], rel=1e-9)


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_what_lies_outside_the_mask_does_not_matter(pair, name):
    a, b, mask = pair
    noisy = np.where(mask, a, np.random.default_rng(2).random(SHAPE)).astype(np.float32)
    assert measure_all(noisy, b, mask)[name] == measure_all(a, b, mask)[name]


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_a_nearer_image_scores_better(pair, name):
    a, b, mask = pair
    far = np.clip(a + 2.5 * (b - a) + 0.1, 0, 1).astype(np.float32)
    near, worse = measure_all(a, b, mask)[name], measure_all(a, far, mask)[name]
    assert (near > worse) is MEASURES[name].higher_is_better


def test_worked_examples():
    a = np.array([[[0.0, 0.2, 0.9, 5.0]]], np.float32)
    b = np.array([[[0.2, 0.0, 0.5, -7.0]]], np.float32)
    mask = np.array([[[True, True, True, False]]])
    # differences .2, .2, .4: mean square .08, so 10.97 dB
    assert psnr(a, b, mask) == pytest.approx(-10 * math.log10(0.08), abs=1e-4)
    # sorted 0 .2 .9 against 0 .2 .5: mean of 0, 0, .4
    assert wasserstein(a, b, mask) == pytest.approx(0.4 / 3, abs=1e-6)
    u, v = np.array([0, 0.2, 0.9]), np.array([0.2, 0, 0.5])
    assert pcc(a, b, mask) == pytest.approx(np.corrcoef(u, v)[0, 1], abs=1e-6)


def test_a_shift_costs_its_size_in_wasserstein_and_nothing_in_correlation(pair):
    a, _, mask = pair
    shifted = (a * 0.5 + 0.25).astype(np.float32)
    assert pcc(a, shifted, mask) == pytest.approx(1, abs=1e-6)
    assert wasserstein(a, a + np.float32(0.125), mask) == pytest.approx(0.125, abs=1e-6)
    assert ssim(a, shifted, mask) < 0.95


def test_wasserstein_agrees_with_scipy_and_with_quantiles_and_histograms(pair):
    from scipy.stats import wasserstein_distance

    a, b, mask = pair
    b = b**2
    exact = wasserstein_distance(a[mask], b[mask])
    assert wasserstein(a, b, mask) == pytest.approx(exact, abs=1e-6)
    u, v = intensity_quantiles(a, mask), intensity_quantiles(b, mask)
    assert np.abs(u - v).mean() == pytest.approx(exact, abs=2e-3)
    p, q = masked_histogram(a, mask, 256), masked_histogram(b, mask, 256)
    assert p.sum() == pytest.approx(1)
    assert histogram_distance(p, q) == pytest.approx(exact, abs=4e-3)


def test_a_constant_image_has_no_correlation(pair):
    a, _, mask = pair
    assert math.isnan(pcc(a, np.full(SHAPE, 0.5, np.float32), mask))


def test_an_empty_mask_and_unlike_shapes_are_refused(pair):
    a, b, mask = pair
    for measure in (ssim, psnr, pcc, wasserstein):
        with pytest.raises(ValueError, match="empty"):
            measure(a, b, np.zeros_like(mask))
        with pytest.raises(ValueError, match="shapes differ"):
            measure(a, b[1:], mask)


def test_dice_and_anatomical_preservation():
    a = np.array([True, True, True, False])
    b = np.array([False, True, True, False])
    assert dice(a, b) == pytest.approx(4 / 5)
    assert dice(a, ~a) == 0
    assert dice(a, a) == dice(a & False, a & False) == 1
    assert ap(95.0, 100.0) == pytest.approx(0.95)
    assert ap(105.0, 100.0) == pytest.approx(0.95)
    with pytest.raises(ValueError, match="positive"):
        ap(1.0, 0.0)


def test_the_interval_counts_people_not_scans():
    values = [0.0, 1.0]
    low, high = bootstrap_interval(values, ["a", "b"])
    assert (low, high) == (0.0, 1.0)
    # a thousand scans of the same two people tell no more about other people
    many = bootstrap_interval(values * 500, ["a", "b"] * 500)
    assert many == (low, high)
    wide = bootstrap_interval(list(np.linspace(0, 1, 40)), range(40))
    assert 0.3 < wide[0] < 0.5 < wide[1] < 0.7
    assert bootstrap_interval(values, ["a", "b"], seed=3) == bootstrap_interval(
        values, ["a", "b"], seed=3
    )


def test_the_interval_of_one_or_no_subject():
    assert bootstrap_interval([1.0, 2.0], ["a", "a"]) == (1.5, 1.5)
    assert all(math.isnan(end) for end in bootstrap_interval([math.inf], ["a"]))
