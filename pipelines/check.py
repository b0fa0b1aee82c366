"""`sgcd check`: can these scans be used, and if not why. Needs no lake, no torch, no Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sgcd_core.config import PrepareConfig
from sgcd_core.errors import InputError, SgcdError
from sgcd_core.io.bids import is_image, is_skipped
from sgcd_core.io.store import Store, join
from sgcd_core.volume.checks import examine

#: Scans read at a time: unpacking one needs a few hundred MB.
WORKERS = 2


def orientation_code(affine: Any) -> str:
    """Where the stored axes point, such as LAS, from an affine voxel → world mm RAS+."""
    from nibabel.orientations import aff2axcodes

    return "".join(str(code) for code in aff2axcodes(affine))


def check_one(uri: str, store: Store, config: PrepareConfig) -> dict[str, Any]:
    """One scan's row: see `check_uris`."""
    row: dict[str, Any] = {
        "uri": uri, "usable": False, "code": None, "message": None, "warnings": [],
        "shape": None, "voxel_mm": None, "orientation": None,
    }  # fmt: skip
    try:
        data = store.read_bytes(uri, max_bytes=config.max_inflated_bytes)
    except SgcdError as error:
        return row | {"code": error.code, "message": error.sentence}
    scan, findings = examine(data, where=uri, config=config)
    if scan is not None:
        row["shape"] = list(scan.shape)
        row["voxel_mm"] = [round(side, 4) for side in scan.voxel_mm]
        row["orientation"] = orientation_code(scan.affine)
    row["warnings"] = [
        {"code": found.code, "message": found.message} for found in findings if not found.fatal
    ]
    fatal = next((found for found in findings if found.fatal), None)
    if fatal is None:
        return row | {"usable": True}
    return row | {"code": fatal.code, "message": fatal.message}


def expand(uris: Iterable[str], store: Store) -> list[tuple[str, SgcdError | None]]:
    """Files as they are, folders and prefixes as the images below them; each address once.

    Inside a folder, derivatives/, sourcedata/, code/ and hidden names are left out. What cannot be
    listed comes with its error.
    """
    found: dict[str, SgcdError | None] = {}
    for uri in uris:
        if is_image(uri):
            found.setdefault(uri, None)
            continue
        try:
            base = join(uri)
            below = [item.uri for item in store.list(uri)]
        except SgcdError as error:
            found.setdefault(uri, error)
            continue
        if below == [base]:  # a file of another name: the reader says what is wrong with it
            found.setdefault(base, None)
            continue
        images = [one for one in below if is_image(one) and not is_skipped(one[len(base) :])]
        for one in images:
            found.setdefault(one, None)
        if not images:
            found[uri] = InputError(
                "no .nii or .nii.gz lies here.", code="STORE-EMPTY", where=uri,
                hint="Check the spelling of the path.",
            )  # fmt: skip
    return list(found.items())


def check_uris(
    uris: Sequence[str],
    store: Store | None = None,
    config: PrepareConfig | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """One row a scan, in the order given; no scan ends the run.

    Args:
        uris: Files, folders or prefixes; local, file:// or s3://.
        store: Where to read.
        config: Its limits are applied.
        progress: Called with (done, all) after each scan.

    Returns:
        Rows with uri, usable, code, message, warnings (each code and message), shape (voxels),
        voxel_mm and orientation (such as LAS); the last three are None when it cannot be read.
    """
    store, config = store or Store(), config or PrepareConfig()
    todo = expand(uris, store)

    def one(item: tuple[str, SgcdError | None]) -> dict[str, Any]:
        uri, error = item
        if error is None:
            return check_one(uri, store, config)
        return {
            "uri": uri, "usable": False, "code": error.code, "message": error.sentence,
            "warnings": [], "shape": None, "voxel_mm": None, "orientation": None,
        }  # fmt: skip

    rows = []
    with ThreadPoolExecutor(WORKERS) as pool:
        for row in pool.map(one, todo):
            rows.append(row)
            if progress is not None:
                progress(len(rows), len(todo))
    return rows


def render_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as lines for a terminal: one a scan, warnings below it."""
    lines = []
    for row in rows:
        size = ""
        if row["shape"] is not None:
            voxels = "×".join(str(n) for n in row["shape"])
            sides = "×".join(f"{side:g}" for side in row["voxel_mm"])
            size = f"  {voxels} voxels of {sides} mm, {row['orientation']}"
        if row["usable"]:
            lines.append(f"ok      {row['uri']}{size}")
        else:
            lines.append(f"unfit   {row['uri']}{size}\n        {row['code']}: {row['message']}")
        lines += [f"        note {w['code']}: {w['message']}" for w in row["warnings"]]
    return lines
