"""Which scans a source lists, before any is read: BIDS trees, prefixes of BIDS names, CSV files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.bids_links import folder_name
from sgcd_core.errors import InputError, UsageError
from sgcd_core.io.bids import BidsScan, BidsTree, Sidecars, list_tree
from sgcd_core.io.bids_tables import (
    People,
    Person,
    Unread,
    cell,
    parse_age,
    parse_sex,
    parse_split,
    read_table,
)
from sgcd_core.io.store import ObjectInfo, Store, is_s3, join, local_path
from sgcd_core.words import counted

SITE_SOURCES = ("auto", "participants", "session", "sidecar", "column")
#: Before the name of the one site that all scans are from.
ONE_SITE = "name:"
_REQUIRED = ("uri", "subject", "sequence", "site")
_OPTIONAL = ("session", "age", "sex", "split", "dataset")


@dataclass(frozen=True)
class Listed:
    """One scan that a source lists, with all that is known without reading it.

    Attributes:
        object: Address, size and etag; the etag is empty when it is unknown yet.
        facts: Columns of the `scans` table that the source gives.
        root: Data set or manifest whose `dataset_name` is `dataset`, unless another has that name
            too; empty where a manifest gives `dataset` itself.
    """

    object: ObjectInfo
    facts: Mapping[str, Any]
    root: str = ""


def absolute(source: str) -> str:
    """The address as any worker can use it: local paths absolute, no trailing slash."""
    return join(source) if is_s3(source) else os.path.abspath(local_path(source))


def is_manifest(address: str) -> bool:
    """Whether a source is a manifest, by its address."""
    return address.lower().endswith((".csv", ".tsv"))


def dataset_name(root: str) -> str:
    """What a data set is called by the address of its root or manifest."""
    name = folder_name(root)
    return name.rpartition(".")[0] if is_manifest(root) else name


def list_source(
    source: str, *, site_from: str, sequences: Sequence[str], store: Store
) -> tuple[list[Listed], list[str]]:
    """The scans of one source, sorted as listed, and notes about what was left out.

    Args:
        source: A folder, prefix or file; an address that ends in .csv or .tsv is a manifest.
        site_from: One of `SITE_SOURCES`, or `name:SITE` for a data set of one site that says it
            nowhere. auto: sessions.tsv, which knows a traveling subject's
            site, else participants.tsv; in a manifest the column `site`.
        sequences: BIDS suffixes that are wanted.
        store: Where the sources lie.

    Raises:
        UsageError: `site_from` is not known.
        InputError: STORE-EMPTY when nothing lies there, MANIFEST-COLUMN, BIDS-INVALID,
            or SCAN-MISSING for an absent manifest.
        StorageError: As for `Store.list`.
    """
    if site_from not in SITE_SOURCES and not site_from.removeprefix(ONE_SITE).strip():
        raise UsageError("--site-from name: names no site.")
    if site_from not in SITE_SOURCES and not site_from.startswith(ONE_SITE):
        raise UsageError(
            f"--site-from is {site_from!r}, expected one of {', '.join(SITE_SOURCES)}, or "
            f"{ONE_SITE}SITE."
        )
    address = absolute(source)
    if is_manifest(address):
        return _with_splits(*_from_table(address, store), address)
    if site_from == "column":
        raise UsageError("--site-from column needs a CSV manifest as the source.")
    tree = list_tree(address, store, sequences)
    if not tree.scans:
        if not store.has_any(address):
            raise InputError(
                "nothing lies under this address.", code="STORE-EMPTY", where=source,
                hint="Check the spelling, and that its disk is mounted.",
            )  # fmt: skip
        raise InputError(
            f"no {' or '.join(sequences)} scan with a BIDS name lies here.",
            code="STORE-EMPTY", where=source,
            hint="Check the spelling; names look like sub-01/anat/sub-01_T1w.nii.gz. Other names "
            "can be listed in a CSV manifest.",
        )  # fmt: skip
    return _with_splits(*_from_tree(tree, site_from, store), address)


def _with_splits(
    listed: list[Listed], notes: list[str], address: str
) -> tuple[list[Listed], list[str]]:
    """What is given, with a note about subjects with scans of several splits, if there are any."""
    splits: dict[tuple[Any, ...], set[str | None]] = {}
    for one in listed:
        if one.facts["subject"] is not None:
            who = one.root, one.facts["dataset"], one.facts["subject"]
            splits.setdefault(who, set()).add(one.facts["split"])
    mixed = sum("test" in found and len(found) > 1 for found in splits.values())
    if mixed:
        notes = [
            *notes,
            f"{address}: {counted(mixed, 'subject')} with scans of several splits: not scored. "
            "Write test for all scans of a subject or for none; an empty cell counts as train",
        ]
    return listed, notes


def _site(person: Person, sidecar: Mapping[str, Any], site_from: str) -> str | None:
    if site_from.startswith(ONE_SITE):
        return site_from.removeprefix(ONE_SITE).strip()
    if site_from == "participants":
        return person.site
    if site_from == "session":
        return person.session_site
    if site_from == "sidecar":
        return _text(sidecar, "InstitutionName")
    return person.session_site or person.site


def _text(sidecar: Mapping[str, Any], key: str) -> str | None:
    value = sidecar.get(key)
    return value.strip() or None if isinstance(value, str) else None


def _field_strength(sidecar: Mapping[str, Any]) -> float | None:
    value = sidecar.get("MagneticFieldStrength")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 20:
        return None
    return float(value)


def _from_tree(tree: BidsTree, site_from: str, store: Store) -> tuple[list[Listed], list[str]]:
    sidecars = Sidecars(tree, store)
    roots = {scan.root for scan in tree.scans}
    people = {root: People(root, tree.tables, store, tree.listed) for root in roots}
    listed = [
        Listed(scan.object, _facts(scan, people[scan.root], sidecars, site_from), scan.root)
        for scan in tree.scans
    ]
    notes = [*tree.notes, *sidecars.notes]
    for root in sorted(people):
        notes += people[root].notes
    return listed, notes


def _facts(scan: BidsScan, people: People, sidecars: Sidecars, site_from: str) -> dict[str, Any]:
    assert scan.name.subject is not None  # list_tree takes images with a subject only
    person = people.of(scan.name.subject, scan.name.session)
    sidecar, sidecar_uri = sidecars.of(scan)
    return {
        "dataset": dataset_name(scan.root),
        "subject": scan.name.subject,
        "session": scan.name.session,
        "site": _site(person, sidecar, site_from),
        "sequence": scan.name.suffix,
        "age": person.age,
        "sex": person.sex,
        "split": person.split,
        "field_strength": _field_strength(sidecar),
        "manufacturer": _text(sidecar, "Manufacturer"),
        "model_name": _text(sidecar, "ManufacturersModelName"),
        "sidecar_uri": sidecar_uri,
        "listed_in": scan.root,
    }


def _from_table(address: str, store: Store) -> tuple[list[Listed], list[str]]:
    delimiter = "\t" if address.lower().endswith(".tsv") else ","
    rows = read_table(address, store, delimiter=delimiter)
    if delimiter == "," and rows and len(rows[0]) == 1 and ";" in next(iter(rows[0])):
        rows = read_table(address, store, delimiter=";")  # as spreadsheets write it in Europe
    if not rows:
        raise InputError("the manifest lists no scan.", code="STORE-EMPTY", where=address)
    missing = [name for name in _REQUIRED if name not in rows[0]]
    if missing:
        raise InputError(
            f"lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}.",
            code="MANIFEST-COLUMN", where=address,
            hint=f"Required: {', '.join(_REQUIRED)}; optional: {', '.join(_OPTIONAL)}.",
        )  # fmt: skip
    nowhere = [number for number, row in enumerate(rows, 2) if not row["uri"].strip()]
    if nowhere:
        raise InputError(
            f"names no address in {len(nowhere)} of its rows, the first being line {nowhere[0]}.",
            code="MANIFEST-COLUMN", where=address, hint="Fill in the column uri.",
        )  # fmt: skip
    folder = address.rpartition("/")[0] or "/"
    listed = [_listed(row, folder, address) for row in rows]
    again = len(listed) - len({one.object.uri for one in listed})
    extra = len(set(rows[0]) - {*_REQUIRED, *_OPTIONAL})
    notes = [f"{address}: {counted(extra, 'other column')} not used"] if extra else []
    unread = Unread()
    unread.look(rows, address)
    notes += unread.notes
    if again:
        notes.append(
            f"{address}: {counted(again, 'row')} of a file that a row before names; left out"
        )
    return listed, notes


def _listed(row: Mapping[str, str], folder: str, manifest: str) -> Listed:
    uri = row["uri"].strip()
    if "://" not in uri and not uri.startswith("/"):
        uri = join(folder, uri)
    elif not is_s3(uri) and uri.startswith(("/", "file:")):
        uri = local_path(uri)
    subject, session = cell(row, "subject"), cell(row, "session")
    dataset = cell(row, "dataset")
    facts = {
        "dataset": dataset or dataset_name(manifest),
        "subject": subject.removeprefix("sub-") if subject else None,
        "session": session.removeprefix("ses-") if session else None,
        "site": cell(row, "site"),
        "sequence": cell(row, "sequence"),
        "age": parse_age(cell(row, "age")),
        "sex": parse_sex(cell(row, "sex")),
        "split": parse_split(cell(row, "split")),
        "field_strength": None, "manufacturer": None, "model_name": None, "sidecar_uri": None,
        "listed_in": manifest,
    }  # fmt: skip
    return Listed(ObjectInfo(uri, 0, ""), facts, "" if dataset else manifest)
