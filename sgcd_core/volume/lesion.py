"""Lesion masks: where a scan's correction is carried from the surroundings and nothing is drawn."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sgcd_core.errors import InputError
from sgcd_core.io.nifti import NiftiScan, from_ras, to_ras
from sgcd_core.volume.geometry import Geometry
from sgcd_core.volume.resample import voxel_sides

Array = NDArray[Any]

#: Two grids are one when no corner of the field of view lies further apart, in voxel sides.
_SAME_GRID = 0.1
#: Part of the brain that must lie outside the lesion.
_LEAST_REST = 0.25


def read_lesion(mask: NiftiScan, scan: NiftiScan, *, where: str | None = None) -> Array:
    """The lesion of a mask image, bool on the scan's stored grid: voxels of at least 0.5.

    The mask may hold the scan's voxels in another order, as after `nibabel.as_closest_canonical`.

    Raises:
        InputError: LESION-GRID, shape or placement is not the scan's.
    """
    lesion: Array = mask.data >= 0.5
    if mask.shape == scan.shape and _off(mask.affine, scan.affine, scan.shape) is None:
        return lesion
    lesion, affine, _ = to_ras(lesion, mask.affine)
    own, own_affine, order = to_ras(scan.data, scan.affine)
    hint = "Resample the mask onto the scan's grid."
    if lesion.shape != own.shape:
        raise InputError(
            f"the lesion mask has {mask.shape} voxels, the scan {scan.shape}.",
            code="LESION-GRID", where=where, hint=hint,
        )  # fmt: skip
    if apart := _off(affine, own_affine, own.shape):
        raise InputError(
            f"the lesion mask lies {apart:.1f} mm off the scan at one corner.",
            code="LESION-GRID", where=where, hint=hint,
        )  # fmt: skip
    return from_ras(lesion, order)


def _off(one: Array, other: Array, shape: tuple[int, int, int]) -> float | None:
    """How far two grids of one shape lie apart, mm; None where they are one."""
    apart = corner_distance(one, other, shape)
    return apart if apart > _SAME_GRID * float(voxel_sides(other).min()) else None


def corner_distance(one: Array, other: Array, shape: tuple[int, int, int]) -> float:
    """Largest distance in mm between the corners of two grids of one shape, by (4, 4) affines."""
    corners = np.array([(*corner, 1) for corner in product(*((0, n - 1) for n in shape))], float)
    return float(np.linalg.norm(corners @ (one - other).T[:, :3], axis=1).max())


def lesion_on_model_grid(lesion: Array, geometry: Geometry) -> Array:
    """Every model voxel that a lesion voxel reaches, bool: none of them may count in a fit.

    These are the voxels within less than one model voxel of the centre of a lesion voxel along each
    axis (all that take part in interpolating there), and those within one lesion voxel.

    Args:
        lesion: bool, stored grid of the scan.
        geometry: From `prepare_scan`.
    """
    shape = geometry.model_shape
    out = np.zeros(shape, bool)
    if not lesion.any():
        return out
    to_model = geometry.native_to_model()
    at = to_model[:3, :3] @ np.stack(np.nonzero(lesion)) + to_model[:3, 3:]
    low, high = np.floor(at).astype(int), np.ceil(at).astype(int)
    for corner in product((False, True), repeat=3):
        index = np.where(np.array(corner)[:, None], high, low)
        inside = ((index >= 0) & (index < np.array(shape)[:, None])).all(axis=0)
        out[tuple(index[:, inside])] = True
    to_native = geometry.model_to_native()
    share = ndimage.affine_transform(
        lesion.astype(np.float32), to_native[:3, :3], offset=to_native[:3, 3],
        output_shape=shape, order=1, mode="constant", cval=0.0,
    )  # fmt: skip
    out |= share > 0
    return out


def require_surroundings(lesion: Array, mask: Array, *, where: str | None = None) -> None:
    """Do nothing where enough of the brain lies outside the lesion.

    Args:
        lesion: (X, Y, Z) bool.
        mask: (X, Y, Z) bool, the brain, same grid.
        where: Address for messages.

    Raises:
        InputError: LESION-TOO-BIG.
    """
    rest = float((mask & ~lesion).sum()) / max(1, int(mask.sum()))
    if rest < _LEAST_REST:
        raise InputError(
            f"the lesion mask leaves {rest:.0%} of the brain, at least {_LEAST_REST:.0%} are "
            "needed.", code="LESION-TOO-BIG", where=where,
            hint="Check that the mask marks the lesion and not its surroundings.",
        )  # fmt: skip


def fill_smoothly(values: Array, known: Array, holes: Array, far: float) -> Array:
    """`values` with its holes filled from the known voxels around them, without a seam.

    The filling is harmonic (Laplace's equation over the six neighbours, the known voxels as
    boundary): every filled voxel is a weighted mean of the known ones around the hole and the mean
    of its neighbours, so it meets them continuously and never leaves their range.

    Args:
        values: (X, Y, Z) float.
        known: (X, Y, Z) bool; other voxels outside the holes count for nothing.
        holes: (X, Y, Z) bool, apart from `known`.
        far: Value of a hole that touches no known voxel.

    Returns:
        (X, Y, Z) float64; outside the holes `values`.
    """
    from scipy.sparse import coo_array, diags_array
    from scipy.sparse.linalg import cg

    out = values.astype(np.float64)
    label, _ = ndimage.label(holes)
    reached = np.unique(label[holes & ndimage.binary_dilation(known)])
    alone = holes & ~np.isin(label, reached)
    out[alone] = far
    holes = holes & ~alone
    count = int(holes.sum())
    if not count:
        return out
    number = np.full(values.shape, -1)
    number[holes] = np.arange(count)
    at = np.stack(np.nonzero(holes))
    own = np.arange(count)
    weight, wanted = np.zeros(count), np.zeros(count)
    rows, columns = [], []
    for axis, step in product(range(3), (-1, 1)):
        beside = at.copy()
        beside[axis] += step
        inside = (beside[axis] >= 0) & (beside[axis] < values.shape[axis])
        here, there = own[inside], tuple(beside[:, inside])
        is_known, is_hole = known[there], holes[there]
        weight[here] += is_known | is_hole
        wanted[here] += np.where(is_known, out[there], 0.0)
        rows.append(here[is_hole])
        columns.append(number[there][is_hole])
    row, column = np.concatenate(rows), np.concatenate(columns)
    links = coo_array((np.ones(row.size), (row, column)), shape=(count, count)).tocsr()
    # Symmetric and positive definite; scaled by its diagonal, conjugate gradients need about as
    # many steps as the hole is wide.
    system = diags_array(weight) - links
    start = np.full(count, wanted.sum() / (weight - links.sum(axis=1)).sum())
    solved, _ = cg(
        system, wanted, x0=start, rtol=1e-9, atol=1e-12, maxiter=2000, M=diags_array(1 / weight)
    )
    out[holes] = solved
    return out
