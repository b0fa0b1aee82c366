"""Writing a report: the pages of the scans, then the page about all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.lake import Lake
from pipelines.report.cohort import cohort_content
from pipelines.report.pages import Which, write_pages
from pipelines.report.render import render
from pipelines.report.source import load_source
from sgcd_core.io.store import Store, join

INDEX = "index.html"


@dataclass(frozen=True)
class Written:
    """What a report came to.

    Attributes:
        uri: Address of the cohort's page.
        scans: Scans on it.
        pages: Scans that have a page.
        new: Pages written this time; the others had not changed.
    """

    uri: str
    scans: int
    pages: int
    new: int


def report_name(model: str | None, version: int | None) -> str:
    """Name of a report's folder in the lake."""
    return "no-model" if model is None else f"{model}-v{version}"


def write_report(
    lake: Lake,
    model: str | None,
    version: int | None,
    *,
    out: str | None = None,
    pages: Which = "all",
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the report of one version of one model, whatever became of it.

    Args:
        lake: Where tables and volumes lie.
        model: Name in the registry; None when there is none yet: the page says what there is.
        version: Version in the registry.
        out: Folder of the report; default `reports/MODEL-vVERSION` in the lake.
        pages: Which scans get a page of their own.
        workers: Scans read at once.
        progress: Called with (pages written, pages to write).

    Raises:
        StorageError: A page cannot be written.
    """
    folder = out or lake.report(report_name(model, version))
    source = load_source(lake, model, version)
    known, new = write_pages(source, folder, pages, workers=workers, progress=progress)
    page = render("cohort.html", "cohort.js", **cohort_content(source, known))
    uri = join(folder, INDEX)
    Store().write_bytes(uri, page)
    with_page = sum(found.file is not None for found in known.values())
    return Written(uri, len(source.scan_rows()), with_page, new)
