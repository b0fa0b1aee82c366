"""What is left to do: the scans of the lake minus the results, with the reason for every skip.

Resuming a run is planning again; nothing else is remembered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.ledger import is_committed, model_key, open_attempts
from sgcd_core.errors import REPLACED, InputError

#: Failures that say nothing about the scan: planned again without being asked.
TRANSIENT_CODES = (
    "STORE-UNREACHABLE", "STORE-DENIED", "STORE-EXPIRED", "STORE-DIGEST", "STORE-WRITE",
    "SCAN-CHANGED", "SCAN-STRIP-ENDED", "CLUSTER",
)  # fmt: skip
FAILED_AT_INDEX = "failed at index"
#: What a result is named and made by: with another label its scan is planned again.
LABELS = ("subject", "session", "site", "sequence")
_ORDER = ("site", "sequence", "subject", "session", "scan_id")
_COLUMNS = (
    "scan_id", "dataset", "subject", "session", "site", "sequence", "split", "uri", "status",
    "code", "message", "indexed_at",
)  # fmt: skip
_OF_RESULTS = ("scan_id", *LABELS, "status", "code", "message", "output_sha256")


@dataclass(frozen=True)
class Plan:
    """Which scans to work on, and why not the others. Arrow throughout: a lake may be large.

    Attributes:
        scans: Every row of `scans`, with the columns that say where, whose and how it is.
        todo: Rows of `scans` to work on, ordered by site, sequence, subject, session, scan_id.
        skipped: Every other row of `scans` in the same order, with `reason`, and in `code` and
            `message` what the index or the earlier result says.
        relabelled: How many of `todo` have a result under labels that were corrected since.
    """

    scans: pa.Table
    todo: pa.Table
    skipped: pa.Table
    relabelled: int = 0

    def reasons(self) -> dict[str, int]:
        """How many scans are skipped for each reason, the commonest first."""
        counts = self.skipped["reason"].value_counts().to_pylist()
        found: Counter[str] = Counter({item["values"]: item["counts"] for item in counts})
        return dict(found.most_common())

    def sentence(self) -> str:
        """One line for a person."""
        text = f"{self.todo.num_rows} to do"
        if self.relabelled:
            text += f" ({self.relabelled} of them since labels were corrected)"
        if self.skipped.num_rows:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.reasons().items())
            text += f", {self.skipped.num_rows} skipped ({reasons})"
        return text


def plan(
    catalog: Catalog,
    model: str,
    version: int,
    *,
    sites: Collection[str] | None = None,
    sequences: Collection[str] | None = None,
    known: Collection[str] | None = None,
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
        sequences: Only these; None for all.
        known: Sequences that the model knows; None for any.
        split: Only this split; None for all.
        target: Leave the target site's own scans alone; None to include them.
        only_new: Skip every scan that has a result of any kind.
        retry_failed: Plan failed scans again, whatever the reason was.
        force: Plan done, failed and quarantined scans again.
        only: Only these scan_ids; None for all.

    Returns:
        todo and skipped together hold every row of `scans` once. A result whose subject, session,
        site or sequence is no longer its scan's settles nothing, nor does one whose outputs a later
        try, which no row tells of, may have written over.

    Raises:
        InputError: LAKE-EMPTY when nothing was indexed; TARGET-UNKNOWN for a site that no scan
            is from.
    """
    scans = catalog.rows("scans", columns=_COLUMNS)
    where = catalog.lake.uri
    if not scans.num_rows:
        raise InputError(
            "no scan was indexed yet.", code="LAKE-EMPTY", where=where,
            hint="Index some with `sgcd index SOURCE --lake LAKE`.",
        )  # fmt: skip
    there = sorted(site for site in scans["site"].unique().to_pylist() if site is not None)
    for site in sites or ():
        if site not in there:
            raise InputError(
                f"the lake has no site {site!r}; it has {', '.join(there) or 'none'}.",
                code="TARGET-UNKNOWN", where=where,
            )  # fmt: skip
    keys = pa.table({name: pc.fill_null(scans[name], "") for name in _ORDER})
    scans = scans.take(pc.sort_indices(keys, [(name, "ascending") for name in _ORDER]))
    rules = []
    if only is not None:
        asked = pc.is_in(scans["scan_id"], pa.array(sorted(only), pa.string()))
        rules.append(_Rule(pc.invert(asked), "not asked for"))
    rules += _at_index(scans, sites, sequences, known, split, target)
    results = catalog.rows(
        "results", where={"model": model, "model_version": version}, columns=_OF_RESULTS
    )
    # Where each scan's result lies; taking at a missing index gives a missing value.
    mine = results.take(pc.index_in(scans["scan_id"], results["scan_id"].combine_chunks()))
    relabelled = labels_differ(scans, mine)
    if not force:
        opened = None if only_new else _opened(catalog.lake, model_key(model, version), results)
        rules += _by_result(mine, relabelled, opened, retry_failed)
    none = pa.nulls(scans.num_rows, pa.string())
    reason, code, message = none, none, none
    for rule in reversed(rules):  # so that of several the first counts
        here = pc.fill_null(rule.mask, False)
        reason = pc.if_else(here, rule.reason, reason)
        code = pc.if_else(here, rule.code, code)
        message = pc.if_else(here, rule.message, message)
    todo = pc.is_null(reason)
    told = scans.drop_columns(["code", "message"])
    for name, values in (("reason", reason), ("code", code), ("message", message)):
        told = told.append_column(name, values)
    again = pc.sum(pc.and_(todo, relabelled)).as_py() or 0
    return Plan(scans, scans.filter(todo), told.filter(pc.invert(todo)), again)


