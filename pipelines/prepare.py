"""Preparing scans into a lake: rows in, rows out, resumable by running it again."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.lake import Lake
from sgcd_core.config import PrepareConfig
from sgcd_core.errors import InputError, SgcdError, StorageError
from sgcd_core.io.nifti import NiftiScan, encode_nifti, read_nifti
from sgcd_core.io.store import Store, join, sha256_hex
from sgcd_core.volume.geometry import Geometry
from sgcd_core.volume.prepare import Prepared, prepare_scan

Array = NDArray[Any]
log = logging.getLogger(__name__)

IMAGE, MASK, NATIVE_MASK = "image.nii.gz", "mask.nii.gz", "native_mask.nii.gz"
GEOMETRY = "geometry.json"


@dataclass(frozen=True, eq=False)
class PreparedFiles:
    """A prepared scan as read from the lake.

    Attributes:
        image: (X, Y, Z) float32 in [0, 1], model grid RAS+, 0 outside `mask`.
        mask: (X, Y, Z) bool.
        geometry: The way back to the native grid.
    """

    image: Array = field(repr=False)
    mask: Array = field(repr=False)
    geometry: Geometry


def prepare_one(row: dict[str, Any], lake: Lake, config: PrepareConfig) -> dict[str, Any]:
    """Prepare the scan of one row of the `scans` table; never raises for a bad scan.

    A scan whose geometry.json is in the lake and can be read is skipped: it is written last.

    Args:
        row: Needs scan_id, uri and sequence.
        lake: Where prepared volumes go.
        config: The recipe.

    Returns:
        scan_id, uri, sequence, recipe, prepared_uri, status ("ok" or "failed"), code, message,
        skipped (bool), brain_ml (None when failed), mask_source, and seconds_read, _strip, _bias,
        _register, _resample, _write and _total.
    """
    recipe = config.digest()
    start = time.perf_counter()
    out: dict[str, Any] = {
        "scan_id": row.get("scan_id"), "uri": row.get("uri"), "sequence": row.get("sequence"),
        "recipe": recipe, "prepared_uri": None, "status": "ok", "code": None, "message": None,
        "skipped": False, "brain_ml": None, "mask_source": None,
    }  # fmt: skip
    try:
        folder = lake.prepared(recipe, str(row["scan_id"]))
        done = _finished(folder)
        out["prepared_uri"] = folder
        if done is not None:
            out.update(skipped=True, brain_ml=done.brain_ml)
        else:
            out.update(_prepare(row, folder, config))
    except SgcdError as error:
        out.update(status="failed", code=error.code, message=error.sentence, prepared_uri=None)
    except Exception as error:
        # Boundary: one scan that fails in a way nobody foresaw must not end the run. The text of
        # the exception may quote a header, so only its type and place are kept.
        log.error(
            "event=prepare_failed scan_id=%s error=%s\n%s",
            row.get("scan_id"), type(error).__name__,
            "".join(traceback.format_tb(error.__traceback__)),
        )  # fmt: skip
        out.update(
            status="failed", code="SCAN-FAILED", prepared_uri=None,
            message=f"preparation ended with {type(error).__name__}; see the log.",
        )  # fmt: skip
    out["seconds_total"] = round(time.perf_counter() - start, 3)
    log.info(
        "event=prepared scan_id=%s status=%s code=%s skipped=%s seconds=%.2f",
        out["scan_id"], out["status"], out["code"], out["skipped"], out["seconds_total"],
    )  # fmt: skip
    return out


def load_prepared(lake: Lake | str, recipe: str, scan_id: str) -> PreparedFiles:
    """A prepared scan.

    Args:
        lake: Lake, or its address.
        recipe: Digest of the settings that it was prepared with, `SgcdConfig.prepare.digest()`;
            the folders in `prepared/` of the lake.
        scan_id: As in the table `scans`.

    Raises:
        InputError: SCAN-MISSING when it is not in the lake, or a code of `read_nifti`.
        StorageError: The store is out of reach or the geometry is damaged.
    """
    lake = Lake.open(lake) if isinstance(lake, str) else lake
    store, folder = Store(), lake.prepared(recipe, scan_id)
    geometry, digests = _geometry(store, join(folder, GEOMETRY))
    return PreparedFiles(
        image=read_nifti(join(folder, IMAGE), store, sha256=digests.get(IMAGE)).data,
        mask=read_nifti(join(folder, MASK), store, sha256=digests.get(MASK)).data > 0,
        geometry=geometry,
    )


def load_native_mask(lake: Lake, recipe: str, scan_id: str) -> Array:
    """The brain on the scan's stored grid, bool; errors as for `load_prepared`."""
    store, folder = Store(), lake.prepared(recipe, scan_id)
    digest = _geometry(store, join(folder, GEOMETRY))[1].get(NATIVE_MASK)
    mask: Array = read_nifti(join(folder, NATIVE_MASK), store, sha256=digest).data > 0
    return mask


