"""From a scan to the model grid: RAS+, brain, bias field, rigid alignment, intensity.

Every step is recorded in a `Geometry`, so that the way back is exact. What the steps may not do is
change the native scan: only the model-grid copy is corrected and resampled.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sgcd_core.config import PrepareConfig
from sgcd_core.errors import InputError
from sgcd_core.io.nifti import NiftiScan, from_ras, to_ras
from sgcd_core.volume.checks import check_coverage, check_voxel_sides
from sgcd_core.volume.geometry import Geometry, rows
from sgcd_core.volume.resample import (
    bounding_box,
    resample_masked,
    shifted,
    voxel_ml,
    without_spikes,
)

Array = NDArray[Any]

__all__ = ["SEQUENCES", "Geometry", "Prepared", "prepare_scan"]

SEQUENCES = ("T1w", "T2w")
#: A brain mask outside this range is not a brain, ml.
BRAIN_ML = (500.0, 2500.0)
_MARGIN = 4  # voxels kept around the brain


@dataclass(frozen=True, eq=False)
class Prepared:
    """A scan on the model grid, and where it came from.

    Attributes:
        image: (X, Y, Z) float32 in [0, 1], model grid RAS+, 0 outside `mask`.
        mask: (X, Y, Z) bool, the brain on the model grid.
        native_mask: bool, the brain on the scan's stored grid.
        geometry: The way between the two grids, and the intensity scale.
        mask_source: "given" for a scan that came brain-extracted, else the tool's name.
        seconds: Per phase: strip, bias, register, resample.
    """

    image: Array = field(repr=False)
    mask: Array = field(repr=False)
    native_mask: Array = field(repr=False)
    geometry: Geometry
    mask_source: str = "given"
    seconds: dict[str, float] = field(default_factory=dict)


def prepare_scan(
    scan: NiftiScan, config: PrepareConfig, *, sequence: str, where: str | None = None,
    placed: Array | None = None,
) -> Prepared:  # fmt: skip
    """One scan on the model grid.

    Args:
        scan: As stored; it is not changed.
        config: Each step can be switched.
        sequence: "T1w" or "T2w".
        where: Address for messages.
        placed: (4, 4) world mm → template mm where it is known; no registration is made then.

    Raises:
        InputError: SCAN-SEQUENCE, SCAN-COARSE, SCAN-COVERAGE, SCAN-EMPTY, SCAN-NEEDS-STRIPPING,
            SCAN-NO-BRAIN or SCAN-REGISTRATION.
    """
    from sgcd_core.volume.register import centred, register_rigid
    from sgcd_core.volume.strip import brain_mask
    from sgcd_core.volume.template import model_affine

    _check_scan(scan, config, sequence, where)
    seconds: dict[str, float] = {}
    data, affine, orientation = to_ras(scan.data, scan.affine)
    with _timed(seconds, "strip"):
        mask_ras, source = brain_mask(data, affine, config, where=where)
    brain_ml = float(mask_ras.sum()) * voxel_ml(affine)
    _check_brain(brain_ml, source, where)

    with _timed(seconds, "bias"):
        image, mask, crop_affine = corrected_brain(data, mask_ras, affine, config)
    del data
    with _timed(seconds, "register"):
        if placed is not None:
            transform = placed
        elif config.registration == "rigid":
            transform = register_rigid(image, mask, crop_affine, sequence=sequence, where=where)
        else:
            transform = centred(mask, crop_affine)
    with _timed(seconds, "resample"):
        grid = model_affine(config)
        model, model_mask = resample_masked(
            image, mask, transform @ crop_affine, grid, config.shape
        )
        low, high = _range(model, model_mask, brain_ml, config, where)

    geometry = Geometry(
        native_shape=scan.shape,
        native_affine=rows(scan.affine),
        ras_orientation=orientation,
        model_affine=rows(grid),
        model_shape=config.shape,
        world_to_template=rows(transform),
        intensity_low=low,
        intensity_high=high,
        brain_ml=round(brain_ml, 1),
    )
    scaled = np.where(model_mask, np.clip(geometry.scale(model), 0, 1), np.float32(0))
    return Prepared(
        image=scaled,
        mask=model_mask,
        native_mask=from_ras(mask_ras, orientation),
        geometry=geometry,
        mask_source=source,
        seconds=seconds,
    )


def corrected_brain(
    data: Array, mask: Array, affine: Array, config: PrepareConfig
) -> tuple[Array, Array, Array]:
    """The brain and a margin, which is a quarter of a head, corrected for the bias field.

    N4 works on blocks from one corner on: the axes are RAS+ here, however a scan is stored.

    Args:
        data: (X, Y, Z), RAS+, any unit.
        mask: (X, Y, Z) bool, the brain.
        affine: (4, 4) voxel → mm.
        config: `bias_correction` says how.

    Returns:
        Image float32, mask and affine of the part.
    """
    from sgcd_core.volume.bias import bias_field

    box = bounding_box(mask, margin=_MARGIN)
    inside, part = mask[box], shifted(affine, box)
    low, high = np.percentile(data[box][inside], (0.1, 99.9))
    image = without_spikes(np.array(data[box], dtype=np.float32), float(low), float(high))
    if config.bias_correction == "n4":
        image /= bias_field(image, inside, part)
    return image, inside, part


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = round(time.perf_counter() - start, 3)


def _check_scan(scan: NiftiScan, config: PrepareConfig, sequence: str, where: str | None) -> None:
    if sequence not in SEQUENCES:
        raise InputError(
            f"the sequence is {sequence!r}, expected {' or '.join(SEQUENCES)}.",
            code="SCAN-SEQUENCE", where=where,
        )  # fmt: skip
    for finding in (*check_voxel_sides(scan, config), *check_coverage(scan, config)):
        raise InputError(finding.message, code=finding.code, where=where)
    if float(scan.data.max()) == float(scan.data.min()):
        raise InputError("every voxel has the same value.", code="SCAN-EMPTY", where=where)


def _check_brain(brain_ml: float, source: str, where: str | None) -> None:
    low, high = BRAIN_ML
    if not low <= brain_ml <= high:
        raise InputError(
            f"the brain mask ({source}) holds {brain_ml:.0f} ml, expected {low:.0f} to "
            f"{high:.0f} ml.",
            code="SCAN-NO-BRAIN", where=where,
            hint="For whole heads use prepare.brain_extraction=auto or deepbet.",
        )  # fmt: skip


def _range(
    model: Array, mask: Array, brain_ml: float, config: PrepareConfig, where: str | None
) -> tuple[float, float]:
    """Intensities that become 0 and 1."""
    if float(mask.sum()) * config.mm**3 / 1000.0 < brain_ml / 2.0:
        raise InputError(
            "most of the brain lies outside the model grid.", code="SCAN-REGISTRATION", where=where,
        )  # fmt: skip
    low, high = (float(v) for v in np.percentile(model[mask], config.percentiles))
    if not high > low:
        raise InputError("the brain is constant.", code="SCAN-EMPTY", where=where)
    return low, high
