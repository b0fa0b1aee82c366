"""What the page of a scan shows: pictures, what may have gone wrong, and where it came from."""

from __future__ import annotations

import logging
import math
import shlex
from typing import Any

from pipelines.pair import load_pair, load_pair_truth
from pipelines.report import charts
from pipelines.report.pictures import (
    CHANGE_COLOURS,
    CHANGE_LIMIT,
    PLANES,
    UNCERTAINTY_COLOURS,
    UNCERTAINTY_LIMIT,
    Cut,
    draw,
    magnitude,
    signed,
)
from pipelines.report.render import render
from pipelines.report.source import Source
from pipelines.report.state import ScanPage, page_file, read_histograms
from pipelines.verdict import METHOD_TITLES, number
from sgcd_core.config import GuardConfig
from sgcd_core.errors import CODES, SgcdError, StorageError
from sgcd_core.io.store import Store, join
from sgcd_core.metrics import MEASURES

log = logging.getLogger(__name__)

Row = dict[str, Any]


def write_scan_page(
    source: Source,
    folder: str,
    row: Row,
    before: Row | None,
    after: Row | None,
    digest: str,
    keep_preview: bool,
) -> ScanPage:
    """Write the page of one scan; a scan that cannot be read gets a page that says so.

    Args:
        source: The tables.
        folder: The report's folder.
        row: One of `source.scan_rows()`.
        before: The row of the previous page.
        after: The row of the next page.
        digest: Of what goes into the page.
        keep_preview: Return small pictures too.

    Raises:
        StorageError: The page cannot be written.
    """
    pictures = scan_pictures(source, row)
    try:
        histograms = read_histograms(source, row)
    except SgcdError as error:
        histograms = (None, None)
        if pictures["before"] or isinstance(error, StorageError):  # else it is not prepared
            digest = ""
    content = scan_content(source, row, histograms)
    content["previous"] = before and page_file(before["scan_id"])
    content["next"] = after and page_file(after["scan_id"])
    page = render("scan.html", "scan.js", **content, **pictures)
    file = page_file(row["scan_id"])
    Store().write_bytes(join(folder, file), page)
    preview = None
    if keep_preview and pictures["after"]:
        names = ("before", "after", "truth")
        preview = {name: (pictures[name] or {}).get("axial") for name in names}
    if pictures["unreadable"]:
        digest = ""  # so that the next report tries again
    return ScanPage(file, digest, *histograms, has_truth=bool(pictures["truth"]), preview=preview)


def scan_pictures(source: Source, row: Row) -> Row:
    """Three planes each of before, after, truth, change and uncertainty; None where there is none.

    Also `unreadable` (why there is no picture, or None), `intact`, and the colour scales.
    """
    out: Row = dict.fromkeys(("before", "after", "truth", "change", "uncertainty"))
    out |= {
        "planes": PLANES, "unreadable": None, "intact": None, "sizes": {},
        "change_limit": CHANGE_LIMIT, "change_stops": ", ".join(CHANGE_COLOURS),
        "uncertainty_limit": UNCERTAINTY_LIMIT,
        "uncertainty_stops": ", ".join(UNCERTAINTY_COLOURS),
    }  # fmt: skip
    scan, config = row["scan"], source.config
    if scan is None or config is None or scan["status"] != "ok":
        out["unreadable"] = "" if scan is None or config else "The settings are not known."
        return out
    try:
        pair = load_pair(source.lake, config.prepare, scan, row["result"])
        cut = Cut.through(pair.mask, pair.placement.affine)
        out["sizes"] = {name: cut.size(name) for name in PLANES}
        out["before"] = draw(cut, pair.before)
        out["intact"] = pair.intact
        if pair.after is not None and pair.change is not None:
            out["after"], out["change"] = draw(cut, pair.after), draw(cut, pair.change, signed)
            truth = load_pair_truth(
                source.lake, config.prepare, scan, source.scans, source.target, pair.prepared
            )
            out["truth"] = None if truth is None else draw(cut, truth)
        if pair.uncertainty is not None:
            out["uncertainty"] = draw(cut, pair.uncertainty, magnitude)
    except SgcdError as error:
        # The page of a scan that cannot be read must not end the report of the others.
        note_unread(row["scan_id"], error.code)
        out["unreadable"] = str(error)
    return out


def note_unread(scan_id: str, code: str) -> None:
    """Log that a page has no volumes; that a scan is not prepared yet is no trouble."""
    level = logging.INFO if code == "SCAN-MISSING" else logging.WARNING
    log.log(level, "report=unread scan=%s code=%s", scan_id, code)


def scan_content(
    source: Source,
    row: Row,
    histograms: tuple[charts.Histogram | None, charts.Histogram | None] = (None, None),
) -> Row:
    """Values of the template `scan.html` but for pictures and neighbours."""
    result = row["result"] or {}
    svg = None
    if histograms[0] is not None:
        label = "Intensities inside the brain before and after harmonization"
        svg = charts.histogram_panel(label, histograms[0], histograms[1], None)
    return {
        "title": _name(row), "row": row, "model": source.title, "target": source.target,
        "meaning": CODES.get(row["code"] or "", ""), "histogram": svg,
        "after_drawn": histograms[1] is not None,
        "guards": _guards(result, source.config.guard if source.config else GuardConfig()),
        "measures": _measures(source, row["scan_id"]),
        "facts": [(name, value) for name, value in _provenance(row) if value not in (None, "")],
        "serve": f"sgcd serve --lake {shlex.quote(source.lake.uri)}",
    }  # fmt: skip


