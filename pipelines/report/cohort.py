"""What the page about the cohort shows: the verdict first, then numbers, sites, scans, failures."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from pipelines.report import charts
from pipelines.report.pages import counted_scans
from pipelines.report.source import UNUSABLE, WAITING, Source
from pipelines.report.state import ScanPage
from pipelines.schemas import STATUSES
from pipelines.verdict import CLASSICAL, METHOD_TITLES, SITE_DISTANCE, Line, number
from sgcd_core.errors import CODES
from sgcd_core.metrics import MEASURES

Row = dict[str, Any]

#: Scans shown as pictures, one of a site and sequence each.
EXAMPLES = 8
SITE_TASKS = {
    "site_balanced_accuracy": "balanced accuracy", "site_f1": "F1",
    "site_precision": "precision", "site_recall": "recall",
}  # fmt: skip
AGE_TASKS = {"age_mae": "mean absolute error, years", "age_mse": "mean squared error, years²"}


def cohort_content(source: Source, pages: Mapping[str, ScanPage]) -> Row:
    """Values of the template `cohort.html`.

    Args:
        source: The tables.
        pages: scan_id → what is known of the page of a scan.
    """
    summary, rows = source.summary(), source.scan_rows()
    counts = Counter(row["status"] for row in rows)
    lines = summary.lines
    sequences = sorted({line.sequence for line in lines})
    methods = [m for m in METHOD_TITLES if any(m in line.by_method for line in lines)]
    return {
        "title": source.title, "target": source.target, "lake": source.lake.uri,
        "made_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "problems": source.problems, "runs": _runs(source.runs),
        "headline": summary.headline,
        "verdict": [found] if (found := _nothing(source)) else summary.verdict,
        "counts": [(name, counts.get(name, 0)) for name in (*STATUSES, UNUSABLE, WAITING)],
        "groups": [_cells(line) for line in summary.groups],
        "lines": [_cells(line) for line in lines],
        "methods": methods, "method_titles": METHOD_TITLES, "shortened": charts.shortened,
        "marks": [(METHOD_TITLES[m], charts.method_mark(m)) for m in methods],
        "charts": [(s, _measure_charts([x for x in lines if x.sequence == s])) for s in sequences],
        "distances": [_distance(r) for r in source.site_metrics if r["metric"] == SITE_DISTANCE],
        **_greys(source, pages),
        "site_tasks": _tasks(source.site_metrics, SITE_TASKS),
        "age_tasks": _tasks(source.site_metrics, AGE_TASKS),
        "examples": _examples(rows, pages), "codes": _codes(rows),
        "table": scan_table(rows, pages, source.ssim_by_scan()),
        "facts": _facts(source), "config": source.config_text,
    }  # fmt: skip


def _nothing(source: Source) -> str:
    """Why nothing was compared; empty where an evaluation says what it found."""
    if not source.results and not source.scans:
        return "Nothing was harmonized: no scan was indexed yet."
    if not source.results:
        return "Nothing was harmonized by this version yet."
    if not any(row["status"] in ("ok", "flagged") for row in source.results.values()):
        return "No scan was harmonized: all failed, see flags and failures below."
    if not source.metrics and not source.site_metrics:
        return "Nothing was compared yet: run `sgcd evaluate`, then this report again."
    return ""


def _runs(runs: Sequence[Row]) -> list[Row]:
    """The last run of each command that did not end well, newest first."""
    last = {run["command"]: run for run in runs}
    bad = [run for run in last.values() if run["status"] in ("failed", "stopped")]
    out = []
    for run in sorted(bad, key=lambda r: str(r["started_at"]), reverse=True):
        try:
            code = json.loads(run["summary"] or "{}").get("code")
        except ValueError:
            code = None
        started = run["started_at"]
        when = "–" if started is None else started.strftime("%Y-%m-%d %H:%M UTC")
        out.append({"command": run["command"], "status": run["status"], "when": when,
                    "code": code, "meaning": CODES.get(code or "", "")})  # fmt: skip
    return out


def _cells(line: Line) -> Row:
    """A line of the table, ready to print; `best` marks the method closest to the truth."""
    measure = MEASURES[line.metric]
    finite = {m: e.mean for m, e in line.by_method.items() if not math.isnan(e.mean)}
    pick = max if measure.higher_is_better else min
    best = pick(finite, key=lambda m: finite[m]) if finite else None
    values = {}
    for method, found in line.by_method.items():
        low, high = number(line.metric, found.low), number(line.metric, found.high)
        interval = f"{low}–{high}" if line.n > 1 and math.isfinite(found.low) else ""
        values[method] = {
            "text": number(line.metric, found.mean), "interval": interval, "best": method == best,
        }  # fmt: skip
    unit = {"1": "", "intensity range": ""}.get(measure.unit, measure.unit)
    rivals = [m for m in ("raw", *CLASSICAL) if line.closer("sgcd", m) is not None]
    beaten = [METHOD_TITLES[m] for m in rivals if line.closer("sgcd", m)]
    if len(rivals) > 2:
        closer = (
            f"all {len(rivals)}"
            if len(beaten) == len(rivals)
            else f"{len(beaten)} of {len(rivals)}"
        )
    else:
        closer = " and ".join(beaten)
    return {
        "site": line.site, "sequence": line.sequence, "seen": line.seen, "n": line.n,
        "scans": line.scans, "measure": measure.title, "unit": unit,
        "arrow": "↑" if measure.higher_is_better else "↓", "values": values,
        "closer": closer or ("neither" if len(rivals) == 2 else "none"),
        "all": len(beaten) == len(rivals), "any": bool(beaten),
    }  # fmt: skip


def _measure_charts(lines: Sequence[Line]) -> list[Row]:
    return [
        {
            "title": MEASURES[m].title,
            "unit": "" if MEASURES[m].unit == "1" else MEASURES[m].unit,
            "better": "higher is closer" if MEASURES[m].higher_is_better else "lower is closer",
            "svg": charts.measure_chart(lines, m),
        }
        for m in MEASURES
        if any(line.metric == m for line in lines)
    ]


def _distance(row: Row) -> Row:
    keys = ("before", "after", "low", "high")
    texts = {k: "–" if row[k] is None else f"{row[k]:.4f}" for k in keys}
    known = row["after"] is not None and row["before"] is not None
    return row | {"texts": texts, "closer": known and row["after"] < row["before"]}


@dataclass(frozen=True)
class SiteHistograms:
    """Mean histograms of one sequence, (bins,) each.

    Attributes:
        sites: Site → (before, after, scans), the target's own left out.
        target: Of the target's training scans; None where there is none.
    """

    sites: dict[str, tuple[charts.Histogram, charts.Histogram, int]]
    target: charts.Histogram | None


def site_histograms(source: Source, pages: Mapping[str, ScanPage]) -> dict[str, SiteHistograms]:
    """By sequence, from the histograms kept with the scans."""
    groups: dict[str, dict[str, list[tuple[charts.Histogram, charts.Histogram]]]] = {}
    goals: dict[str, list[charts.Histogram]] = {}
    counted = counted_scans(source, pages)
    for row in source.scan_rows():
        page = pages.get(row["scan_id"]) if row["scan_id"] in counted else None
        if page is None or page.before is None or row["site"] is None or row["sequence"] is None:
            continue
        if row["site"] != source.target:
            if page.after is not None:
                sites = groups.setdefault(row["sequence"], {})
                sites.setdefault(row["site"], []).append((page.before, page.after))
        elif row["scan"] is None or row["scan"]["split"] != "test":
            goals.setdefault(row["sequence"], []).append(page.before)
    out = {}
    for sequence, members in sorted(groups.items()):
        means = {
            site: (_mean([b for b, _ in found]), _mean([a for _, a in found]), len(found))
            for site, found in sorted(members.items())
        }
        goal = goals.get(sequence)
        out[sequence] = SiteHistograms(means, None if goal is None else _mean(goal))
    return out


def _greys(source: Source, pages: Mapping[str, ScanPage]) -> Row:
    """Histograms of each site and distances between them, drawn."""
    histograms, matrices = [], []
    for sequence, found in site_histograms(source, pages).items():
        known = [h for before, after, _ in found.sites.values() for h in (before, after)]
        extra = [] if found.target is None else [found.target]
        top = charts.panel_top([*known, *extra])
        panels = []
        for site, (before, after, count) in found.sites.items():
            label = f"{sequence} intensities of {site}: before, after"
            label += f" and at {source.target}" if extra else ""
            svg = charts.histogram_panel(label, before, after, found.target, top)
            panels.append({"site": site, "scans": count, "svg": svg})
        histograms.append((sequence, panels))
        names = [*found.sites, *([f"{source.target} (target)"] if extra else [])]
        both = {
            "before": [*(before for before, _, _ in found.sites.values()), *extra],
            "after": [*(after for _, after, _ in found.sites.values()), *extra],
        }
        if len(names) > 1:
            largest = charts.largest_distance(both)
            tables = [(k, charts.matrix_cells(names, both[k], largest)) for k in both]
            matrices.append({"sequence": sequence, "names": names, "tables": tables})
    return {"histograms": histograms, "matrices": matrices}


def _mean(found: Sequence[charts.Histogram]) -> charts.Histogram:
    return np.asarray(np.mean(found, axis=0))


def _tasks(rows: Sequence[Row], titles: Mapping[str, str]) -> list[Row]:
    """Figures of a downstream task by sequence, image features and measure."""
    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        measure, _, features = row["metric"].partition(".")
        if measure in titles and row["site"] is None and features:
            groups.setdefault((row["sequence"] or "", features, measure), {})[row["method"]] = row
    order = list(titles)
    out = []
    for key in sorted(groups, key=lambda k: (k[0], k[1], order.index(k[2]))):
        sequence, features, measure = key
        cells = {}
        for method, row in groups[key].items():
            if row["after"] is not None:
                spread = (row["high"] or 0) - row["after"] if row["low"] is not None else 0
                cells[method] = f"{row['after']:.2f}" + (f" ± {spread:.2f}" if spread > 0 else "")
        n = next(iter(groups[key].values()))["n"]
        out.append({"sequence": sequence, "features": features, "measure": titles[measure],
                    "cells": cells, "n": n})  # fmt: skip
    return out


def _examples(rows: Sequence[Row], pages: Mapping[str, ScanPage]) -> list[Row]:
    """A few scans as pictures: one of each site and sequence, those with a truth first."""
    found: dict[tuple[str, str], Row] = {}
    shown = [r for r in rows if (p := pages.get(r["scan_id"])) is not None and p.preview]
    for row in sorted(shown, key=lambda r: not pages[r["scan_id"]].has_truth):
        page = pages[row["scan_id"]]
        key = (row["sequence"] or "", row["site"] or "")
        found.setdefault(key, row | {"preview": page.preview, "page": page.file})
    return [found[key] for key in sorted(found)][:EXAMPLES]


def _codes(rows: Sequence[Row]) -> list[Row]:
    """What was flagged, failed or set aside and why, by code, most frequent first."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["status"] not in ("ok", WAITING):
            found.setdefault((row["status"], row["code"] or "–"), []).append(row)
    out = []
    for (status, code), members in sorted(found.items(), key=lambda item: -len(item[1])):
        sites = Counter(row["site"] or "no site" for row in members)
        example = next((row["message"] for row in members if row["message"]), None)
        out.append(
            {
                "status": status, "code": code, "n": len(members),
                "meaning": CODES.get(code, ""), "example": example,
                "sites": ", ".join(f"{site} {n}" for site, n in sites.most_common(6)),
            }
        )  # fmt: skip
    return out


