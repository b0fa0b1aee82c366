"""The battery of checks: each code has a scan that produces it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sgcd_core.config import PrepareConfig
from sgcd_core.errors import CODES, InputError
from sgcd_core.io.nifti import NiftiScan, decode_nifti, encode_nifti
from sgcd_core.volume.checks import check_scan, examine, require_usable


def scan_of(data: np.ndarray, sides: tuple[float, float, float] = (2, 2, 2)) -> NiftiScan:
    return decode_nifti(encode_nifti(data, np.diag([*sides, 1.0])), where="scan")


def codes(scan: NiftiScan, config: PrepareConfig | None = None) -> list[tuple[str, bool]]:
    found = check_scan(scan, config)
    assert all(f.code in CODES and f.message.endswith(".") for f in found)
    return [(f.code, f.fatal) for f in found]


def test_a_usable_scan_has_no_finding(head_voxels: np.ndarray) -> None:
    assert codes(scan_of(head_voxels)) == []


def test_thick_slices_are_coarse_up_to_the_limit(head_voxels: np.ndarray) -> None:
    assert codes(scan_of(head_voxels, (2, 2, 4))) == []
    assert codes(scan_of(head_voxels, (2, 2, 5))) == [("SCAN-COARSE", True)]
    assert codes(scan_of(head_voxels, (2, 2, 5)), PrepareConfig(max_voxel_mm=5)) == []


def test_a_slab_does_not_hold_a_brain(head_voxels: np.ndarray) -> None:
    slab = scan_of(head_voxels[:, :, 20:50])
    assert codes(slab) == [("SCAN-COVERAGE", True)]
    assert codes(slab, PrepareConfig(min_extent_mm=60)) == []


@pytest.mark.parametrize("levels", [1, 2, 15])
def test_masks_and_constant_images_are_empty(levels: int) -> None:
    data = np.random.default_rng(0).integers(0, levels, (60, 60, 60))
    assert codes(scan_of(data)) == [("SCAN-EMPTY", True)]


def test_a_rare_signal_is_not_taken_for_an_empty_image() -> None:
    data = np.zeros((100, 100, 100))
    data[50, 50, :40] = np.arange(40)
    assert codes(scan_of(data)) == []


def test_pixdim_that_differs_from_the_affine_is_a_warning(head_voxels: np.ndarray) -> None:
    scan = scan_of(head_voxels)
    scan.geometry["pixdim"] = np.array([1, 3, 2, 2, 0, 0, 0, 0], np.float32)
    assert codes(scan) == [("SCAN-VOXEL-SIZE", False)]


def test_a_few_nonfinite_voxels_are_a_warning(head_voxels: np.ndarray) -> None:
    data = head_voxels.astype(np.float32)
    data[0, 0, 0] = np.nan
    assert codes(scan_of(data)) == [("SCAN-NONFINITE", False)]


def test_what_the_reader_refuses_is_a_fatal_finding(make_scan: Callable[..., bytes]) -> None:
    scan, found = examine(make_scan()[:-9], where="scan")
    assert scan is None
    assert [(f.code, f.fatal) for f in found] == [("SCAN-TRUNCATED", True)]
    scan, found = examine(make_scan(), where="scan")
    assert scan is not None
    assert found == []


def test_require_usable_raises_the_first_fatal_finding(head_voxels: np.ndarray) -> None:
    require_usable(scan_of(head_voxels), PrepareConfig())
    with pytest.raises(InputError) as error:
        require_usable(scan_of(head_voxels, (2, 2, 5)), PrepareConfig(), where="x.nii")
    assert error.value.code == "SCAN-COARSE"
    assert "x.nii" in str(error.value)
