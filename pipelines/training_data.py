"""Which prepared scans a model learns from, and in which order it sees them.

Both are decided by the settings and the catalog alone, so that any number of workers, a retry and
a resumed run all see the same scans at the same step.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from sgcd_core.errors import InputError
from sgcd_core.io.store import Store

#: Written last, so its presence says that a scan's preparation is complete.
COMPLETE = "geometry.json"


def prepared_ids(lake: Lake, recipe: str) -> set[str]:
    """scan_id of every scan whose preparation under `recipe` (all of them: "") is complete."""
    return {scan_id for scan_id, _ in _complete(lake, recipe)}


def forget_prepared(lake: Lake, scan_ids: Collection[str]) -> None:
    """Let these scans be prepared anew, under every recipe."""
    if not scan_ids:
        return
    for uri in [uri for scan_id, uri in _complete(lake, "") if scan_id in scan_ids]:
        Store().delete(uri)


def _complete(lake: Lake, recipe: str) -> Iterator[tuple[str, str]]:
    """scan_id and address of what says that a preparation is complete."""
    for item in Store().list(lake.prepared(recipe) + "/"):
        folder, _, name = item.uri.rpartition("/")
        if name == COMPLETE:
            yield folder.rpartition("/")[2], item.uri


def training_rows(
    catalog: Catalog,
    recipe: str,
    *,
    sequences: Collection[str],
    sites: Collection[str] | None = None,
    exclude_sites: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Rows of `scans` to learn from: usable, prepared under `recipe`, never of the test split.

    Raises:
        InputError: LAKE-EMPTY when none is left; TARGET-UNKNOWN for a site the lake has not.
    """
    scans: list[dict[str, Any]] = catalog.rows("scans").to_pylist()
    check_sites([*(sites or ()), *exclude_sites], scans, catalog.lake.uri)
    ready = prepared_ids(catalog.lake, recipe)
    free = [
        scan
        for scan in scans
        if scan["status"] == "ok"
        and scan["split"] != "test"
        and scan["site"] is not None
        and scan["scan_id"] in ready
    ]
    if not free:
        raise InputError(
            f"none of its {len(scans)} scans is prepared and free to learn from.",
            code="LAKE-EMPTY", where=catalog.lake.uri,
            hint="Run `sgcd prepare --lake LAKE` with the same settings first; scans of the split "
            "test are never learned from.",
        )  # fmt: skip
    chosen = set({scan["site"] for scan in free} if sites is None else sites) - set(exclude_sites)
    rows = [scan for scan in free if scan["site"] in chosen and scan["sequence"] in sequences]
    if not rows:
        named = ", ".join(sorted(chosen)) or "none"
        raise InputError(
            f"no prepared scan is of the sites ({named}) and sequences ({', '.join(sequences)}) "
            "asked for.",
            code="LAKE-EMPTY", where=catalog.lake.uri,
            hint="Ask for other sites or sequences, or prepare them.",
        )  # fmt: skip
    return sorted(rows, key=lambda row: row["scan_id"])


def described(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a model card says of the scans it was trained on: numbers only, nothing of one person.

    Returns:
        subjects; ages (whole years, youngest and oldest, None when none is known); site_scans
        (site → sequence → number of scans).
    """
    ages = [row["age"] for row in rows if row.get("age") is not None]
    counts: dict[str, dict[str, int]] = {}
    for row in sorted(rows, key=lambda row: (row["site"], row["sequence"])):
        at_site = counts.setdefault(row["site"], {})
        at_site[row["sequence"]] = at_site.get(row["sequence"], 0) + 1
    # a scan without a subject stands for itself, as in the names of outputs
    people = {(row.get("dataset"), row.get("subject") or row["scan_id"]) for row in rows}
    return {
        "subjects": len(people),
        "ages": [int(min(ages)), int(max(ages))] if ages else None,
        "site_scans": counts,
    }


def check_sites(names: Collection[str], scans: Sequence[dict[str, Any]], where: str) -> None:
    """Refuse a site no scan is from.

    Raises:
        InputError: TARGET-UNKNOWN, listing the sites there are.
    """
    known = sorted({s["site"] for s in scans if s["site"] is not None})
    for name in names:
        if name not in known:
            raise InputError(
                f"the lake has no site {name!r}; it has {', '.join(known) or 'none'}.",
                code="TARGET-UNKNOWN", where=where,
            )  # fmt: skip


def check_sequences(names: Collection[str], known: Collection[str]) -> list[str]:
    """`names`, in the model's order.

    Raises:
        InputError: SCAN-SEQUENCE for one that is none of the model's.
    """
    for name in names:
        if name not in known:
            raise InputError(
                f"the model knows {', '.join(known)}, not {name!r}.", code="SCAN-SEQUENCE"
            )
    return [name for name in known if name in names]


def check_target(
    target: str, rows: Sequence[dict[str, Any]], sequences: Collection[str], where: str
) -> None:
    """Refuse a target that lacks a sequence that is to be harmonized, before any training.

    Args:
        target: Site the model is tuned to.
        rows: Rows of `training_rows`.
        sequences: Sequences that are to be harmonized.
        where: The lake, for the message.

    Raises:
        InputError: TARGET-SEQUENCE.
    """
    have = {row["sequence"] for row in rows if row["site"] == target}
    others = {row["sequence"] for row in rows if row["site"] != target}
    lacking = [name for name in sequences if name not in have and (name in others or not have)]
    if lacking:
        also = f", or tune to what it has (--sequences {' '.join(sorted(have))})" if have else ""
        raise InputError(
            f"site {target!r} has no prepared training scan of {' or '.join(lacking)}.",
            code="TARGET-SEQUENCE", where=where,
            hint=f"Choose another target (`sgcd suggest-target`){also}.",
        )  # fmt: skip


def data_digest(rows: Sequence[dict[str, Any]]) -> str:
    """First 16 hex digits of the SHA-256 over the sorted scan_ids, sites and sequences."""
    lines = sorted(f"{row['scan_id']} {row['site']} {row['sequence']}" for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def balanced_order(
    rows: Sequence[dict[str, Any]], count: int, seed: int, *, site_balance: bool = True
) -> list[dict[str, Any]]:
    """`count` rows in a seeded order.

    Args:
        rows: What to draw from.
        count: Length of the answer; rows repeat when it is longer.
        seed: Of the order.
        site_balance: Every site and sequence comes equally often; without, every row does.

    Returns:
        Rows such that within a group each is seen once before any is seen again.
    """
    rng = np.random.default_rng(seed)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: str(row["scan_id"])):
        key = (row["site"] or "", row["sequence"] or "") if site_balance else ("", "")
        groups[key].append(row)
    queues: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in groups}
    out: list[dict[str, Any]] = []
    while len(out) < count:
        keys = sorted(groups)
        for index in rng.permutation(len(keys)):
            key = keys[index]
            if not queues[key]:
                queues[key] = [groups[key][i] for i in rng.permutation(len(groups[key]))]
            out.append(queues[key].pop())
    return out[:count]
