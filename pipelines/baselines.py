"""The methods a harmonized scan is compared with, each fit on the target site's training scans.

A baseline sees the target site's TRAINING scans of one sequence and the scan it is applied to,
never a statistic of the test subject's own scan at the target site. All inputs and outputs are
model-grid volumes, float32, (X, Y, Z), in [0, 1] inside a bool mask and 0 outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from sgcd_core.errors import UsageError

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]
Scans = Sequence[tuple[Image, Mask]]


class Baseline(Protocol):
    """One method: `fit` on the target's training scans, then `apply` to any scan."""

    name: ClassVar[str]

    def fit(self, scans: Scans) -> Baseline:
        """Learn the target's look; returns itself."""
        ...

    def apply(self, image: Image, mask: Mask) -> Image:
        """The scan with the target's look, [0, 1], 0 outside the mask."""
        ...


def _inside(image: NDArray[Any], mask: Mask) -> Image:
    """Clipped to [0, 1], 0 outside the mask."""
    return np.where(mask, np.clip(image, 0, 1), 0).astype(np.float32)


class Raw:
    """The prepared scan itself (robust percentiles to 0 and 1)."""

    name: ClassVar[str] = "raw"

    def fit(self, scans: Scans) -> Raw:
        """Nothing to learn."""
        return self

    def apply(self, image: Image, mask: Mask) -> Image:
        """The scan as it is."""
        return _inside(image, mask)


class Nyul:
    """Nyúl & Udupa's piecewise linear histogram standardization.

    The standard scale is the mean of the training scans' landmarks (percentiles 1, 10, 20, …, 90,
    99). The library maps each training scan's own range to the output range before averaging;
    prepared scans have the range [0, 1] already, and the output range is theirs at the landmarks
    1 and 99, so that outputs are comparable with the target's prepared scans.
    Source: Nyúl, Udupa & Zhang 2000, IEEE TMI 19(2); the package intensity-normalization.
    """

    name: ClassVar[str] = "nyul"

    def fit(self, scans: Scans) -> Nyul:
        """Average the landmarks of the target's training scans."""
        from intensity_normalization.adapters.images import NumpyImageAdapter
        from intensity_normalization.normalizers.population.nyul import NyulNormalizer

        ends = np.mean([np.percentile(i[m], (1.0, 99.0)) for i, m in scans], axis=0)
        self._adapter = NumpyImageAdapter
        self._normalizer = NyulNormalizer(
            output_min_value=float(ends[0]), output_max_value=float(ends[1])
        )
        self._normalizer.fit_population(
            [NumpyImageAdapter(i.astype(np.float64)) for i, _ in scans],
            [NumpyImageAdapter(m.astype(np.float64)) for _, m in scans],
        )
        return self

    def apply(self, image: Image, mask: Mask) -> Image:
        """Map the scan's landmarks to the standard scale, linearly in between.

        Landmarks of one intensity, as of a scan with a tenth of its brain at its lowest, count as
        one, at the mean of their places on the scale: the library would divide by nothing.
        """
        landmarks = np.percentile(image.astype(np.float64)[mask], self._normalizer.percentiles)
        if len(np.unique(landmarks)) < len(landmarks):
            return _inside(self._between(image.astype(np.float64), landmarks), mask)
        normalized = self._normalizer.transform(
            self._adapter(image.astype(np.float64)), self._adapter(mask.astype(np.float64))
        )
        return _inside(normalized.get_data(), mask)

    def _between(self, data: NDArray[np.float64], landmarks: NDArray[np.float64]) -> NDArray[Any]:
        """As the library maps `data`, with one landmark an intensity; of one alone, an offset."""
        from scipy.interpolate import interp1d

        values, of, counts = np.unique(landmarks, return_inverse=True, return_counts=True)
        scale = np.bincount(of, self._normalizer.standard_scale) / counts
        if len(values) < 2:
            return np.asarray(data - values[0] + scale[0])
        mapping = interp1d(values, scale, bounds_error=False, fill_value="extrapolate")
        return np.asarray(mapping(data))