#: Columns of the table of scans, in the order of the arrays in the page.
TABLE = (
    "page", "subject", "session", "site", "sequence", "status", "code", "ssim",
    "gradient_correlation", "volume_drift", "outlier_score", "scan_id",
)  # fmt: skip


def scan_table(
    rows: Sequence[Row], pages: Mapping[str, ScanPage], ssim: Mapping[str, float]
) -> list[list[Any]]:
    """The table of scans as arrays in the order of `TABLE`, for the page's script."""

    def score(value: float | None) -> float | None:
        return None if value is None or not math.isfinite(value) else round(value, 4)

    out = []
    for row in rows:
        page, result = pages.get(row["scan_id"]), row["result"] or {}
        scores = [score(result.get(name)) for name in TABLE[8:11]]
        out.append(
            [
                page.file if page else None, row["subject"] or "", row["session"] or "",
                row["site"] or "", row["sequence"] or "", row["status"], row["code"] or "",
                score(ssim.get(row["scan_id"])), *scores, row["scan_id"][:8],
            ]
        )  # fmt: skip
    return out


def _facts(source: Source) -> list[tuple[str, str]]:
    """What made this page, as name and value."""
    results = source.results.values()
    codes = sorted({r["code_version"] for r in results if r["code_version"]})
    configs = sorted({r["config_digest"] for r in results if r["config_digest"]})
    seconds = [sum(r[k] or 0 for k in r if k.startswith("seconds_")) for r in results]
    stage = source.meta.get("stage1") or {}
    facts = [
        ("Lake", source.lake.uri),
        ("Model", source.title),
        ("Training sites", ", ".join(source.meta.get("training_sites") or []) or "not recorded"),
        ("Stage 1", f"{stage['steps']} steps from {stage.get('init', '–')}" if stage else "–"),
        ("Style encoder", str(source.meta.get("encoder") or "–")),
        ("Code version", ", ".join(codes) or "–"),
        ("Settings digest", ", ".join(configs) or "–"),
        ("Preparation recipe", source.config.prepare.digest() if source.config else "–"),
        ("Median time a scan", f"{float(np.median(seconds)):.1f} s" if seconds else "–"),
    ]
    for table, version in source.versions.items():
        facts.append((f"Table {table}", "empty" if version is None else f"version {version}"))
    return facts
