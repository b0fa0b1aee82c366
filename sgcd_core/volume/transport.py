"""Carrying a harmonization from the model grid to the scan's own grid.

The correction is carried, not the image: in every window of the model grid a linear map
`h ≈ a·s + b` from scan to harmonized scan is fitted (guided filter, He et al. 2013, IEEE TPAMI
35:1397, masked), and the coefficients, which are smooth, are brought to the native grid and applied
to the native voxels. What such maps leave over of the harmonized scan (edges that were sharpened)
is added, but so little at most that a lesion is recoloured, not redrawn. Detail below the model's
resolution survives. Where a lesion mask is given, its voxels count for nothing in the fit, and the
maps go on through it from around it: whatever the network drew there is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sgcd_core.config import TransportConfig
from sgcd_core.io.nifti import NiftiScan
from sgcd_core.volume.geometry import Geometry
from sgcd_core.volume.lesion import fill_smoothly
from sgcd_core.volume.resample import Box, bounding_box, resample_masked, without_spikes

Array = NDArray[Any]

_CHUNK = 1_000_000  # native voxels mapped at a time
#: Inside a lesion the map rises at least this part as fast as over the whole brain.
_LEAST_SLOPE = 0.25
#: Least value inside the brain: what is 0 lies outside it, whoever thresholds an output.
DARKEST = 1e-4


def carry_to_native(
    native: NiftiScan,
    native_mask: Array,
    geometry: Geometry,
    harmonized: Array,
    mask: Array,
    config: TransportConfig,
    lesion: Array | None = None,
) -> Array:
    """The harmonized scan on its own grid.

    Args:
        native: The scan as stored.
        native_mask: bool, stored grid, the brain.
        geometry: From `prepare_scan`.
        harmonized: (X, Y, Z) float32 in [0, 1], model grid.
        mask: (X, Y, Z) bool, model grid, the brain.
        config: Window, ridge, and how much of what the maps leave over is added at most.
        lesion: (X, Y, Z) bool, model grid, as `lesion_on_model_grid` gives it; None for no lesion.

    Returns:
        float32 on the stored grid, the model's intensity scale (about [0, 1], at least `DARKEST`),
        0 outside `native_mask`.
    """
    source, source_mask = native_on_model_grid(native, native_mask, geometry)
    inside = mask & source_mask
    box = _around(_reached(native_mask, geometry), bounding_box(inside))
    hole = None if lesion is None else lesion[box]
    slope, offset = local_linear_maps(source[box], harmonized[box], inside[box], config, hole)
    left = harmonized[box] - (slope * source[box] + offset)
    offset = offset + remainder(left, inside[box], config, hole)
    slope, offset = continued(inside[box], slope, offset)
    values = geometry.scale(native.data[native_mask])
    for part, at in _places(native_mask, geometry, box):
        a = ndimage.map_coordinates(slope, at, order=1, mode="nearest")
        b = ndimage.map_coordinates(offset, at, order=1, mode="nearest")
        values[part] = np.maximum(a * values[part] + b, DARKEST)
    return _inside(native_mask, values)


def remainder(
    left: Array, mask: Array, config: TransportConfig, lesion: Array | None = None
) -> Array:
    """What is added to the maps' result: what they leave over, no more than `config.remainder`.

    Measured on digital scans of 2 mm with a model grid of 2 mm: 0.2 to 0.7 dB closer to the truth;
    99 % of what the look filter adds to the maps is below 0.08. A lesion that a network without a
    mask drew over differs by more, and so keeps its contrast but for that much.

    Args:
        left: (X, Y, Z) float32, harmonized scan less the maps' result, model grid.
        mask: (X, Y, Z) bool, the brain.
        config: Holds the bound.
        lesion: (X, Y, Z) bool; through it the values around it go on, without a seam.

    Returns:
        (X, Y, Z) float32 within the mask; 0 beyond.
    """
    bounded = np.where(mask, np.clip(left, -config.remainder, config.remainder), 0)
    holes = None if lesion is None else mask & lesion
    if config.remainder and holes is not None and holes.any():
        bounded = fill_smoothly(bounded, mask & ~holes, holes, 0.0)
    return bounded.astype(np.float32)


def continued(mask: Array, *fields: Array) -> list[Array]:
    """Fields that go on beyond the mask as at its nearest voxel.

    So interpolation at the brain's edge meets no zeros.

    Args:
        mask: (X, Y, Z) bool, at least one voxel.
        fields: (X, Y, Z), any type.

    Returns:
        Each field in float32; within the mask its own values.
    """
    nearest = ndimage.distance_transform_edt(~mask, return_distances=False, return_indices=True)
    return [field[tuple(nearest)].astype(np.float32) for field in fields]


def recolour_lesion(
    image: Array, harmonized: Array, mask: Array, lesion: Array, config: TransportConfig
) -> Array:
    """The model-grid output with the lesion as its surroundings' maps recolour it.

    Args:
        image: (X, Y, Z) float32 in [0, 1], the prepared scan.
        harmonized: (X, Y, Z) float32 in [0, 1], what the network drew.
        mask: (X, Y, Z) bool, the brain.
        lesion: (X, Y, Z) bool, from `lesion_on_model_grid`.
        config: Window and ridge.

    Returns:
        float32 in [0, 1]; outside the lesion `harmonized`, bit for bit.
    """
    inside = lesion & mask
    if not inside.any():
        return harmonized
    slope, offset = local_linear_maps(image, harmonized, mask, config, lesion)
    out: Array = harmonized.copy()
    out[inside] = np.clip(slope[inside] * image[inside] + offset[inside], 0, 1)
    return out


def carry_uncertainty(
    uncertainty: Array, mask: Array, native_mask: Array, geometry: Geometry
) -> Array:
    """An uncertainty map of the model grid on the scan's own grid, by linear interpolation.

    It is in units of the output already, and the output's maps are linear in the network's
    result; so it is not scaled again by the slope, which turns input units into output units.

    Args:
        uncertainty: (X, Y, Z) float32, model grid, standard deviation of the output.
        mask: (X, Y, Z) bool, model grid; beyond it the map goes on as at its nearest voxel.
        native_mask: bool, stored grid, the brain.
        geometry: From `prepare_scan`.

    Returns:
        float32 on the stored grid, never negative, 0 outside `native_mask`.
    """
    (filled,) = continued(mask, uncertainty)
    values = np.empty(np.count_nonzero(native_mask), np.float32)
    for part, at in _places(native_mask, geometry):
        values[part] = ndimage.map_coordinates(filled, at, order=1, mode="nearest")
    return _inside(native_mask, values)


def _places(
    native_mask: Array, geometry: Geometry, box: Box | None = None
) -> Iterator[tuple[slice, Array]]:
    """Where the voxels of a native mask lie on the model grid, in parts of a bounded size.

    Yields:
        Which of the mask's voxels, and their model voxels (3, n) float64, counted from the corner
        of `box`.
    """
    to_model = geometry.native_to_model()
    corner = np.array([[side.start] for side in box]) if box is not None else 0
    flat = np.flatnonzero(native_mask)
    for start in range(0, flat.size, _CHUNK):
        part = slice(start, min(start + _CHUNK, flat.size))
        voxel = np.stack(np.unravel_index(flat[part], native_mask.shape))
        yield part, to_model[:3, :3] @ voxel + (to_model[:3, 3:] - corner)


def _reached(native_mask: Array, geometry: Geometry) -> Box:
    """The part of the model grid that interpolation at the native mask's voxels reads."""
    sides = [(side.start, side.stop - 1) for side in bounding_box(native_mask)]
    corners = np.stack([axis.ravel() for axis in np.meshgrid(*sides)])
    to_model = geometry.native_to_model()
    at = to_model[:3, :3] @ corners + to_model[:3, 3:]
    low, high = np.floor(at.min(axis=1)).astype(int), np.floor(at.max(axis=1)).astype(int) + 2
    x, y, z = (
        slice(min(max(a, 0), size - 1), max(min(b, size), 1))
        for a, b, size in zip(low.tolist(), high.tolist(), geometry.model_shape, strict=True)
    )
    return x, y, z


