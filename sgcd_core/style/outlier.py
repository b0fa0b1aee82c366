"""How unlike the training scans a scan is: an out-of-distribution score without a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sgcd_core.volume.resample import bounding_box

if TYPE_CHECKING:
    from torch import Tensor

_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
#: Voxels kept around the brain: what is farther off adds nothing that matters to the widest filter.
_BORDER = 8
#: Distance below which two scans are one: it was measured twice, perhaps on another machine.
_SAME = 1e-3


def style_features(image: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """What a scanner leaves in a prepared scan: quantiles, spread, edges, noise, shading.

    Args:
        image: (X, Y, Z) in [0, 1], model grid.
        mask: (X, Y, Z) bool, not empty.

    Returns:
        (9,) float32.
    """
    box = bounding_box(mask, margin=_BORDER)
    image, mask = image[box], mask[box]
    values = image[mask]
    edges = ndimage.gaussian_gradient_magnitude(image, 1.0)[mask]
    rough = (image - ndimage.gaussian_filter(image, 1.0))[ndimage.binary_erosion(mask)]
    smooth = ndimage.gaussian_filter(np.where(mask, image, 0.0), 6.0)
    weight = ndimage.gaussian_filter(mask.astype(np.float32), 6.0)
    shading = smooth[mask] / np.maximum(weight[mask], 1e-3)
    parts = [
        *np.quantile(values, _LEVELS),
        values.std(),
        edges.mean(),
        rough.std() if rough.size else 0.0,
        shading.std(),
    ]
    return np.asarray(parts, dtype=np.float32)


class OutlierModel:
    """Distance of a scan's style features to the nearest training scan's, per sequence.

    1 is a typical distance between two training scans that are nearest to each other (95th
    percentile); a score well above it means that nothing like this scan was in training.
    """

    def __init__(self, features: dict[int, NDArray[np.float32]]) -> None:
        self.features = {k: np.asarray(v, np.float32) for k, v in features.items() if len(v)}
        self._scale: dict[int, NDArray[np.float32]] = {}
        self._unit: dict[int, float] = {}
        for key, rows in self.features.items():
            scale = np.maximum(1.4826 * np.median(abs(rows - np.median(rows, 0)), 0), 0.01)
            self._scale[key] = scale.astype(np.float32)
            if len(rows) > 1:
                scaled = rows / scale
                gaps = np.sqrt(((scaled[:, None] - scaled[None]) ** 2).mean(-1))
                np.fill_diagonal(gaps, np.inf)
                self._unit[key] = max(float(np.quantile(gaps.min(1), 0.95)), 0.5)
            else:
                self._unit[key] = 1.0

    @classmethod
    def fit(cls, features: Sequence[NDArray[np.float32]], sequences: Sequence[int]) -> OutlierModel:
        """From `style_features` of the training scans and their sequence indices."""
        keys = sorted(set(sequences))
        return cls(
            {
                key: np.stack([f for f, s in zip(features, sequences, strict=True) if s == key])
                for key in keys
            }
        )

    def score(self, features: NDArray[np.float32], sequence: int) -> float:
        """Distance to the nearest training scan; infinite for a sequence without any.

        A scan that was trained on is compared with the others.
        """
        rows = self.features.get(sequence)
        if rows is None:
            return float("inf")
        gaps = np.sqrt((((rows - features) / self._scale[sequence]) ** 2).mean(-1))
        gaps.sort()
        itself = len(gaps) > 1 and gaps[0] < _SAME
        return float(gaps[int(itself)]) / self._unit[sequence]

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for the modelpack."""
        import torch  # here: whoever only measures scans does not wait for it

        return {f"outliers.{k}": torch.from_numpy(v) for k, v in self.features.items()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> OutlierModel:
        """From the modelpack's state."""
        prefix = "outliers."
        return cls(
            {int(k[len(prefix) :]): v.numpy() for k, v in state.items() if k.startswith(prefix)}
        )
