"""Lesion masks of scans: where they lie, and reading them."""

from __future__ import annotations

import logging
import string
from collections.abc import Mapping
from typing import Any

from sgcd_core.errors import InputError, UsageError
from sgcd_core.io.nifti import NiftiScan, read_nifti
from sgcd_core.io.store import Store, is_s3, join

log = logging.getLogger(__name__)

#: Placeholders of a pattern.
PLACEHOLDERS = ("subject", "session", "sequence", "entities", "stem")
#: Pattern that says: use no mask, not even one beside the scan.
NONE = "none"
_ENDINGS = (".nii.gz", ".nii")
_SIBLINGS = ("label-lesion_roi", "label-lesion_mask")


def check_pattern(pattern: str | None) -> None:
    """Do nothing for a pattern that `candidates` can fill in.

    Raises:
        UsageError: An unknown placeholder, or braces that do not match.
    """
    hint = f"Placeholders are {', '.join(f'{{{name}}}' for name in PLACEHOLDERS)}."
    try:
        parts = list(string.Formatter().parse(pattern or ""))
    except ValueError as error:
        raise UsageError("its braces do not match.", where="--lesions", hint=hint) from error
    for _, name, form, conversion in parts:
        if name is not None and (name not in PLACEHOLDERS or form or conversion):
            raise UsageError(f"does not know {{{name}}}.", where="--lesions", hint=hint)


def dataset_root(scan: Mapping[str, Any]) -> str | None:
    """Folder of the data set a scan lies in; None where its address has no subject's folder."""
    head, sign, _ = str(scan["uri"]).rpartition(f"/sub-{scan['subject']}/")
    return head if sign else None


def candidates(scan: Mapping[str, Any], pattern: str | None) -> list[str]:
    """Addresses at which the lesion mask of a scan may lie, the first that exists counts.

    For `sub-01/ses-2/anat/sub-01_ses-2_run-1_T1w.nii.gz` {subject} is sub-01, {session} ses-2
    (empty where there is none; an empty level of folders is left out), {sequence} T1w, {stem}
    sub-01_ses-2_run-1_T1w and {entities} the same without _T1w.

    Args:
        scan: Row of `scans`.
        pattern: Address with placeholders, relative to the data set's root or absolute (local,
            file:// or s3://); `none` for no mask at all; None for the siblings alone.

    Returns:
        The pattern's address, then the siblings of the scan that BIDS names for lesions.
    """
    if pattern == NONE:
        return []
    folder, _, name = str(scan["uri"]).rpartition("/")
    stem = name
    for ending in _ENDINGS:
        stem = stem.removesuffix(ending)
    entities = stem.removesuffix(f"_{scan['sequence']}")
    found = []
    if pattern:
        filled = pattern.format(
            subject=f"sub-{scan['subject']}" if scan["subject"] else "",
            session=f"ses-{scan['session']}" if scan["session"] else "",
            sequence=scan["sequence"], entities=entities, stem=stem,
        )  # fmt: skip
        absolute = filled.startswith(("/", "file:")) or is_s3(filled)
        found.append(join(filled) if absolute else join(dataset_root(scan) or folder, filled))
    heads = dict.fromkeys((stem, entities))
    found += [
        join(folder, f"{head}_{label}{ending}")
        for head in heads for label in _SIBLINGS for ending in _ENDINGS
    ]  # fmt: skip
    return found


def find_lesion(scan: Mapping[str, Any], pattern: str | None, store: Store) -> str | None:
    """Address of the scan's lesion mask; None for a scan that has none.

    Raises:
        StorageError: The store does not answer.
    """
    return next((uri for uri in candidates(scan, pattern) if store.exists(uri)), None)


def load_lesion(uri: str, scan: NiftiScan, store: Store, max_inflated: int) -> Any:
    """The lesion on the scan's stored grid, bool.

    Raises:
        InputError: LESION-UNREADABLE or LESION-GRID.
        StorageError: The store does not answer.
    """
    from sgcd_core.volume.lesion import read_lesion

    try:
        mask = read_nifti(uri, store, max_inflated=max_inflated)
    except InputError as error:
        raise InputError(
            f"the lesion mask cannot be read ({error.code}): {error.message}",
            code="LESION-UNREADABLE", where=uri,
            hint="Repair the mask, take it away, or pass --lesions none.",
        ) from error  # fmt: skip
    return read_lesion(mask, scan, where=uri)


def lesion_of(
    scan: Mapping[str, Any], pattern: str | None, native: NiftiScan, store: Store, max_inflated: int
) -> tuple[str | None, Any, str | None]:
    """Address of a scan's lesion mask, the lesion as of `load_lesion`, why a mask is left out.

    A mask that was found beside the scan, whose name leaves open which of the session's images it
    was drawn on, and that lies on another grid, is another image's.

    Args:
        scan: Row of `scans`.
        pattern: As of `candidates`.
        native: The scan.
        store: Where both lie.
        max_inflated: Bound on the mask.

    Returns:
        Each is None where there is none.

    Raises:
        InputError, StorageError: As `load_lesion`.
    """
    uri = find_lesion(scan, pattern, store)
    if uri is None:
        return None, None, None
    try:
        return uri, load_lesion(uri, native, store, max_inflated), None
    except InputError as error:
        named = f"_{scan['sequence']}_" in uri.rpartition("/")[2]
        if error.code != "LESION-GRID" or pattern is not None or named:
            raise
        log.warning("event=lesion_left_out scan_id=%s uri=%s", scan["scan_id"], uri)
        return None, None, f"A lesion mask beside the scan is left out: {error.message}"
