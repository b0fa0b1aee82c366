"""A scan before and after harmonization, on its own voxels and on one intensity scale.

For pictures and the viewer: what is shown is the file a user gets, in its own orientation, not the
model's coarser copy of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluate import find_truth
from pipelines.lake import Lake
from pipelines.prepare import PreparedFiles, load_native_mask, load_prepared, read_indexed
from pipelines.truth import load_truth_on_scan
from sgcd_core.config import PrepareConfig
from sgcd_core.errors import ModelError
from sgcd_core.io.nifti import NiftiScan, read_nifti
from sgcd_core.io.store import Store

Row = dict[str, Any]
Volume = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Pair:
    """One scan, skull-stripped, on the model's intensity scale: about [0, 1], 0 outside the brain.

    Attributes:
        placement: The scan as stored; its voxels are on the scanner's own scale.
        prepared: The same on the model grid.
        mask: The brain, bool, (X, Y, Z), stored orientation like every volume here.
        before: float32.
        after: float32; None where there is no output.
        uncertainty: Standard deviation over seeds, float32; None where none was drawn.
        intact: Whether the output file still has the digest that the catalog names.
    """

    placement: NiftiScan
    prepared: PreparedFiles
    mask: NDArray[np.bool_] = field(repr=False)
    before: Volume = field(repr=False)
    after: Volume | None = field(repr=False)
    uncertainty: Volume | None = field(repr=False)
    intact: bool | None = None

    @property
    def change(self) -> Volume | None:
        """`after` less `before`."""
        return None if self.after is None else self.after - self.before


def load_pair(
    lake: Lake, config: PrepareConfig, scan: Mapping[str, Any], result: Mapping[str, Any] | None
) -> Pair:
    """The pair of one row of `scans` and its row of `results`.

    Raises:
        InputError: The scan is not prepared or not what was indexed, or a volume is missing or
            damaged.
        ModelError: MODEL-GRID when an output does not lie on the scan's voxels.
        StorageError: The store is out of reach.
    """
    limit, scan_id = config.max_inflated_bytes, str(scan["scan_id"])
    prepared = load_prepared(lake, config.digest(), scan_id)
    mask = load_native_mask(lake, config.digest(), scan_id)
    native = read_indexed(scan, Store(), limit)
    before = np.where(mask, prepared.geometry.scale(native.data), np.float32(0))
    result = result or {}
    after = uncertainty = intact = None
    if result.get("output_uri"):
        output = _on(native, str(result["output_uri"]), limit)
        after, intact = output.data, output.sha256 == result["output_sha256"]
    if result.get("uncertainty_uri"):
        uncertainty = _on(native, str(result["uncertainty_uri"]), limit).data
    return Pair(native, prepared, mask, before.astype(np.float32), after, uncertainty, intact)


def load_pair_truth(
    lake: Lake,
    config: PrepareConfig,
    scan: Row,
    scans: Sequence[Row],
    target: str | None,
    prepared: PreparedFiles,
) -> Volume | None:
    """The same person's scan at the target site, laid on the scan's voxels; None without one.

    Errors as for `load_pair`.
    """
    truth = find_truth(scan, scans, target)
    if truth is None:
        return None
    return load_truth_on_scan(lake, config, truth, prepared)[0]


def _on(native: NiftiScan, uri: str, limit: int) -> NiftiScan:
    """The volume at `uri`, which must have the scan's voxels: shape and affine."""
    found = read_nifti(uri, Store(), max_inflated=limit)
    same = found.shape == native.shape and np.allclose(found.affine, native.affine, atol=1e-3)
    if not same:
        raise ModelError(
            "the output does not lie on the scan's voxels.", code="MODEL-GRID", where=uri,
            hint="Harmonize the scan again with --force.",
        )  # fmt: skip
    return found
