"""The scan a harmonized one is compared with, laid on the same voxels.

A subject's scans at two sites are aligned with the template each by itself, half a millimetre
apart: enough to hide every difference between methods. For the comparison, and for nothing else,
the target's scan is aligned with the source scan and resampled once from its own grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.lake import Lake
from pipelines.prepare import PreparedFiles, load_native_mask, load_prepared, read_indexed
from sgcd_core.config import PrepareConfig
from sgcd_core.io.nifti import to_ras
from sgcd_core.io.store import Store
from sgcd_core.volume.prepare import corrected_brain
from sgcd_core.volume.register import align_rigid
from sgcd_core.volume.resample import resample_masked

Row = dict[str, Any]

#: Nearer than this the target's scan is taken as it was prepared.
CLOSE_ENOUGH_MM = 0.1


def load_truth(
    lake: Lake, config: PrepareConfig, truth: Row, own: PreparedFiles
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The truth on the voxels of a prepared scan of the same subject and sequence.

    Its intensities are scaled as its own preparation scaled them, whatever the scan.

    Args:
        lake: Where both are prepared.
        config: How they were prepared.
        truth: Row of `scans`, the subject's scan at the target.
        own: The prepared scan, before harmonization.

    Returns:
        Image (X, Y, Z) float32 in [0, 1], 0 outside the brain, and the brain mask.

    Raises:
        InputError: The truth is not prepared, cannot be read, or is not what was indexed.
        StorageError: The store is out of reach.
    """
    files, turn, grid = _aligned(lake, config, truth, own)
    if displacement(turn, grid, files.mask > 0) < CLOSE_ENOUGH_MM:
        return np.asarray(files.image, np.float32), files.mask > 0
    return _resampled(lake, config, truth, files, turn, grid, config.shape)


def load_truth_on_scan(
    lake: Lake, config: PrepareConfig, truth: Row, own: PreparedFiles
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """As `load_truth`, on the voxels of the scan as it is stored."""
    files, turn, _ = _aligned(lake, config, truth, own)
    geometry = own.geometry
    grid = np.array(geometry.world_to_template) @ np.array(geometry.native_affine)
    return _resampled(lake, config, truth, files, turn, grid, geometry.native_shape)


def _aligned(
    lake: Lake, config: PrepareConfig, truth: Row, own: PreparedFiles
) -> tuple[PreparedFiles, NDArray[Any], NDArray[Any]]:
    """The prepared truth, the turn that lays it on the scan (mm → mm), and the model grid."""
    files = load_prepared(lake, config.digest(), truth["scan_id"])
    grid = np.array(files.geometry.model_affine)
    turn = align_rigid(
        files.image, files.mask > 0, own.image, own.mask > 0, grid, str(truth["sequence"])
    )
    return files, turn, grid


def _resampled(
    lake: Lake,
    config: PrepareConfig,
    truth: Row,
    files: PreparedFiles,
    turn: NDArray[Any],
    grid: NDArray[Any],
    shape: tuple[int, int, int],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The truth, resampled once from its own voxels; `grid` leads to template mm."""
    native = read_indexed(truth, Store(), config.max_inflated_bytes)
    inside = load_native_mask(lake, config.digest(), truth["scan_id"])
    data, affine, _ = to_ras(native.data, native.affine)
    inside, *_ = to_ras(inside, native.affine)
    data, inside, affine = corrected_brain(data, inside, affine, config)
    placed = turn @ np.array(files.geometry.world_to_template) @ affine
    image, mask = resample_masked(data, inside, placed, grid, shape)
    scaled = np.clip(files.geometry.scale(image), 0, 1) * mask
    return scaled.astype(np.float32), mask


def displacement(transform: NDArray[Any], grid: NDArray[Any], mask: NDArray[np.bool_]) -> float:
    """How far (4, 4) `transform`, mm → mm, moves the voxels of a mask: root mean square, mm."""
    voxels = np.argwhere(mask)[::97]
    points = np.c_[voxels, np.ones(len(voxels))] @ grid.T
    moved = points @ (transform - np.eye(4)).T
    return float(np.sqrt((moved[:, :3] ** 2).sum(1).mean()))
