"""How close two images are, inside a brain mask.

Images are float32, (X, Y, Z), intensities in [0, 1], on one grid; masks are bool, (X, Y, Z). Voxels
outside the mask never change a number: about three quarters of a head volume is background and
would own every mean.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Measure:
    """What a metric is called, its unit and which way is better."""

    name: str
    title: str
    unit: str
    higher_is_better: bool


#: The paper's four measures of Task 1 (traveling subjects).
MEASURES: dict[str, Measure] = {
    "ssim": Measure("ssim", "SSIM", "1", True),
    "psnr": Measure("psnr", "PSNR", "dB", True),
    "pcc": Measure("pcc", "PCC", "1", True),
    "wasserstein": Measure("wasserstein", "Wasserstein", "intensity range", False),
}


def _values(a: Image, b: Image, mask: Mask) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both images' masked voxels, float64, (N,)."""
    if not a.shape == b.shape == mask.shape:
        raise ValueError(f"shapes differ: {a.shape}, {b.shape}, mask {mask.shape}")
    if not mask.any():
        raise ValueError("the mask is empty")
    return a[mask].astype(np.float64), b[mask].astype(np.float64)


def ssim(a: Image, b: Image, mask: Mask) -> float:
    """Structural similarity, mean of the SSIM map over the mask; 1 for equal images.

    Gaussian windows, sigma 1.5 voxels (11 voxels wide), K1 = 0.01, K2 = 0.03, data range 1. Voxels
    outside the mask are set to 0 in both images first, so windows at its border see no background.

    Unit: 1. Source: Wang et al. 2004, IEEE TIP 13(4), Eq. 13; scikit-image's implementation.

    Raises:
        ValueError: The shapes differ, a side is shorter than 11 voxels or the mask is empty.
    """
    from skimage.metrics import structural_similarity

    _values(a, b, mask)
    _, full = structural_similarity(
        np.where(mask, a, 0).astype(np.float64),
        np.where(mask, b, 0).astype(np.float64),
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return float(full[mask].mean())


def psnr(a: Image, b: Image, mask: Mask) -> float:
    """Peak signal-to-noise ratio with peak 1: -10 log10 of the masked mean squared difference.

    Infinite for equal images. Unit: dB.

    Raises:
        ValueError: The shapes differ or the mask is empty.
    """
    u, v = _values(a, b, mask)
    error = float(np.mean((u - v) ** 2))
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def pcc(a: Image, b: Image, mask: Mask) -> float:
    """Pearson's correlation coefficient of the masked voxels; NaN when an image is constant.

    Unit: 1.

    Raises:
        ValueError: The shapes differ or the mask is empty.
    """
    u, v = _values(a, b, mask)
    u, v = u - u.mean(), v - v.mean()
    norm = float(np.sqrt((u @ u) * (v @ v)))
    return float("nan") if norm == 0 else float(np.clip(u @ v / norm, -1, 1))


def wasserstein(a: Image, b: Image, mask: Mask) -> float:
    """Wasserstein-1 distance between the two intensity distributions inside the mask.

    With equally many voxels on both sides it is exactly the mean absolute difference of the sorted
    intensities. Unit: fraction of the intensity range [0, 1].
    Source: Ramdas et al. 2017, Entropy 19(2):47, Eq. 6.

    Raises:
        ValueError: The shapes differ or the mask is empty.
    """
    u, v = _values(a, b, mask)
    return float(np.mean(np.abs(np.sort(u) - np.sort(v))))


def intensity_quantiles(image: Image, mask: Mask, count: int = 512) -> NDArray[np.float64]:
    """Quantiles of the masked intensities at the midpoints of `count` equal shares, (count,).

    The mean absolute difference of two such vectors is the Wasserstein-1 distance of two scans
    whose masks differ, up to 1/count of the range.
    """
    shares = (np.arange(count) + 0.5) / count
    return np.asarray(np.quantile(image[mask].astype(np.float64), shares))


def masked_histogram(image: Image, mask: Mask, bins: int = 64) -> NDArray[np.float64]:
    """Share of the masked voxels in each of `bins` equal bins of [0, 1], (bins,), sum 1."""
    counts, _ = np.histogram(np.clip(image[mask], 0, 1), bins=bins, range=(0.0, 1.0))
    return np.asarray(counts / max(1, counts.sum()))


def histogram_distance(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Wasserstein-1 distance of two histograms over [0, 1]; unit: fraction of the range."""
    return float(np.abs(np.cumsum(p) - np.cumsum(q)).sum() / len(p))


def dice(a: Mask, b: Mask) -> float:
    """Dice overlap of two regions; 1 when both are empty. Unit: 1. Source: Dice 1945, Ecology 26.

    Raises:
        ValueError: The shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape}, {b.shape}")
    total = int(a.sum()) + int(b.sum())
    return 1.0 if total == 0 else 2.0 * int((a & b).sum()) / total


def ap(volume: float, reference: float) -> float:
    """Anatomical preservation, 1 - |V - V_ref| / V_ref; 1 when the volumes agree. Unit: 1.

    Raises:
        ValueError: The reference volume is not positive.
    """
    if not reference > 0:
        raise ValueError(f"the reference volume must be positive, got {reference}")
    return 1.0 - abs(volume - reference) / reference


def measure_all(a: Image, b: Image, mask: Mask) -> dict[str, float]:
    """Every measure of `MEASURES` between `a` and `b`."""
    return {
        "ssim": ssim(a, b, mask),
        "psnr": psnr(a, b, mask),
        "pcc": pcc(a, b, mask),
        "wasserstein": wasserstein(a, b, mask),
    }


def bootstrap_interval(
    values: Sequence[float] | NDArray[Any],
    subjects: Sequence[Hashable],
    *,
    seed: int = 0,
    level: float = 0.95,
    draws: int = 2000,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over subjects.

    Subjects are drawn with replacement, each with the mean of its values, since two scans of one
    person are not independent. With one subject both ends are its mean: no interval is known.
    Source: Efron & Tibshirani 1993, chapter 13.

    Args:
        values: One number per scan; those that are not finite are left out.
        subjects: Whose scan it is, in the same order.
        seed: Of the draws; the same input gives the same interval.
        level: Share of the draws inside.
        draws: Number of bootstrap samples.

    Returns:
        Low and high end; NaN when no value is finite.
    """
    by_subject: dict[Hashable, list[float]] = {}
    for value, subject in zip(values, subjects, strict=True):
        if np.isfinite(value):
            by_subject.setdefault(subject, []).append(float(value))
    if not by_subject:
        return float("nan"), float("nan")
    means = np.array([np.mean(by_subject[s]) for s in sorted(by_subject, key=str)])
    picks = np.random.default_rng(seed).integers(0, len(means), (draws, len(means)))
    tail = (1 - level) / 2
    low, high = np.quantile(means[picks].mean(axis=1), (tail, 1 - tail))
    return float(low), float(high)