def _around(one: Box, other: Box) -> Box:
    """The smallest box that holds both."""
    x, y, z = (
        slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True)
    )
    return x, y, z


def _inside(mask: Array, values: Array) -> Array:
    """(X, Y, Z) float32, `values` in the mask's voxels and 0 elsewhere."""
    out = np.zeros(mask.shape, np.float32)
    out[mask] = values
    return out


def native_on_model_grid(
    native: NiftiScan, native_mask: Array, geometry: Geometry
) -> tuple[Array, Array]:
    """The native scan, not bias-corrected, on the model grid and intensity scale, and its mask."""
    image, mask = resample_masked(
        without_spikes(native.data, geometry.intensity_low, geometry.intensity_high),
        native_mask,
        np.array(geometry.native_affine),
        geometry.model_world_affine(),
        geometry.model_shape,
    )
    return np.where(mask, geometry.scale(image), np.float32(0)), mask


def local_linear_maps(
    source: Array,
    harmonized: Array,
    mask: Array,
    config: TransportConfig,
    lesion: Array | None = None,
) -> tuple[Array, Array]:
    """Slope and offset of the map from `source` to `harmonized` around each voxel.

    The ridge pulls the slope towards the whole brain's, not towards 0 as in the original filter:
    in a window that holds one tissue and noise, a slope of 0 would wash the native detail out.
    Measured on real scans at 2 mm and 0.6 mm with a monotone change of contrast as the perfect
    4 mm result: at a ridge of 1e-4 the two agree; at 4e-3 the pull to 0 keeps 75 to 82 % of the
    native detail's amplitude (RMSE 0.051, 0.074), this one 95 to 97 % (0.040, 0.052).

    Args:
        source: (X, Y, Z) float32.
        harmonized: (X, Y, Z) float32.
        mask: (X, Y, Z) bool; voxels outside it count for nothing.
        config: Window half-width and ridge.
        lesion: (X, Y, Z) bool; its voxels count for nothing either. Through it slope and offset go
            on from around it (`fill_smoothly`: no seam), so each of its voxels is recoloured by a
            weighted mean of the maps around it; the slope stays positive.

    Returns:
        (slope, offset), each (X, Y, Z) float32 within the mask; 0 beyond.

    Raises:
        ValueError: No voxel is left to fit on.
    """
    if not mask.any():
        raise ValueError("the mask is empty")
    box = bounding_box(mask)
    whole, brain = mask.shape, mask[box]
    mask = brain
    holes = None if lesion is None else brain & lesion[box]
    if holes is not None and holes.any():
        mask = brain & ~holes
        if not mask.any():
            raise ValueError("all of the mask is lesion")
    s, h = source[box].astype(np.float64), harmonized[box].astype(np.float64)
    prior = global_slope(s[mask], h[mask], config.epsilon)
    size = 2 * config.radius + 1

    def box_sum(values: Array) -> Array:
        out: Array = ndimage.uniform_filter(np.where(mask, values, 0.0), size, mode="constant")
        return out

    count = np.maximum(box_sum(np.ones_like(s)), 1e-12)
    mean_s, mean_h = box_sum(s) / count, box_sum(h) / count
    variance = np.maximum(box_sum(s * s) / count - mean_s**2, 0.0)
    covariance = box_sum(s * h) / count - mean_s * mean_h
    slope = (covariance + config.epsilon * prior) / (variance + config.epsilon)
    offset = mean_h - slope * mean_s
    slope, offset = box_sum(slope) / count, box_sum(offset) / count
    if holes is not None and holes.any():
        rest = (prior, float(h[mask].mean() - prior * s[mask].mean()))
        slope, offset = (
            fill_smoothly(values, mask, holes, value)
            for values, value in zip((slope, offset), rest, strict=True)
        )
        # Two tissues of one window may cross; a lesion must not be turned inside out. The map is
        # turned about the intensity around it, which stays where it is.
        pivot = fill_smoothly(mean_s, mask, holes, float(s[mask].mean()))
        steeper = np.where(holes, np.maximum(slope, _LEAST_SLOPE * max(prior, 0.0)), slope)
        offset, slope = offset + (slope - steeper) * pivot, steeper
    out = np.zeros((2, *whole), np.float32)
    out[:, *box] = np.where(brain, (slope, offset), 0)
    return out[0], out[1]


def global_slope(source: Array, harmonized: Array, epsilon: float) -> float:
    """Least-squares slope over all voxels given; 1 where the source is flat."""
    s, h = source - source.mean(), harmonized - harmonized.mean()
    return float((s @ h + epsilon * s.size) / (s @ s + epsilon * s.size))