class _Affine:
    """A gain and an offset per scan, so that its location and scale are the target's mean ones."""

    name: ClassVar[str]

    def location_scale(self, image: Image, mask: Mask) -> tuple[float, float]:
        """Location and scale of the intensities inside the mask."""
        raise NotImplementedError

    def fit(self, scans: Scans) -> _Affine:
        """Average location and scale of the target's training scans."""
        pairs = [self.location_scale(image, mask) for image, mask in scans]
        self._location, self._scale = (float(v) for v in np.mean(pairs, axis=0))
        return self

    def apply(self, image: Image, mask: Mask) -> Image:
        """Give the scan the target's location and scale."""
        location, scale = self.location_scale(image, mask)
        gain = self._scale / scale if scale > 0 else 1.0
        return _inside((image - location) * gain + self._location, mask)


class MinMax(_Affine):
    """Smallest and largest masked intensity become the target's."""

    name: ClassVar[str] = "minmax"

    def location_scale(self, image: Image, mask: Mask) -> tuple[float, float]:
        """Minimum and range."""
        return float(image[mask].min()), float(np.ptp(image[mask]))


class _Library(_Affine):
    """Mean and deviation as a normalizer of intensity-normalization finds them."""

    def normalizer(self) -> Any:
        """One that is not fit."""
        raise NotImplementedError

    def location_scale(self, image: Image, mask: Mask) -> tuple[float, float]:
        """Mean and deviation; deviation 0 for a scan that has no contrast."""
        from intensity_normalization.adapters.images import NumpyImageAdapter
        from intensity_normalization.domain.exceptions import NormalizationError

        found = self.normalizer()
        try:
            found.fit(
                NumpyImageAdapter(image.astype(np.float64)),
                NumpyImageAdapter(mask.astype(np.float64)),
            )
        except NormalizationError:
            return float(image[mask].mean()), 0.0
        return float(found.mean), float(found.std)


class ZScore(_Library):
    """Masked mean and standard deviation become the target's."""

    name: ClassVar[str] = "zscore"

    def normalizer(self) -> Any:
        """The library's."""
        from intensity_normalization.normalizers.individual.zscore import ZScoreNormalizer

        return ZScoreNormalizer()


class WhiteStripe(_Library):
    """Mean and deviation of normal-appearing white matter become the target's.

    The stripe is the band of ±5 % of the voxels around the mode of white matter: the last mode of
    the histogram in T1w, the largest elsewhere.
    Source: Shinohara et al. 2014, NeuroImage: Clinical 6; the package intensity-normalization.
    """

    name: ClassVar[str] = "whitestripe"

    def __init__(self, sequence: str = "T1w") -> None:
        self._t1w = sequence == "T1w"

    def normalizer(self) -> Any:
        """The library's."""
        from intensity_normalization.domain.models import Modality
        from intensity_normalization.normalizers.individual.whitestripe import (
            WhiteStripeNormalizer,
        )

        return WhiteStripeNormalizer(modality=Modality.T1 if self._t1w else Modality.T2)


class HistogramMatching:
    """Every masked intensity becomes the target's intensity of the same rank.

    The target's distribution is pooled over its training scans, equally many values from each.
    Source: Gonzalez & Woods, Digital Image Processing, 3.3.2; scikit-image's implementation.
    """

    name: ClassVar[str] = "histogram"

    def fit(self, scans: Scans) -> HistogramMatching:
        """Pool the quantiles of the target's training scans."""
        from sgcd_core.metrics import intensity_quantiles

        self._pool = np.concatenate([intensity_quantiles(i, m, 4096) for i, m in scans])
        return self

    def apply(self, image: Image, mask: Mask) -> Image:
        """Match the scan's masked histogram to the pooled one."""
        from skimage.exposure import match_histograms

        out = np.zeros(image.shape, np.float64)
        out[mask] = match_histograms(image[mask].astype(np.float64), self._pool)
        return _inside(out, mask)


#: Every baseline by the name used in `metrics.method`.
BASELINES: tuple[str, ...] = ("raw", "nyul", "minmax", "zscore", "whitestripe", "histogram")


def make_baseline(name: str, sequence: str) -> Baseline:
    """A baseline that is not fit yet.

    Raises:
        UsageError: There is no baseline of this name.
    """
    if name == "whitestripe":
        return WhiteStripe(sequence)
    kinds: dict[str, type[Raw | Nyul | MinMax | ZScore | HistogramMatching]] = {
        kind.name: kind for kind in (Raw, Nyul, MinMax, ZScore, HistogramMatching)
    }
    if name not in kinds:
        raise UsageError(f"no method {name!r}; there are {', '.join(BASELINES)}.")
    return kinds[name]()
