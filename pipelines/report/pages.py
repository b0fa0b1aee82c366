"""The pages of the scans: written beside the cohort's page, each once, and again when it changes.

So a report of thousands of scans costs only what is new.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Literal

from pipelines.report.render import digest_of
from pipelines.report.scan import note_unread, write_scan_page
from pipelines.report.source import WAITING, Source
from pipelines.report.state import ScanPage, load_state, read_histograms, save_state
from sgcd_core.errors import SgcdError

Row = dict[str, Any]
#: Which scans get a page: all, those that did not end well, or none.
Which = Literal["all", "flagged", "none"]

#: Without their pages, scans read for the histograms, by site and sequence.
HISTOGRAM_SCANS = 8
#: Scans of each site and sequence whose small pictures are kept for the cohort's page.
PREVIEWS = 2
_SAVE_EVERY = 100


def write_pages(
    source: Source,
    folder: str,
    which: Which = "all",
    *,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, ScanPage], int]:
    """Write the pages that are new or changed; scan_id → page, and how many were written.

    Args:
        source: The tables.
        folder: The report's folder.
        which: Which scans get a page.
        workers: Scans read at once.
        progress: Called with (pages done, pages to do).

    Raises:
        StorageError: A page cannot be written.
    """
    rows = source.scan_rows()
    paged = [r for r in rows if which == "all" or (which == "flagged" and _is_odd(r))]
    if which == "none":
        paged = []
    known = load_state(folder)
    previews = _preview_ids(source, rows)
    pages: dict[str, ScanPage] = {}
    todo: list[tuple[Row, Row | None, Row | None, str]] = []
    for index, row in enumerate(paged):
        before = paged[index - 1] if index else None
        after = paged[index + 1] if index + 1 < len(paged) else None
        wanted = row["scan_id"] in previews
        digest = digest_of(_inputs(source, row, before, after) | {"preview": wanted})
        have = known.get(row["scan_id"])
        if have is not None and have.file is not None and have.digest == digest:
            pages[row["scan_id"]] = have
        else:
            todo.append((row, before, after, digest))

    def make(job: tuple[Row, Row | None, Row | None, str]) -> tuple[str, ScanPage]:
        row, before, after, digest = job
        keep = row["scan_id"] in previews
        return row["scan_id"], write_scan_page(source, folder, row, before, after, digest, keep)

    for number, (scan_id, page) in enumerate(_parallel(make, todo, workers), 1):
        pages[scan_id] = page
        if progress is not None:
            progress(number, len(todo))
        if number % _SAVE_EVERY == 0:
            save_state(folder, known | pages)
    pages |= some_histograms(source, pages, known)
    save_state(folder, pages)
    return pages, len(todo)


def _is_odd(row: Row) -> bool:
    return row["status"] in ("flagged", "failed", "quarantined")


def _inputs(source: Source, row: Row, before: Row | None, after: Row | None) -> Row:
    """All that a page shows, but for the voxels, which their digests stand for."""
    truth = None
    if row["scan"] is not None and row["result"] is not None:
        truth = source.truths.of(row["scan"])
    mine = [
        [m["method"], m["metric"], m["region"], m["value"]]
        for m in source.metrics_of(row["scan_id"])
    ]
    config = source.config
    return {
        "row": row, "metrics": sorted(mine, key=str), "truth": truth and truth["scan_id"],
        "neighbours": [x and (x["scan_id"], x["status"]) for x in (before, after)],
        "model": [source.model, source.version],
        "guard": config and config.guard.model_dump(), "recipe": config and config.prepare.digest(),
    }  # fmt: skip


def _preview_ids(source: Source, rows: Sequence[Row]) -> set[str]:
    """Scans for the examples: a few of each site and sequence, those with a truth first."""
    shown = [
        row for row in rows
        if row["result"] is not None and row["result"]["output_uri"] and row["scan"] is not None
        and row["site"] is not None and row["site"] != source.target
    ]  # fmt: skip
    truths = {r["scan_id"] for r in shown if source.truths.of(r["scan"])}
    taken: Counter[tuple[str, str]] = Counter()
    out = set()
    for row in sorted(shown, key=lambda r: r["scan_id"] not in truths):
        key = (row["site"], row["sequence"])
        if taken[key] < PREVIEWS:
            taken[key] += 1
            out.add(row["scan_id"])
    return out


def some_histograms(
    source: Source,
    pages: Mapping[str, ScanPage] | None = None,
    known: Mapping[str, ScanPage] | None = None,
) -> dict[str, ScanPage]:
    """Histograms of a bounded number of scans of each site and sequence, for the cohort's figures.

    Args:
        source: The tables.
        pages: Scans that have a page, and with it their histograms.
        known: What an earlier report remembers, so that it is not read again.
    """
    pages, known = pages or {}, known or {}
    rows = {row["scan_id"]: row for row in source.scan_rows()}
    asked = histogram_scans(rows.values()) - pages.keys()
    return {scan_id: _histograms_only(source, rows[scan_id], known) for scan_id in asked}


def counted_scans(source: Source, pages: Mapping[str, ScanPage]) -> set[str]:
    """Scans whose histograms stand for their sites: all that have a page, unless only some do.

    Those that are flagged would tell of themselves only.
    """
    rows = source.scan_rows()
    paged = {row["scan_id"] for row in rows if (p := pages.get(row["scan_id"])) and p.file}
    return paged if len(paged) == len(rows) else histogram_scans(rows)


def histogram_scans(rows: Iterable[Row]) -> set[str]:
    """A bounded number of scans of each site and sequence that can be read."""
    taken: Counter[tuple[str, str]] = Counter()
    found = set()
    for row in rows:
        key = (row["site"], row["sequence"])
        usable = row["site"] is not None and row["status"] in ("ok", "flagged", WAITING)
        if usable and taken[key] < HISTOGRAM_SCANS:
            taken[key] += 1
            found.add(row["scan_id"])
    return found


def _histograms_only(source: Source, row: Row, known: Mapping[str, ScanPage]) -> ScanPage:
    digest = digest_of({"sha256": (row["result"] or {}).get("output_sha256")})
    have = known.get(row["scan_id"])
    # what could not be read is tried again
    if have and have.file is None and have.digest == digest and have.before is not None:
        return have
    try:
        before, after = read_histograms(source, row)
    except SgcdError as error:
        note_unread(row["scan_id"], error.code)
        before = after = None
    return ScanPage(None, digest, before, after)


def _parallel(
    make: Callable[[Any], tuple[str, ScanPage]], jobs: Sequence[Any], workers: int
) -> Iterator[tuple[str, ScanPage]]:
    """Results as they come; never more than a few jobs ahead, so that volumes do not pile up."""
    waiting = iter(jobs)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        running: set[Future[tuple[str, ScanPage]]] = set()
        while True:
            for job in waiting:
                running.add(pool.submit(make, job))
                if len(running) > max(1, workers):
                    break
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
