"""What is left to do: the scans of the lake minus the results, with the reason for every skip.

Resuming a run is planning again; nothing else is remembered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from pipelines.catalog import Catalog
from sgcd_core.errors import InputError

#: Failures that say nothing about the scan: planned again without being asked.
TRANSIENT_CODES = frozenset({
    "STORE-UNREACHABLE", "STORE-DENIED", "STORE-EXPIRED", "STORE-DIGEST", "STORE-WRITE",
    "SCAN-CHANGED", "CLUSTER",
})  # fmt: skip


@dataclass(frozen=True)
class Skip:
    """A scan that is left alone, and why."""

    scan_id: str
    uri: str
    site: str | None
    sequence: str | None
    reason: str
    code: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class Plan:
    """Rows of `scans` to work on, and all others with the reason.

    Attributes:
        todo: Rows of `scans`, ordered by site, sequence, subject, session, scan_id.
        skipped: Every other row of `scans`.
    """

    todo: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)

    def reasons(self) -> dict[str, int]:
        """How many scans are skipped for each reason, the commonest first."""
        return dict(Counter(skip.reason for skip in self.skipped).most_common())

    def sentence(self) -> str:
        """One line for a person."""
        text = f"{len(self.todo)} to do"
        if self.skipped:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.reasons().items())
            text += f", {len(self.skipped)} skipped ({reasons})"
        return text


def plan(
    catalog: Catalog,
    model: str,
    version: int,
    *,
    sites: Collection[str] | None = None,
    sequences: Collection[str] | None = None,
    split: str | None = None,
    target: str | None = None,
    only_new: bool = False,
    retry_failed: bool = False,
    force: bool = False,
    only: Collection[str] | None = None,
) -> Plan:
    """Which scans one version of one model still has to harmonize.

    Args:
        catalog: The lake's tables.
        model: Name in the registry.
        version: Version in the registry.
        sites: Only these; None for all.
        sequences: Only these (those the model knows); None for all.
        split: Only this split; None for all.
        target: Leave the target site's own scans alone; None to include them.
        only_new: Skip every scan that has a result of any kind.
        retry_failed: Plan failed scans again, whatever the reason was.
        force: Plan done, failed and quarantined scans again.
        only: Only these scan_ids; None for all.

    Returns:
        todo and skipped together hold every row of `scans` once.

    Raises:
        InputError: LAKE-EMPTY when nothing was indexed; TARGET-UNKNOWN for a site that no scan
            is from.
    """
    scans: list[dict[str, Any]] = catalog.rows("scans").to_pylist()
    where = catalog.lake.uri
    if not scans:
        raise InputError(
            "no scan was indexed yet.", code="LAKE-EMPTY", where=where,
            hint="Index some with `sgcd index SOURCE --lake LAKE`.",
        )  # fmt: skip
    known = sorted({s["site"] for s in scans if s["site"] is not None})
    for site in sites or ():
        if site not in known:
            raise InputError(
                f"the lake has no site {site!r}; it has {', '.join(known) or 'none'}.",
                code="TARGET-UNKNOWN", where=where,
            )  # fmt: skip
    results = {
        row["scan_id"]: row
        for row in catalog.rows(
            "results", where={"model": model, "model_version": version}
        ).to_pylist()
    }
    done = Plan()
    for scan in sorted(scans, key=_order):
        skip: _Reason | None = None
        if only is not None and scan["scan_id"] not in only:
            skip = "not asked for", None, None
        skip = skip or _at_index(scan, sites, sequences, split, target)
        if skip is None and not force:
            skip = _by_result(results.get(scan["scan_id"]), only_new, retry_failed)
        if skip is None:
            done.todo.append(scan)
        else:
            reason, code, message = skip
            done.skipped.append(
                Skip(
                    scan["scan_id"], scan["uri"], scan["site"], scan["sequence"],
                    reason, code, message,
                )
            )  # fmt: skip
    return done


_Reason = tuple[str, str | None, str | None]


def _at_index(
    scan: dict[str, Any],
    sites: Collection[str] | None,
    sequences: Collection[str] | None,
    split: str | None,
    target: str | None,
) -> _Reason | None:
    """Why the scan itself is out of the question, if it is."""
    if scan["status"] != "ok":
        return "failed at index", scan["code"], scan["message"]
    if sites is not None and scan["site"] not in sites:
        return "other site", None, None
    if sequences is not None and scan["sequence"] not in sequences:
        return "other sequence", "SCAN-SEQUENCE", None
    if split is not None and scan["split"] != split:
        return "other split", None, None
    if scan["site"] is None:
        return "no site", "SCAN-NO-SITE", None
    if target is not None and scan["site"] == target:
        return "at the target site", None, None
    return None


def _by_result(result: dict[str, Any] | None, only_new: bool, retry_failed: bool) -> _Reason | None:
    """Why an earlier result settles the scan, if it does."""
    if result is None:
        return None
    status, code, message = result["status"], result["code"], result["message"]
    if status in ("ok", "flagged"):
        return "done", code, message
    if status == "quarantined":
        return "quarantined", code, message
    if not only_new and (retry_failed or code in TRANSIENT_CODES):
        return None
    return "failed before", code, message


def _order(scan: dict[str, Any]) -> tuple[str, ...]:
    names = ("site", "sequence", "subject", "session", "scan_id")
    return tuple(scan[name] or "" for name in names)
