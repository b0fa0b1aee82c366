"""The anatomy guard: quiet when only the look changes, loud when the anatomy does."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from sgcd_core.config import GuardConfig
from sgcd_core.volume.guard import flags, guard_scores, tissue_drift


@pytest.fixture(scope="module")
def brain() -> tuple[np.ndarray, np.ndarray]:
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (40, 48, 40)], indexing="ij"))
    mask = (grid**2).sum(axis=0) < 0.8
    rng = np.random.default_rng(0)
    folds = ndimage.gaussian_filter(rng.standard_normal(mask.shape), 2)
    folds /= folds[mask].std()
    tissue = 0.2 + 0.3 * (folds > -0.5) + 0.35 * (folds > 0.4) + rng.normal(0, 0.02, mask.shape)
    return np.where(mask, tissue, 0).astype(np.float32), mask


def test_an_affine_change_of_intensity_leaves_both_scores_perfect(brain: tuple) -> None:
    image, mask = brain
    scores = guard_scores(image, np.where(mask, 0.5 * image + 0.3, 0), mask, 4.0)
    assert scores["gradient_correlation"] == pytest.approx(1.0, abs=1e-5)
    assert scores["volume_drift"] < 0.01
    assert flags(scores, GuardConfig()) == []


def test_a_mild_contrast_change_is_not_flagged(brain: tuple) -> None:
    image, mask = brain
    scores = guard_scores(image, np.where(mask, np.clip(image, 0, 1) ** 0.8, 0), mask, 4.0)
    assert flags(scores, GuardConfig()) == []


@pytest.mark.parametrize("power", [0.3, 0.6, 2.0, 3.0])
def test_no_tissue_drifts_by_a_change_of_contrast(brain: tuple, power: float) -> None:
    """Borders of k-means move with the curve: by 0.58 of a class, with a power of 3."""
    image, mask = brain
    rng = np.random.default_rng(1)
    before = np.clip(ndimage.gaussian_filter(image, 0.7), 1e-3, 1)[mask]
    after = before**power + rng.normal(0, 0.01, before.shape)
    assert tissue_drift(before, after) < 0.04


def test_tissue_in_the_place_of_another_drifts_whatever_the_contrast(brain: tuple) -> None:
    image, mask = brain
    bright = (image > 0.68) & mask
    rim = bright & ~ndimage.binary_erosion(bright)
    half = rim & (np.arange(image.shape[0]) < image.shape[0] // 2)[:, None, None]
    after = np.where(half, 0.5, image)
    gone = half.sum() / bright.sum()
    assert gone > 0.25
    for power in (0.5, 1.0, 2.0):
        drift = tissue_drift(image[mask], np.clip(after, 0, 1)[mask] ** power)
        assert drift == pytest.approx(gone, rel=0.3)


def test_the_drift_of_one_value_is_not_known() -> None:
    assert np.isnan(tissue_drift(np.ones(50), np.ones(50)))


@pytest.mark.parametrize("part", [0.1, 1.0])
def test_an_output_that_is_not_finite_is_flagged(brain: tuple, part: float) -> None:
    image, mask = brain
    after = np.where(np.random.default_rng(0).random(image.shape) < part, np.nan, image)
    codes = [code for code, _ in flags(guard_scores(image, after, mask, 4.0), GuardConfig())]
    assert codes == ["FLAG-ANATOMY", "FLAG-VOLUMES"]


def test_another_anatomy_is_flagged(brain: tuple) -> None:
    image, mask = brain
    scores = guard_scores(image, np.where(mask, image[::-1], 0), mask, 4.0)
    assert scores["gradient_correlation"] < 0.3
    assert [code for code, _ in flags(scores, GuardConfig())] == ["FLAG-ANATOMY", "FLAG-VOLUMES"]


def test_a_shrunken_tissue_is_flagged(brain: tuple) -> None:
    image, mask = brain
    bright = (image > 0.68) & mask
    thinner = ndimage.binary_erosion(bright)
    after = np.where(bright & ~thinner, 0.5, image).astype(np.float32)
    codes = [code for code, _ in flags(guard_scores(image, after, mask, 4.0), GuardConfig())]
    assert "FLAG-VOLUMES" in codes


def test_the_scores_do_not_change_from_run_to_run(brain: tuple) -> None:
    image, mask = brain
    after = np.sqrt(np.clip(image, 0, 1))
    assert guard_scores(image, after, mask, 4.0) == guard_scores(image, after, mask, 4.0)


def test_a_score_that_cannot_be_computed_is_flagged_and_an_absent_one_is_not() -> None:
    nan = float("nan")
    codes = [c for c, _ in flags({"gradient_correlation": nan, "volume_drift": nan}, GuardConfig())]
    assert codes == ["FLAG-ANATOMY", "FLAG-VOLUMES"]
    assert flags({}, GuardConfig()) == []


def test_a_scan_unlike_the_training_sites_is_flagged() -> None:
    assert [c for c, _ in flags({"outlier_score": 9.0}, GuardConfig())] == ["FLAG-UNLIKE-TRAINING"]


def test_damage_that_the_mean_hides_is_flagged(brain: tuple) -> None:
    image, mask = brain
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in image.shape], indexing="ij"))
    ball = ((grid - np.array([18, 20, 22])[:, None, None, None]) ** 2).sum(0) < 4.9**2  # 31 ml
    for wrong in (np.where(ball, 0, image), np.where(ball, image[mask].mean(), image)):
        scores = guard_scores(image, wrong, mask, 4.0)
        assert scores["gradient_correlation"] > 0.75 and scores["local_correlation"] < 0.45
        assert "FLAG-ANATOMY" in [code for code, _ in flags(scores, GuardConfig())]


def test_what_is_left_of_noise_where_no_edges_are_is_no_anatomy(brain: tuple) -> None:
    """As in large ventricles, which a change of resolution evens out."""
    image, mask = brain
    rng = np.random.default_rng(0)
    calm = np.zeros(image.shape, bool)
    calm[13:26, 14:30, 14:27] = True
    before, after = (np.where(calm, 0.2 + rng.normal(0, 0.004, image.shape), image) for _ in "ab")
    kept = guard_scores(before, after, mask, 4.0)
    assert kept["local_correlation"] > 0.8 and not flags(kept, GuardConfig())
    drawn = after.copy()
    drawn[18:21, 20:23, 19:22] = 0.8
    assert guard_scores(before, drawn, mask, 4.0)["local_correlation"] < 0.5


def test_a_reversed_contrast_is_flagged(brain: tuple) -> None:
    image, mask = brain
    scores = guard_scores(image, np.where(mask, 1 - image, 0), mask, 4.0)
    assert scores["gradient_correlation"] == pytest.approx(1, abs=1e-5)
    assert scores["local_correlation"] < -0.9
    assert [code for code, _ in flags(scores, GuardConfig())] == ["FLAG-ANATOMY", "FLAG-VOLUMES"]


def test_a_brain_of_one_value_has_no_edges_to_keep(brain: tuple) -> None:
    _, mask = brain
    flat = np.ones(mask.shape)
    assert np.isnan(guard_scores(flat, flat, mask, 4.0)["local_correlation"])
