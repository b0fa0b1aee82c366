"""What a report remembers of every scan, in `pages.json`: what its page was made from, and the
histograms that the cohort's figures need.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.evaluate import load_output
from pipelines.prepare import load_prepared
from pipelines.report.charts import Histogram
from pipelines.report.source import Source
from sgcd_core.errors import SgcdError, StorageError
from sgcd_core.io.store import Store, join
from sgcd_core.metrics import masked_histogram

Row = dict[str, Any]

STATE = "pages.json"


@dataclass(frozen=True, eq=False)
class ScanPage:
    """What is remembered of a scan.

    Attributes:
        file: Name of its page in the report's folder; None for a scan without a page.
        digest: Of what the page was made from.
        before: Histogram inside the brain of the prepared scan, (bins,); None: not readable.
        after: The same of the output.
        has_truth: The same person's scan at the target is on the page.
        preview: Small pictures: before, after and (or None) truth, as `data:` addresses.
    """

    file: str | None
    digest: str
    before: Histogram | None = None
    after: Histogram | None = None
    has_truth: bool = False
    preview: dict[str, str | None] | None = None

    def to_json(self) -> Row:
        """For `pages.json`."""
        row = dataclasses.asdict(self)
        for name in ("before", "after"):
            if row[name] is not None:
                row[name] = [round(float(value), 6) for value in row[name]]
        return row

    @classmethod
    def from_json(cls, row: Row) -> ScanPage:
        """From `pages.json`."""
        arrays = {
            name: None if row[name] is None else np.asarray(row[name], np.float64)
            for name in ("before", "after")
        }
        return cls(**{**row, **arrays})


def page_file(scan_id: str) -> str:
    """Name of a scan's page."""
    return f"scan-{scan_id}.html"


def read_histograms(source: Source, row: Row) -> tuple[Histogram | None, Histogram | None]:
    """Histograms of a scan before and after, on the model grid; None where there is none.

    Raises:
        SgcdError: The scan is not prepared or cannot be read.
    """
    if source.config is None:
        return None, None
    prepared = load_prepared(source.lake, source.config.prepare.digest(), row["scan_id"])
    before = masked_histogram(prepared.image, prepared.mask)
    if not (row["result"] or {}).get("model_grid_uri"):
        return before, None
    output = load_output(row["result"], prepared.image.shape)
    return before, masked_histogram(output, prepared.mask)


def load_state(folder: str) -> dict[str, ScanPage]:
    """scan_id → what is remembered; empty for a new report. A page that is gone is forgotten."""
    try:
        found = json.loads(Store().read_bytes(join(folder, STATE), max_bytes=10**9))
        pages = {scan_id: ScanPage.from_json(row) for scan_id, row in found.items()}
    except StorageError:
        raise
    except (SgcdError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # none yet, or of another version: every page is written
    there = {item.uri.rpartition("/")[2] for item in Store().list(folder)}
    return {k: page for k, page in pages.items() if page.file is None or page.file in there}


def save_state(folder: str, pages: Mapping[str, ScanPage]) -> None:
    """Remember `pages`; all that was remembered before is replaced."""
    body = {scan_id: page.to_json() for scan_id, page in sorted(pages.items())}
    Store().write_bytes(join(folder, STATE), json.dumps(body, separators=(",", ":")).encode())
