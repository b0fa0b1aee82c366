"""A lake with figures that can be reckoned by hand: three sites, two versions of one model."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from pipelines.catalog import Catalog
from pipelines.lake import Lake

MODEL = "target-siteA"
#: Subject → site, age, sex; 01 and 02 are the target's own.
PEOPLE = {
    "01": ("siteA", 25.0, "F"), "02": ("siteA", 35.0, "M"),
    "03": ("siteB", 24.0, "F"), "04": ("siteB", 28.0, "M"), "05": ("siteB", 61.0, "F"),
    "06": ("siteC", 65.0, "M"), "07": ("siteC", 68.0, "M"),
}  # fmt: skip
#: Subject → structural similarity of the raw scan, under version 1 and under version 2.
SSIM = {
    "03": (0.90, 0.92, 0.93), "04": (0.90, 0.94, 0.95), "05": (0.80, 0.79, 0.85),
    "06": (0.70, 0.80, 0.78), "07": (0.60, 0.80, 0.90),
}  # fmt: skip
FLAGGED = {"status": "flagged", "code": "FLAG-VOLUMES", "message": "Tissue volumes drifted."}
FAILED = {"status": "failed", "code": "SCAN-CORRUPT", "message": "The stream is damaged."}
#: (subject, version) → how it ended, where not ok.
ENDED = {("05", 1): FLAGGED, ("07", 1): FAILED, ("06", 2): FLAGGED}
START = datetime(2026, 3, 1, tzinfo=UTC)


def _results(version: int) -> list[dict[str, Any]]:
    rows = []
    for subject, (site, _, _) in PEOPLE.items():
        number = int(subject)
        rows.append(
            {
                "scan_id": f"scan{subject}", "subject": subject, "site": site, "sequence": "T1w",
                "model": MODEL, "model_version": version, "target": "siteA", "status": "ok",
                "outlier_score": number / 2, "seconds_read": 1.0, "seconds_prepare": 2.0,
                "seconds_model": float(number), "seconds_write": 0.5, "batch_id": f"b{version}",
            }
            | ENDED.get((subject, version), {})
        )  # fmt: skip
    return rows


def _metrics(version: int) -> list[dict[str, Any]]:
    rows = []
    for subject, values in SSIM.items():
        for method, value in (("raw", values[0]), ("sgcd", values[version])):
            rows.append(
                {
                    "scan_id": f"scan{subject}", "subject": subject, "site": PEOPLE[subject][0],
                    "sequence": "T1w", "model": MODEL, "model_version": version,
                    "target": "siteA", "method": method, "metric": "ssim", "value": value,
                    "unit": "1", "region": "brain", "reference": "scan01",
                }
            )  # fmt: skip
    return rows


def _site_metrics() -> list[dict[str, Any]]:
    base = {"sequence": "T1w", "model": MODEL, "model_version": 1, "target": "siteA"}
    base |= {"method": "sgcd", "metric": "site_wasserstein", "seen": True}
    moved = {"siteA": (0.01, 0.01), "siteB": (0.05, 0.02), "siteC": (0.20, 0.04)}
    return [
        base | {"site": site, "before": before, "after": after, "n": 3}
        for site, (before, after) in moved.items()
    ]


def _attempts() -> list[dict[str, Any]]:
    """One try of each result; before two of them others, whose worker died or that raised."""
    rows = []
    for subject in PEOPLE:
        before = {"03": [("lost", None)], "06": [("raised", "OSError"), ("lost", None)]}
        last = ("failed", "SCAN-CORRUPT") if subject == "07" else ("ok", None)
        for number, (ended, error) in enumerate([*before.get(subject, []), last], 1):
            rows.append(
                {
                    "scan_id": f"scan{subject}", "model": MODEL, "model_version": 1,
                    "batch_id": "b1", "attempt": number, "worker": f"host:{number}",
                    "ended": ended, "error": error,
                }
            )  # fmt: skip
    return rows


def analyst_lake(folder: str) -> Lake:
    """The lake at `folder`. `scan08` of siteC is listed but was never harmonized."""
    lake = Lake.open(folder, create=True)
    catalog = Catalog(lake)
    scans = [
        {
            "scan_id": f"scan{subject}", "dataset": "d", "subject": subject, "site": site,
            "sequence": "T1w", "age": age, "sex": sex, "split": "test", "status": "ok",
            "uri": f"/bids/sub-{subject}_T1w.nii.gz",
        }
        for subject, (site, age, sex) in (PEOPLE | {"08": ("siteC", 70.0, "F")}).items()
    ]  # fmt: skip
    catalog.append("scans", scans)
    # A first try of one scan that failed; the later row counts.
    catalog.append("results", [_results(1)[0] | FAILED | {"worker": "old"}])
    for version in (1, 2):
        catalog.append("results", _results(version))
        catalog.append("metrics", _metrics(version))
    catalog.append("site_metrics", _site_metrics())
    catalog.append("attempts", _attempts())
    for number, command in enumerate(("index", "harmonize")):
        started = START + timedelta(hours=number)
        catalog.append(
            "runs",
            [{"run_id": command, "command": command, "status": "ok", "started_at": started,
              "finished_at": started + timedelta(seconds=90), "summary": "{}"}],
        )  # fmt: skip
    return lake
