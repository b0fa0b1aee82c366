"""`sgcd index`: sources → one row of the `scans` table for each scan, whatever its state."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from pipelines.bids_links import told_apart
from pipelines.scan_list import Listed, absolute, dataset_name, list_source
from sgcd_core.config import PrepareConfig
from sgcd_core.errors import REPLACED, SgcdError
from sgcd_core.io.store import Store, is_s3, sha256_hex
from sgcd_core.volume.checks import examine
from sgcd_core.volume.prepare import SEQUENCES

WORKERS = 4
#: Bytes of a site's name, and as a table encodes it; a disk takes 255 in a folder's name, and those
#: of models hold more than the first, those of tables up to nine more than the second.
LONGEST_SITE, LONGEST_ENCODED = 180, 246


@dataclass
class IndexResult:
    """What indexing found.

    Attributes:
        rows: For the `scans` table: new scans, changed ones, and those that went away.
        unchanged: Addresses whose row in the catalog is still right.
        notes: Sentences about files that were left out and values not used.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """How many rows cannot be used."""
        return sum(row["status"] == "failed" for row in self.rows)


def latest_by_uri(rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Rows of `scans` by address; of several a usable one."""
    by_uri: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["uri"] not in by_uri or row["status"] == "ok":
            by_uri[row["uri"]] = row
    return by_uri


def index_sources(
    sources: Sequence[str],
    *,
    site_from: str = "auto",
    sequences: Sequence[str] = ("T1w", "T2w"),
    store: Store | None = None,
    known: Sequence[Mapping[str, Any]] = (),
    config: PrepareConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> IndexResult:
    """Read and check every scan of the sources; a bad scan is a row with a code.

    A scan whose address and etag are in `known` with status ok is not read again; its row comes
    again only when the facts about it (site, age, …) changed. When a known file's content changed
    (SCAN-REPLACED) or the file went away (SCAN-MISSING), the old scan_id comes with status failed,
    so that nothing reads it.

    Args:
        sources: BIDS trees, prefixes or CSV manifests; local, file:// or s3://.
        site_from: Where the site is said; see `scan_list.list_source`.
        sequences: BIDS suffixes that are wanted.
        store: Where to read.
        known: The catalog's rows.
        config: Its limits on voxel size and field of view are applied.
        progress: Called with (done, all) after each scan.

    Raises:
        UsageError, InputError, StorageError: A source as a whole cannot be used.
    """
    store, config, by_uri = store or Store(), config or PrepareConfig(), latest_by_uri(known)
    result = IndexResult()
    listed: dict[str, Listed] = {}
    for source in sources:
        found, notes = list_source(source, site_from=site_from, sequences=sequences, store=store)
        result.notes += notes
        for one in found:
            # of the sequences that there are, a manifest lists those too that are not wanted now
            if one.facts["sequence"] not in set(SEQUENCES) - set(sequences):
                listed.setdefault(one.object.uri, one)

    names = dataset_names(listed.values(), known)

    def read(one: Listed) -> dict[str, Any]:
        if one.root:
            one = replace(one, facts={**one.facts, "dataset": names[one.root]})
        return _row(one, by_uri.get(one.object.uri), store, config, sequences)

    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(WORKERS) as pool:
        for row in pool.map(read, listed.values()):
            rows.append(row)
            if progress is not None:
                progress(len(rows), len(listed))
    _mark_duplicates(rows, by_uri, listed, store)
    _keep_names_of_moved(rows, [one.root for one in listed.values()], known)
    for row in rows:
        old = by_uri.get(row["uri"])
        if old is not None and all(old.get(name) == row[name] for name in row):
            result.unchanged.append(row["uri"])
        else:
            result.rows.append(row)
    now = datetime.now(UTC)
    folders = [f"{absolute(source).rstrip('/')}/" for source in sources]
    result.rows += _gone(rows, known, folders, store)
    result.rows = [row | {"indexed_at": now} for row in result.rows]
    return result


def dataset_names(listed: Collection[Listed], known: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """A name for every data set, by root: `dataset_name`; with a digest where another has that.

    Subjects of two data sets are other people though both be called 01, so no two share a name.

    Args:
        listed: What is indexed now.
        known: The catalog's rows: who was indexed first under a name keeps it.
    """
    lists = {one.object.uri: one.root for one in listed}
    first: dict[str, tuple[bool, bool, Any, str]] = {}
    for row in known:
        root, name = _named_by(row, lists.get(row["uri"])), row["dataset"]
        if root is not None or not row.get("listed_in"):
            # usable rows count before those that a data set left behind where it was; of rows that
            # do not say who listed them the name is taken, if by nobody known
            at = (row["status"] != "ok", root is None, row["indexed_at"], root or row["uri"])
            first[name] = min(first.get(name, at), at)
    owners = {root: name for name, (*_, root) in first.items()}
    return told_apart({one.root for one in listed if one.root}, owners, dataset_name)


def _named_by(row: Mapping[str, Any], lists_it: str | None) -> str | None:
    """Data set or manifest that a known row's `dataset` is the plain name of, if there is one.

    Args:
        row: Row of `scans`. Where it does not say who listed it, its folders are looked at.
        lists_it: Who lists its address now.
    """
    places = [lists_it, row.get("listed_in"), *_upwards(row["uri"])]
    return next((root for root in places if root and dataset_name(root) == row["dataset"]), None)


def _upwards(address: str) -> Iterator[str]:
    """An address and every folder above it."""
    while address:
        yield address
        address = address.rpartition("/")[0]


def _row(
    one: Listed,
    old: Mapping[str, Any] | None,
    store: Store,
    config: PrepareConfig,
    sequences: Sequence[str],
) -> dict[str, Any]:
    uri, etag = one.object.uri, one.object.etag
    row: dict[str, Any] = {
        **_in_folders(one.facts), "uri": uri, "etag": etag, "bytes": one.object.size,
        "shape": None, "voxel_mm": None, "status": "ok", "code": None, "message": None,
    }  # fmt: skip
    row["scan_id"] = sha256_hex(f"{uri}\n{etag}".encode())[:32]
    try:
        if not etag:  # a manifest gives the address only
            info = store.info(uri)
            row |= {"etag": info.etag, "bytes": info.size}
        if old is not None and old["status"] == "ok" and old["etag"] == row["etag"]:
            row |= {name: old[name] for name in ("scan_id", "bytes", "shape", "voxel_mm")}
        else:
            row |= _read(uri, store, config)
    except SgcdError as error:
        return _failed(row, error.code, error.sentence)
    if row["status"] == "ok":
        return _judge_facts(row, one.facts, sequences)
    return row


def _read(uri: str, store: Store, config: PrepareConfig) -> dict[str, Any]:
    """The columns that only the file's bytes can fill."""
    data = store.read_bytes(uri, max_bytes=config.max_inflated_bytes)
    scan, findings = examine(data, where=uri, config=config)
    columns: dict[str, Any] = {"scan_id": sha256_hex(data)[:32], "bytes": len(data)}
    if scan is not None:
        columns["shape"] = list(scan.shape)
        columns["voxel_mm"] = [round(side, 4) for side in scan.voxel_mm]
    fatal = next((found for found in findings if found.fatal), None)
    return columns if fatal is None else _failed(columns, fatal.code, fatal.message)


def _failed(row: Mapping[str, Any], code: str, message: str) -> dict[str, Any]:
    return {**row, "status": "failed", "code": code, "message": message}


def _in_folders(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` without a site or sequence that the tables could have no folder of.

    Whatever its state, a row that harmonizing commits would take all others of the commit along.
    """
    named = [name for name in ("site", "sequence") if row[name] is not None]
    return {**row, **dict.fromkeys(name for name in named if not _names_a_folder(row[name]))}


def _names_a_folder(value: str) -> bool:
    """Whether a disk takes `value` in names of folders: of a table, encoded, and of a model."""
    return len(quote(value, safe="")) <= LONGEST_ENCODED and len(value.encode()) <= LONGEST_SITE


def _judge_facts(
    row: dict[str, Any], said: Mapping[str, Any], sequences: Sequence[str]
) -> dict[str, Any]:
    """Fail a readable scan whose source does not say what is needed.

    Args:
        row: Row of `scans`.
        said: What its source says.
        sequences: BIDS suffixes that are wanted.
    """
    if row["sequence"] not in sequences:
        return _failed(
            row, "SCAN-SEQUENCE",
            f"the sequence is not among {', '.join(sequences)}. Write it as BIDS does.",
        )  # fmt: skip
    if row["site"] != said["site"]:
        return _failed(
            row, "SCAN-NO-SITE",
            f"the name of the site is too long: it may have {LONGEST_SITE} letters, 41 where they "
            "are Cyrillic and 27 where they are Chinese. Give the site a shorter one.",
        )  # fmt: skip
    if row["site"] is not None and row["site"].startswith("-"):
        return _failed(
            row, "SCAN-NO-SITE",
            "a site's name may not begin with -, which commands take for an option. Write another.",
        )  # fmt: skip
    if row["site"] is None:
        return _failed(
            row, "SCAN-NO-SITE",
            "no site is known for this scan. Give a column site in the manifest, participants.tsv "
            "or sessions.tsv, or use --site-from.",
        )  # fmt: skip
    if row["subject"] is None:
        return _failed(row, "MANIFEST-COLUMN", "the column subject is empty. Fill it in.")
    return row


def _mark_duplicates(
    rows: list[dict[str, Any]],
    known: Mapping[str, Mapping[str, Any]],
    listed: Mapping[str, Listed],
    store: Store,
) -> None:
    """Of equal bytes the known address keeps the scan, else the first listed; others fail."""
    owner: dict[str, str] = {}
    for uri, old in known.items():
        if old["status"] == "ok":
            owner[old["scan_id"]] = uri
    current = {row["uri"]: row["scan_id"] for row in rows}
    for i, row in enumerate(rows):
        scan_id, uri = row["scan_id"], row["uri"]
        first = owner.setdefault(scan_id, uri)
        if first == uri:
            continue
        still = current[first] == scan_id if first in listed else _exists(first, store)
        if not still:  # the file moved here
            owner[scan_id] = uri
            continue
        message = f"holds the same bytes as {first}. Remove one of the two."
        if _one_file(first, uri):
            message = f"is the same file as {first}. List it under one address."
        rows[i] = _failed(
            row | {"scan_id": sha256_hex(f"{scan_id}\n{uri}".encode())[:32]},
            "SCAN-DUPLICATE", message,
        )  # fmt: skip


def _keep_names_of_moved(
    rows: Sequence[dict[str, Any]], roots: Sequence[str], known: Sequence[Mapping[str, Any]]
) -> None:
    """Give a data set that holds all usable scans known by its plain name that name: it moved.

    Args:
        rows: What is indexed now, changed in place.
        roots: Of each of them, as in `Listed`.
        known: The catalog's rows.
    """
    by_root: dict[str, list[dict[str, Any]]] = {}
    for row, root in zip(rows, roots, strict=True):
        if root and row["dataset"] != dataset_name(root):
            by_root.setdefault(root, []).append(row)
    for root, mine in by_root.items():
        name = dataset_name(root)
        before = {
            old["scan_id"] for old in known if old["dataset"] == name and old["status"] == "ok"
        }
        others = {row["dataset"] for row, of in zip(rows, roots, strict=True) if of != root}
        if before and name not in others and before <= {row["scan_id"] for row in mine}:
            for row in mine:
                row["dataset"] = name


def _one_file(one: str, other: str) -> bool:
    """Whether two addresses lead to one file: through `..`, or a link."""
    local = not is_s3(one) and not is_s3(other)
    return local and os.path.realpath(one) == os.path.realpath(other)


def _exists(uri: str, store: Store) -> bool:
    try:
        return store.exists(uri)
    except SgcdError:
        return True  # out of reach is not gone


def _gone(
    rows: Sequence[Mapping[str, Any]],
    known: Sequence[Mapping[str, Any]],
    folders: Sequence[str],
    store: Store,
) -> list[dict[str, Any]]:
    """Known scans whose file was replaced by other bytes or is gone from a listed folder."""
    ids = {row["scan_id"] for row in rows}
    states = {row["uri"]: str(row["code"]) for row in rows}
    gone = []
    for old in known:
        uri, code = old["uri"], old["code"]
        if old["scan_id"] in ids or code == REPLACED:
            continue
        if uri in states:
            if states[uri].startswith("STORE-"):  # out of reach is not gone
                continue
            code, message = REPLACED, "the file was repaired or replaced."
        elif (
            code == "SCAN-MISSING"
            or not any(uri.startswith(f) for f in folders)
            or _exists(uri, store)
        ):
            continue
        else:
            code, message = "SCAN-MISSING", "the file is gone."
        columns = {name: value for name, value in old.items() if name != "recorded_at"}
        gone.append(_failed(_in_folders(columns), code, message))
    return gone
