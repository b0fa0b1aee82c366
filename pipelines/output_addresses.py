"""Addresses of outputs in a lake that was copied or moved since they were written."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.lake import Lake
from pipelines.schemas import OUTPUT_ADDRESSES
from sgcd_core.io.store import Store, is_s3, join, local_path

_FOLDER = "/derivatives/"


def outputs_here(results: pa.Table, lake: Lake) -> pa.Table:
    """Rows of `results` with the addresses that their outputs have in this lake.

    An address under another root is this lake's where it ends as one of a lake does
    (`…/derivatives/MODEL-vN/sub-…`) and the lake holds that derivative. Others stay: a BIDS App
    writes outputs beside its lake, which holds none.

    Raises:
        StorageError: The store is out of reach.
    """
    root = lake.uri if is_s3(lake.uri) else os.path.abspath(local_path(lake.uri))
    root = root.rstrip("/") + _FOLDER
    held: dict[str, bool] = {}
    for name in OUTPUT_ADDRESSES:
        if name not in results.column_names:
            continue
        column = results[name]
        if pc.all(pc.starts_with(column, root)).as_py() in (True, None):
            continue
        moved = [_here(uri, root, held) for uri in column.to_pylist()]
        place = results.schema.get_field_index(name)
        results = results.set_column(
            place, results.schema.field(place), pa.array(moved, column.type)
        )
    return results


def _here(uri: str | None, root: str, held: dict[str, bool]) -> str | None:
    if uri is None or uri.startswith(root):
        return uri
    key, slash, rest = uri.rpartition(_FOLDER)[2].partition("/")
    if _FOLDER not in uri or not slash or not rest.startswith("sub-"):
        return uri
    if key not in held:
        held[key] = Store().exists(join(root, key, "dataset_description.json"))
    return join(root, key, rest) if held[key] else uri
