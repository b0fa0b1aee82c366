"""Can a scan be used: a battery of small checks, each from a scan to findings.

What the reader itself refuses (damage, orientation, type; see `io.nifti`) becomes a finding too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sgcd_core.config import PrepareConfig
from sgcd_core.errors import InputError
from sgcd_core.io.nifti import NiftiScan, decode_nifti

#: An image with fewer distinct values is a mask or a label map, not an MRI intensity.
MIN_DISTINCT = 16
_PIXDIM_TOLERANCE = 0.05
#: Sides come from 32-bit headers: by so much of a limit they may miss it and still keep it.
ROUNDING = 1e-6
_SAMPLE = 200_000


@dataclass(frozen=True)
class Finding:
    """One thing a check found.

    Attributes:
        code: A key of `errors.CODES`.
        message: What was found and what was expected; no text from the file.
        fatal: The scan cannot be used.
    """

    code: str
    message: str
    fatal: bool


def check_notes(scan: NiftiScan, config: PrepareConfig) -> list[Finding]:
    """What the reader found odd but harmless."""
    return [Finding(code, message, False) for code, message in scan.notes]


def check_voxel_sides(scan: NiftiScan, config: PrepareConfig) -> list[Finding]:
    """SCAN-COARSE when a voxel side is longer than `max_voxel_mm`."""
    longest = max(scan.voxel_mm)
    if longest <= config.max_voxel_mm * (1 + ROUNDING):
        return []
    return [
        Finding(
            "SCAN-COARSE",
            f"a voxel side is {longest:.1f} mm, the limit is {config.max_voxel_mm:g} mm; "
            "use a 3D acquisition, or raise prepare.max_voxel_mm.",
            True,
        )
    ]


def check_pixdim(scan: NiftiScan, config: PrepareConfig) -> list[Finding]:
    """A warning when pixdim and the affine differ in voxel size: the affine is used."""
    pixdim = np.asarray(scan.geometry.get("pixdim", (1, *scan.voxel_mm)), np.float64)[1:4]
    ratio = pixdim / np.array(scan.voxel_mm)
    if np.abs(ratio - 1).max() <= _PIXDIM_TOLERANCE:
        return []
    return [
        Finding(
            "SCAN-VOXEL-SIZE",
            "pixdim and the affine give different voxel sides; the affine is used.",
            False,
        )
    ]


def check_coverage(scan: NiftiScan, config: PrepareConfig) -> list[Finding]:
    """SCAN-COVERAGE when the field of view is shorter than `min_extent_mm` along an axis."""
    extent = min(n * side for n, side in zip(scan.shape, scan.voxel_mm, strict=True))
    if extent >= config.min_extent_mm * (1 - ROUNDING):
        return []
    return [
        Finding(
            "SCAN-COVERAGE",
            f"the field of view is {extent:.0f} mm along one axis, "
            f"at least {config.min_extent_mm:g} mm are needed.",
            True,
        )
    ]


def check_contrast(scan: NiftiScan, config: PrepareConfig) -> list[Finding]:
    """SCAN-EMPTY when the image is constant or holds fewer than `MIN_DISTINCT` values."""
    flat = scan.data.ravel(order="K")
    distinct = np.unique(flat[:: max(1, flat.size // _SAMPLE)]).size
    if distinct < MIN_DISTINCT:  # the sample may have missed them
        distinct = np.unique(flat).size
    if distinct >= MIN_DISTINCT:
        return []
    found = "every voxel has the same value" if distinct == 1 else f"only {distinct} values occur"
    return [Finding("SCAN-EMPTY", f"{found}, expected an MRI intensity image.", True)]


CHECKS: tuple[Callable[[NiftiScan, PrepareConfig], list[Finding]], ...] = (
    check_notes, check_voxel_sides, check_pixdim, check_coverage, check_contrast,
)  # fmt: skip


def check_scan(scan: NiftiScan, config: PrepareConfig | None = None) -> list[Finding]:
    """All findings about a scan that could be read, the fatal ones first."""
    config = config or PrepareConfig()
    found = [finding for check in CHECKS for finding in check(scan, config)]
    return sorted(found, key=lambda finding: not finding.fatal)


def examine(
    data: bytes, *, where: str, config: PrepareConfig | None = None
) -> tuple[NiftiScan | None, list[Finding]]:
    """The scan in a file's bytes, None if it cannot be read, and all findings, fatal ones first."""
    config = config or PrepareConfig()
    try:
        scan = decode_nifti(data, where=where, max_inflated=config.max_inflated_bytes)
    except InputError as error:
        return None, [Finding(error.code, error.sentence, True)]
    return scan, check_scan(scan, config)


def require_usable(scan: NiftiScan, config: PrepareConfig, *, where: str | None = None) -> None:
    """Do nothing for a usable scan.

    Raises:
        InputError: With the code of the first fatal finding.
    """
    for finding in check_scan(scan, config):
        if finding.fatal:
            raise InputError(finding.message, code=finding.code, where=where)
