"""Texture: how sharp and how noisy a site's scans are, along each axis, in few numbers.

Two scanners that agree on every tissue's intensity still differ in resolution and noise, and the
difference costs as much as a wrong contrast: on digital scans at 2 mm the best linear filter on top
of the best curve and shading brings 1 to 2.5 dB. The network is told both, of the scan it is given
and of the look it is to make. Measured on the scan in an average contrast, so that contrast does
not pass for sharpness.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: Distances in voxels at which squared differences are averaged.
LAGS = (1, 2, 3)
TEXTURE_SIZE = 3 * (len(LAGS) + 1)


def measure_texture(image: Array, mask: Array) -> NDArray[np.float32]:
    """Texture of a scan, (TEXTURE_SIZE,) float32, natural logarithms.

    For each axis the structure function at `LAGS` (mean squared difference of two voxels of the
    brain so far apart) as a part of the variance, which edges and so resolution set; and the median
    absolute second difference, which noise in flat tissue sets, as a part of the deviation.

    Args:
        image: (X, Y, Z) float, any unit.
        mask: (X, Y, Z) bool, the brain.
    """
    out = np.zeros(TEXTURE_SIZE, np.float32)
    values = image[mask]
    if len(values) < 100 or not values.std() > 0:
        return out
    scale = float(values.std())
    at = 0
    for axis in range(3):
        x, inside = np.moveaxis(image, axis, 0), np.moveaxis(mask, axis, 0)
        for lag in LAGS:
            both = inside[lag:] & inside[:-lag]
            step = (x[lag:] - x[:-lag])[both]
            out[at] = np.log(max(float(np.mean(step * step)) / scale**2, 1e-6))
            at += 1
        three = inside[2:] & inside[1:-1] & inside[:-2]
        bend = (x[2:] - 2 * x[1:-1] + x[:-2])[three]
        out[at] = np.log(max(float(np.median(np.abs(bend))) / scale, 1e-4))
        at += 1
    return out
