"""Rim: how bright the outermost layers of a site's brains are, in few numbers.

What a voxel at the surface shows depends on how much of what lies outside is mixed into it, and on
how bright fluid is there: resolution and protocol decide both. On digital T2w scans at 2 mm the
outermost layer, 7 % of the brain, held a third of the error that matching leaves. The network is
told the rim of the look that is wanted and that of the scan it is given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[Any]

#: Layers, from the surface inwards, each one voxel thick.
LAYERS = 4
#: Levels of the quantiles that are taken of each layer.
RIM_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
RIM_SIZE = LAYERS * len(RIM_LEVELS)


def measure_rim(image: Array, mask: Array) -> NDArray[np.float32]:
    """Quantiles of the layers, outermost first, (RIM_SIZE,) float32 in the unit of the image.

    Where the brain is cut by the edge of the grid there is no surface. A layer that is not there
    is as the one before it; 0 without any.

    Args:
        image: (X, Y, Z) float.
        mask: (X, Y, Z) bool, the brain.
    """
    out = np.zeros((LAYERS, len(RIM_LEVELS)), np.float32)
    found = ndimage.find_objects(mask.astype(np.uint8))
    if not found or mask.all():
        return out.ravel()
    # one voxel around it, where the grid has one: that is what the surface is measured from
    box = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in found[0])
    depth = ndimage.distance_transform_cdt(mask[box], "taxicab")
    near = depth <= LAYERS
    depth, values = depth[near], np.asarray(image[box])[near]
    for layer in range(LAYERS):
        mine = values[depth == layer + 1]
        if len(mine):
            out[layer] = np.quantile(mine, RIM_LEVELS)
        elif layer:
            out[layer] = out[layer - 1]
    return out.ravel()