def read_indexed(row: Mapping[str, Any], store: Store, max_inflated: int) -> NiftiScan:
    """The scan of a row of `scans`, whose bytes are those that were indexed.

    Raises:
        InputError: SCAN-CHANGED when they are others, else as for `read_nifti`.
        StorageError: As for `Store.read_bytes`.
    """
    uri = str(row["uri"])
    try:
        return read_nifti(uri, store, max_inflated=max_inflated, sha256=str(row["scan_id"]))
    except StorageError as error:
        if error.code != "STORE-DIGEST":
            raise
        raise InputError(
            "its bytes are not those that were indexed.", code="SCAN-CHANGED", where=uri,
            hint="If the file was replaced, run `sgcd index` again.",
        ) from error  # fmt: skip


def save_prepared(folder: str, scan: NiftiScan, prepared: Prepared, store: Store) -> None:
    """Write a prepared scan; geometry.json goes last, so its presence means: complete.

    It also holds the SHA-256 of the volumes, which is compared whenever they are read.
    """
    grid = np.array(prepared.geometry.model_affine)
    files = {
        IMAGE: encode_nifti(prepared.image, grid),
        MASK: encode_nifti(prepared.mask, grid, dtype=np.uint8),
        NATIVE_MASK: encode_nifti(prepared.native_mask, scan, dtype=np.uint8),
    }
    for name, data in files.items():
        store.write_bytes(join(folder, name), data)
    body = json.loads(prepared.geometry.to_json())
    body["sha256"] = {name: sha256_hex(data) for name, data in files.items()}
    text = json.dumps(body, indent=1, sort_keys=True) + "\n"
    store.write_bytes(join(folder, GEOMETRY), text.encode())


def _prepare(row: dict[str, Any], folder: str, config: PrepareConfig) -> dict[str, Any]:
    store, uri = Store(), str(row["uri"])
    clock = time.perf_counter()
    scan = read_indexed(row, store, config.max_inflated_bytes)
    seconds = {"read": round(time.perf_counter() - clock, 3)}
    prepared = prepare_scan(scan, config, sequence=str(row["sequence"]), where=uri)
    clock = time.perf_counter()
    save_prepared(folder, scan, prepared, store)
    seconds |= prepared.seconds | {"write": round(time.perf_counter() - clock, 3)}
    return {
        "brain_ml": prepared.geometry.brain_ml,
        "mask_source": prepared.mask_source,
        **{f"seconds_{phase}": value for phase, value in seconds.items()},
    }


def _geometry(store: Store, where: str) -> tuple[Geometry, dict[str, str]]:
    """A scan's geometry, and the SHA-256 of its volumes by file name ({} where none was kept)."""
    data = store.read_bytes(where)
    geometry = Geometry.from_json(data, where=where)
    return geometry, json.loads(data).get("sha256", {})


def _finished(folder: str) -> Geometry | None:
    """The geometry of a scan that is already prepared, None when it is absent or damaged."""
    store, where = Store(), join(folder, GEOMETRY)
    if not store.exists(where):
        return None
    try:
        return _geometry(store, where)[0]
    except SgcdError as error:
        if error.code not in ("TABLE-SCHEMA", "STORE-DIGEST"):  # out of reach is not damaged
            raise
        log.warning("event=geometry_damaged uri=%s action=prepare_again", where)
        return None