def labels_differ(scans: pa.Table, results: pa.Table) -> pa.ChunkedArray:
    """Whether a label of each scan is another than in its result, row by row; False without one.

    Args:
        scans: Rows with the columns `LABELS`.
        results: As many, with these and `scan_id`; rows of scans without a result are missing.
    """
    same = [
        pc.equal(pc.fill_null(scans[name], ""), pc.fill_null(results[name], "")) for name in LABELS
    ]
    return pc.and_(results["scan_id"].is_valid(), pc.invert(reduce(pc.and_, same)))


def replaced_scans(catalog: Catalog) -> pa.Array:
    """scan_id of the scans whose file holds other bytes now."""
    scans = catalog.rows("scans", columns=("scan_id", "code"))
    return scans.filter(pc.field("code") == REPLACED)["scan_id"].combine_chunks()


def _opened(lake: Lake, key: str, results: pa.Table) -> pa.Array:
    """scan_id of the scans whose outputs a try that no row tells of may have written over."""
    tried = pa.array(sorted(open_attempts(lake, key)), pa.string())
    mine = results.filter(pc.is_in(results["scan_id"], tried))
    found = [row["scan_id"] for row in mine.select(["scan_id", "output_sha256"]).to_pylist()
             if not is_committed(lake, key, row["scan_id"], row["output_sha256"])]  # fmt: skip
    return pa.array(found, pa.string())


_NOTHING = pa.scalar(None, pa.string())


@dataclass(frozen=True)
class _Rule:
    """Scans to leave alone where `mask` holds; code and message are one for all or a column."""

    mask: Any
    reason: str
    code: Any = _NOTHING
    message: Any = _NOTHING


def _at_index(
    scans: pa.Table,
    sites: Collection[str] | None,
    sequences: Collection[str] | None,
    known: Collection[str] | None,
    split: str | None,
    target: str | None,
) -> list[_Rule]:
    """Why the scan itself is out of the question, if it is.

    What was not asked for comes before what cannot be used: a plan of some sites does not answer
    for the bad scans of others.
    """

    def none_of(name: str, wanted: Collection[str]) -> Any:
        return pc.invert(pc.is_in(scans[name], pa.array(sorted(wanted), pa.string())))

    def other_sequence(wanted: Collection[str]) -> _Rule:
        return _Rule(none_of("sequence", wanted), "other sequence", "SCAN-SEQUENCE")

    code, message = scans["code"], scans["message"]
    rules = [_Rule(pc.equal(code, REPLACED), "replaced since", code, message)]
    if sites is not None:
        rules.append(_Rule(none_of("site", sites), "other site"))
    if sequences is not None:
        rules.append(other_sequence(sequences))
    if split is not None:
        rules.append(_Rule(none_of("split", [split]), "other split"))
    rules.append(_Rule(pc.not_equal(scans["status"], "ok"), FAILED_AT_INDEX, code, message))
    if known is not None:
        rules.append(other_sequence(known))
    rules.append(_Rule(pc.is_null(scans["site"]), "no site", "SCAN-NO-SITE"))
    if target is not None:
        rules.append(_Rule(pc.equal(scans["site"], target), "at the target site"))
    return rules


def _by_result(
    results: pa.Table, relabelled: pa.ChunkedArray, opened: pa.Array | None, retry_failed: bool
) -> list[_Rule]:
    """Why an earlier result settles the scan, if it does.

    Args:
        results: Row by row the scans'.
        relabelled: As many.
        opened: scan_id of those with outputs that may be others'; None: only new ones are wanted.
        retry_failed: Whatever the reason was.
    """
    status, code, message = results["status"], results["code"], results["message"]
    done, failed = pc.is_in(status, pa.array(["ok", "flagged"])), pc.equal(status, "failed")
    if opened is not None:
        done = pc.and_(done, pc.invert(pc.is_in(results["scan_id"], opened)))
        again = pa.scalar(True) if retry_failed else pc.is_in(code, pa.array(TRANSIENT_CODES))
        failed = pc.and_(failed, pc.invert(pc.fill_null(again, False)))
    done, failed = (pc.and_(mask, pc.invert(relabelled)) for mask in (done, failed))
    return [
        _Rule(done, "done", code, message),
        _Rule(pc.equal(status, "quarantined"), "quarantined", code, message),
        _Rule(failed, "failed before", code, message),
    ]