def _name(row: Row) -> str:
    parts = [f"sub-{row['subject']}" if row["subject"] else row["scan_id"][:12]]
    if row["session"]:
        parts.append(f"ses-{row['session']}")
    return " ".join([*parts, row["sequence"] or ""]).strip()


def _guards(result: Row, limits: GuardConfig) -> list[Row]:
    """The scores that decide on a flag, each with its limit on a scale."""
    scores = (
        ("gradient_correlation", "Edges kept", limits.min_gradient_correlation, 1.0, True,
         "correlation of the gradients before and after; 1: every edge stayed"),
        ("local_correlation", "Edges kept everywhere", limits.min_local_correlation, 1.0, True,
         "the same in the cube of 24 mm where it is lowest; 1: every edge stayed"),
        ("volume_drift", "Tissue volumes", limits.max_volume_drift, 2 * limits.max_volume_drift,
         False, "largest relative change of a tissue's volume; 0: none changed"),
        ("outlier_score", "Unlike the training scans", limits.max_outlier_score,
         2 * limits.max_outlier_score, False, "distance to them, in typical distances"),
    )  # fmt: skip
    out: list[Row] = []
    for name, title, limit, top, at_least, meaning in scores:
        value = result.get(name)
        if value is None or not math.isfinite(value):
            continue
        side = "flagged below" if at_least else "flagged above"
        label = f"{title}: {value:.3f}, {side} {limit:g}"
        svg = charts.gauge(label, value, limit, top or 1.0, at_least=at_least)
        out.append({"title": title, "value": f"{value:.3f}", "limit": f"{side} {limit:g}",
                    "meaning": meaning, "svg": svg})  # fmt: skip
    if result.get("uncertainty_mean") is not None:
        out.append({"title": "Uncertainty", "value": f"{result['uncertainty_mean']:.4f}",
                    "limit": "", "svg": None,
                    "meaning": "mean standard deviation over seeds inside the brain"})  # fmt: skip
    if result.get("lesion_ml") is not None:
        out.append({"title": "Lesion", "value": f"{result['lesion_ml']:.1f} ml", "limit": "",
                    "svg": None, "meaning": "recoloured, not redrawn"})  # fmt: skip
    return out


def _measures(source: Source, scan_id: str) -> Row | None:
    """Measures against the truth, a line each, by method; None when there are none."""
    found: dict[str, dict[str, float | None]] = {}
    for row in source.metrics_of(scan_id):
        if row["metric"] in MEASURES:
            found.setdefault(row["metric"], {})[row["method"]] = row["value"]
    if not found:
        return None
    methods = [m for m in METHOD_TITLES if any(m in values for values in found.values())]
    lines = []
    for metric, measure in MEASURES.items():
        if metric not in found:
            continue
        values = found[metric]
        known = {m: v for m, v in values.items() if v is not None and not math.isnan(v)}
        pick = max if measure.higher_is_better else min
        best = pick(known, key=lambda m: known[m]) if known else None
        cells = [
            ("–" if m not in known else number(metric, known[m]), m == best) for m in methods
        ]  # fmt: skip
        arrow = "↑" if measure.higher_is_better else "↓"
        lines.append({"title": f"{measure.title} {arrow}", "cells": cells})
    return {"methods": [METHOD_TITLES[m] for m in methods], "lines": lines}


def _provenance(row: Row) -> list[tuple[str, Any]]:
    """Where the output came from, as name and value."""
    scan, result = row["scan"] or {}, row["result"] or {}
    phases = [
        f"{name} {result[f'seconds_{name}']:.1f} s"
        for name in ("read", "prepare", "model", "write")
        if result.get(f"seconds_{name}") is not None
    ]
    sides = [f"{side:.2f}" for side in scan.get("voxel_mm") or []]
    field_strength = scan.get("field_strength")
    model = f"{result['model']} version {result['model_version']}" if result else None
    finished = result.get("finished_at")
    return [
        ("Scan", scan.get("uri")), ("Scan id", row["scan_id"]), ("Data set", row["dataset"]),
        ("Site", row["site"]), ("Split", scan.get("split")),
        ("Grid", " × ".join(str(n) for n in scan.get("shape") or [])),
        ("Voxels", f"{' × '.join(sides)} mm" if sides else None),
        ("Field", f"{field_strength:g} T" if field_strength else None),
        ("Output", result.get("output_uri")), ("Output SHA-256", result.get("output_sha256")),
        ("On the model grid", result.get("model_grid_uri")),
        ("Uncertainty map", result.get("uncertainty_uri")), ("Model", model),
        ("Target", result.get("target")), ("Settings digest", result.get("config_digest")),
        ("Code version", result.get("code_version")), ("Batch", result.get("batch_id")),
        ("Worker", result.get("worker")), ("Time", ", ".join(phases)),
        ("Finished", finished.strftime("%Y-%m-%d %H:%M:%S UTC") if finished else None),
    ]  # fmt: skip
