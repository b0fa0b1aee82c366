"""Each baseline brings a scan of another contrast nearer to the target, and only sees training."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.baselines import BASELINES, make_baseline
from sgcd_core.errors import UsageError
from sgcd_core.metrics import wasserstein

SHAPE = (20, 22, 20)


def brain(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three tissues with noise, [0, 1], in a ball."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    mask = radius < 0.9
    image = np.select([radius < 0.55, radius < 0.8], [0.8, 0.5], 0.15)
    image = image + rng.normal(0, 0.03, SHAPE)
    return np.where(mask, np.clip(image, 0, 1), 0).astype(np.float32), mask


def other_scanner(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask, 0.1 + 0.7 * image**1.8, 0).astype(np.float32)


@pytest.mark.parametrize("name", [name for name in BASELINES if name not in ("raw", "minmax")])
def test_a_scan_of_another_scanner_comes_nearer(name):
    fitted = make_baseline(name, "T1w").fit([brain(seed) for seed in range(3)])
    truth, mask = brain(9)
    raw = other_scanner(truth, mask)
    out = fitted.apply(raw, mask)
    assert wasserstein(out, truth, mask) < 0.75 * wasserstein(raw, truth, mask)


@pytest.mark.parametrize("name", BASELINES)
def test_outputs_are_comparable_and_zero_outside(name):
    fitted = make_baseline(name, "T2w").fit([brain(seed) for seed in range(2)])
    image, mask = brain(5)
    before = image.copy()
    out = fitted.apply(image, mask)
    assert out.dtype == np.float32
    assert out.shape == image.shape
    assert (out[~mask] == 0).all()
    assert out.min() >= 0
    assert out.max() <= 1
    assert (image == before).all()


@pytest.mark.parametrize("name", BASELINES)
def test_a_scan_that_has_the_target_look_stays_nearly_as_it_is(name):
    fitted = make_baseline(name, "T1w").fit([brain(seed) for seed in range(3)])
    image, mask = brain(4)
    # The stripe's deviation is a statistic of a tenth of the voxels: noisier than the others.
    allowed = 0.06 if name == "whitestripe" else 0.02
    assert np.abs(fitted.apply(image, mask) - image)[mask].mean() < allowed


def test_raw_changes_nothing():
    image, mask = brain(1)
    assert (make_baseline("raw", "T1w").fit([]).apply(image, mask) == image).all()


def test_nyul_hits_the_standard_landmarks_of_the_training_scans():
    training = [brain(seed) for seed in range(3)]
    fitted = make_baseline("nyul", "T1w").fit(training)
    truth, mask = brain(9)
    out = fitted.apply(other_scanner(truth, mask), mask)
    steps = np.arange(10, 100, 10)
    standard = np.mean([np.percentile(i[m], steps) for i, m in training], axis=0)
    assert np.abs(np.percentile(out[mask], steps) - standard).max() < 0.01


@pytest.mark.parametrize("share", [0.12, 0.5, 0.995])
@pytest.mark.parametrize("end", ["lowest", "highest"])
def test_nyul_makes_numbers_of_a_scan_with_many_voxels_of_one_intensity(share, end):
    fitted = make_baseline("nyul", "T1w").fit([brain(seed) for seed in range(3)])
    image, mask = brain(9)
    image = other_scanner(image, mask)
    values = image[mask]
    if end == "lowest":
        values[values <= np.quantile(values, share)] = 0
    else:
        values[values >= np.quantile(values, 1 - share)] = 1
    image[mask] = values
    out = fitted.apply(image, mask)
    assert np.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
    order = np.argsort(values, kind="stable")
    assert (np.diff(out[mask][order]) >= 0).all()


def test_nyul_of_usual_scans_is_the_library_s_to_the_bit():
    from intensity_normalization.adapters.images import NumpyImageAdapter as Adapter

    fitted = make_baseline("nyul", "T1w").fit([brain(seed) for seed in range(3)])
    for seed in range(4, 8):
        image, mask = brain(seed)
        image = other_scanner(image, mask)
        theirs = fitted._normalizer.transform(
            Adapter(image.astype(np.float64)), Adapter(mask.astype(np.float64))
        ).get_data()
        wanted = np.where(mask, np.clip(theirs, 0, 1), 0).astype(np.float32)
        np.testing.assert_array_equal(fitted.apply(image, mask), wanted)


def test_an_unknown_method_is_named():
    with pytest.raises(UsageError, match="no method 'magic'; there are raw, nyul"):
        make_baseline("magic", "T1w")
