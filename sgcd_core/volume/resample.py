"""Moving a masked image between grids: low-pass before coarser sampling, brain edge kept clean.

An affine here maps voxel indices to mm, RAS+. A grid is an affine and a shape.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[Any]
Box = tuple[slice, slice, slice]

#: Full width at half maximum of a Gaussian, in standard deviations.
FWHM = 2.0 * float(np.sqrt(2.0 * np.log(2.0)))

#: How far an intensity may lie beyond the brain's range, in such ranges; of 25 real scans none had
#: one further than 1.5 (vessels).
REACH = 5.0


def voxel_ml(affine: Array) -> float:
    """Volume of a voxel, ml; the affine (4, 4) may be sheared."""
    return abs(float(np.linalg.det(affine[:3, :3]))) / 1000.0


def voxel_sides(affine: Array) -> Array:
    """Voxel sides in mm, (3,) float64, of a (4, 4) affine."""
    sides: Array = np.sqrt((np.asarray(affine, float)[:3, :3] ** 2).sum(axis=0))
    return sides


def bounding_box(mask: Array, margin: int = 0) -> Box:
    """Slices around the true voxels of `mask` (X, Y, Z), widened by `margin` voxels.

    An empty mask gives the whole grid.
    """
    sides: list[slice] = []
    for axis, size in enumerate(mask.shape):
        others = tuple(a for a in range(3) if a != axis)
        hit = np.flatnonzero(mask.any(axis=others))
        if hit.size == 0:
            return (slice(0, mask.shape[0]), slice(0, mask.shape[1]), slice(0, mask.shape[2]))
        sides.append(slice(max(int(hit[0]) - margin, 0), min(int(hit[-1]) + 1 + margin, size)))
    return (sides[0], sides[1], sides[2])


def block_mean(volume: Array, factor: Array) -> Array:
    """Means over blocks of `factor` voxels; the far edge is padded with zeros."""
    pad = [(0, int(-size % f)) for size, f in zip(volume.shape, factor, strict=True)]
    x = np.pad(volume, pad)
    a, b, c = (int(f) for f in factor)
    out: Array = x.reshape(x.shape[0] // a, a, x.shape[1] // b, b, x.shape[2] // c, c).mean(
        axis=(1, 3, 5), dtype=np.float32
    )
    return out


def shifted(affine: Array, box: Box) -> Array:
    """The affine of the grid that is cut out by `box`."""
    out = np.array(affine, dtype=np.float64)
    out[:3, 3] += out[:3, :3] @ np.array([side.start for side in box], dtype=np.float64)
    return out


def lowpass_sigma(source_mm: Array, target_mm: float) -> Array:
    """Gaussian sigma per source axis, voxels, before sampling every `target_mm`.

    Point spread functions are taken as Gaussians with the voxel side as their full width at half
    maximum, so the widths subtract in squares (Cardoso et al. 2015, MICCAI, Eq. 4).
    """
    ratio = target_mm / np.asarray(source_mm, float)
    sigma: Array = np.sqrt(np.maximum(ratio**2 - 1.0, 0.0)) / FWHM
    return sigma


def sample(volume: Array, voxel_from_out: Array, shape: tuple[int, int, int]) -> Array:
    """Linear interpolation on a new grid, 0 outside.

    Args:
        volume: (X, Y, Z) float32.
        voxel_from_out: (4, 4), index on the new grid → index in `volume`.
        shape: Shape of the new grid.

    Returns:
        float32 of `shape`.
    """
    out: Array = ndimage.affine_transform(
        np.asarray(volume, np.float32), voxel_from_out[:3, :3], offset=voxel_from_out[:3, 3],
        output_shape=shape, output=np.float32, order=1, mode="constant", cval=0.0,
    )  # fmt: skip
    return out


def resample_masked(
    image: Array,
    mask: Array,
    affine: Array,
    out_affine: Array,
    out_shape: tuple[int, int, int],
) -> tuple[Array, Array]:
    """Area-weighted resampling of the inside of a mask.

    Image and mask are low-passed and sampled alike and then divided, so that a voxel at the brain's
    edge is the mean of the brain in it and not a mixture with the background.

    Args:
        image: (X, Y, Z) float32.
        mask: (X, Y, Z) bool.
        affine: (4, 4) voxel → mm of `image`.
        out_affine: (4, 4) voxel → mm of the result, in the same world.
        out_shape: Shape of the result.

    Returns:
        (float32 image, 0 outside its mask; bool mask: at least half of the voxel is brain).
    """
    sigma = lowpass_sigma(voxel_sides(affine), float(voxel_sides(out_affine).mean()))
    reach = int(np.ceil(3 * sigma.max())) + 2
    box = bounding_box(mask, margin=reach)
    inside = mask[box].astype(np.float32)
    weighted = np.where(mask[box], image[box], np.float32(0)).astype(np.float32, copy=False)
    if sigma.any():
        inside = ndimage.gaussian_filter(inside, sigma, mode="constant", truncate=3.0)
        weighted = ndimage.gaussian_filter(weighted, sigma, mode="constant", truncate=3.0)
    voxel_from_out = np.linalg.inv(shifted(affine, box)) @ out_affine
    share = sample(inside, voxel_from_out, out_shape)
    total = sample(weighted, voxel_from_out, out_shape)
    out_mask: Array = share >= 0.5
    out = np.zeros(out_shape, np.float32)
    out[out_mask] = total[out_mask] / share[out_mask]
    return out, out_mask


def without_spikes(image: Array, low: float, high: float) -> Array:
    """`image` bounded by `REACH` times the range of its brain beyond it, float32.

    One corrupt voxel would spread over all that is interpolated or fitted.

    Args:
        image: Any shape.
        low: Where nearly all of the brain's intensities begin.
        high: Where they end.
    """
    beyond = REACH * (high - low)
    out: Array = np.clip(np.asarray(image, np.float32), low - beyond, high + beyond)
    return out
