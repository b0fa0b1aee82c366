"""The receive-coil bias field, by N4 (Tustison et al. 2010, IEEE TMI 29:1310)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sgcd_core.volume.resample import block_mean, bounding_box, voxel_sides

Array = NDArray[Any]

#: N4 runs on blocks of about this side: the field is smooth, so nothing is lost.
WORK_MM = 6.0
ITERATIONS = (20, 20, 25)
#: A field is a factor, so intensities need a zero of their own. Z-scores and shifted scans reach
#: further below 0 than this part of the brain's brightest; ringing does not.
MOST_BELOW = 0.05


def bias_field(image: Array, mask: Array, affine: Array) -> Array:
    """Multiplicative bias field of a scan; divide by it to correct.

    Args:
        image: (X, Y, Z) float32, any unit.
        mask: (X, Y, Z) bool, the brain.
        affine: (4, 4) voxel → mm.

    Returns:
        (X, Y, Z) float32, positive, geometric mean 1 inside the mask; smooth outside it. 1
        throughout for intensities without a zero (`MOST_BELOW`).
    """
    import SimpleITK as sitk  # noqa: N813

    sides = voxel_sides(affine)
    factor = np.maximum(np.round(WORK_MM / sides), 1).astype(int)
    box = bounding_box(mask)
    if np.percentile(image, 1) < -MOST_BELOW * np.percentile(image[mask], 99):
        return np.ones(image.shape, np.float32)
    usable = mask[box] & (image[box] > 0)
    share = block_mean(usable.astype(np.float32), factor)
    total = block_mean(np.where(usable, image[box], np.float32(0)), factor)
    inside = share >= 0.5
    if inside.sum() < 100:
        return np.ones(image.shape, np.float32)
    small = np.where(inside, total / np.maximum(share, 1e-6), 0.0).astype(np.float32)

    spacing = [float(s) for s in sides * factor][::-1]
    itk_image = sitk.GetImageFromArray(small)
    itk_mask = sitk.GetImageFromArray(inside.astype(np.uint8))
    itk_image.SetSpacing(spacing)
    itk_mask.SetSpacing(spacing)
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    # One thread: sums over threads are added in any order, and a retry must give the same voxels.
    n4.SetNumberOfThreads(1)
    n4.SetNumberOfWorkUnits(1)
    n4.SetMaximumNumberOfIterations(list(ITERATIONS))
    n4.SetConvergenceThreshold(1e-3)
    n4.Execute(itk_image, itk_mask)
    log_small = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(itk_image)).astype(np.float32)
    log_small -= log_small[inside].mean()

    # Index of a native voxel on the block grid; the field goes on flat beyond the blocks.
    start = np.array([side.start for side in box], float)
    scale = 1.0 / factor
    log_field = ndimage.affine_transform(
        log_small, np.diag(scale), offset=(0.5 - start) * scale - 0.5,
        output_shape=image.shape, output=np.float32, order=1, mode="nearest",
    )  # fmt: skip
    field: Array = np.exp(log_field)
    return field
