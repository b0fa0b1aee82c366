"""What a report is made of: the tables of one version of one model, as far as they can be read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

from pipelines.catalog import Catalog
from pipelines.evaluate import Truths
from pipelines.lake import Lake
from pipelines.verdict import Summary, summarize
from sgcd_core.config import SgcdConfig, parse_config
from sgcd_core.errors import REPLACED, SgcdError
from sgcd_core.io.store import Store, join

log = logging.getLogger(__name__)

Row = dict[str, Any]

#: Statuses of the report: those of `results`, and of scans without a result.
WAITING, UNUSABLE = "not harmonized", "not usable"


@dataclass(frozen=True)
class Source:
    """Everything the pages are made from; holds no voxels.

    Attributes:
        lake: Where it was read.
        model: Name in the registry; None when nothing was harmonized yet.
        version: Its version.
        target: The site whose look is the goal.
        scans: Rows of `scans`.
        results: scan_id → row of `results` of this version.
        metrics: Rows of `metrics` of this version.
        site_metrics: Rows of `site_metrics` of this version.
        runs: Rows of `runs`, oldest first.
        meta: Of the modelpack.
        config_text: The model's settings, YAML.
        config: The same, parsed, or the lake's preparation; None when neither can be read.
        versions: Table → its version in the lake; None for a table nobody wrote to.
        problems: What could not be read, a sentence each.
    """

    lake: Lake
    model: str | None
    version: int | None
    target: str | None = None
    scans: list[Row] = field(default_factory=list)
    results: dict[str, Row] = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    site_metrics: list[Row] = field(default_factory=list)
    runs: list[Row] = field(default_factory=list)
    meta: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    config: SgcdConfig | None = None
    versions: dict[str, int | None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Name and version, or that there is none."""
        return "No model yet" if self.model is None else f"{self.model} version {self.version}"

    def summary(self) -> Summary:
        """Tables and sentences of the measures against the truth."""
        return summarize(self.metrics, self.site_metrics)

    @cached_property
    def truths(self) -> Truths:
        """Which scans have a truth."""
        return Truths(self.scans, self.target)

    @cached_property
    def _metrics_by_scan(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.metrics:
            found.setdefault(row["scan_id"], []).append(row)
        return found

    def metrics_of(self, scan_id: str) -> list[Row]:
        """Rows of `metrics` of one scan."""
        return self._metrics_by_scan.get(scan_id, [])

    def ssim_by_scan(self) -> dict[str, float]:
        """scan_id → SSIM of the harmonized scan to the truth, where there is one."""
        return {
            row["scan_id"]: row["value"]
            for row in self.metrics
            if row["metric"] == "ssim" and row["method"] == "sgcd" and row["value"] is not None
        }

    def scan_rows(self) -> list[Row]:
        """A row for every scan and every result, in the order of the pages.

        `scan` and `result` (either may be None), `status`, `code`, `message` and the labels.
        """
        by_id = {scan["scan_id"]: scan for scan in self.scans}
        rows = []
        for scan_id in {*by_id, *self.results}:
            scan, result = by_id.get(scan_id), self.results.get(scan_id)
            known: Row = result or scan or {}
            if result is not None:
                status = result["status"]
            else:
                status = WAITING if known["status"] == "ok" else UNUSABLE
            labels = ("subject", "session", "site", "sequence", "dataset")
            rows.append(
                {
                    "scan_id": scan_id, "scan": scan, "result": result, "status": status,
                    "code": known["code"], "message": known["message"],
                    **{name: known[name] for name in labels},
                }
            )  # fmt: skip
        order = ("dataset", "subject", "session", "sequence", "scan_id")
        return sorted(rows, key=lambda row: tuple(row[name] or "" for name in order))


def load_source(lake: Lake, model: str | None, version: int | None) -> Source:
    """Read the tables and the model's settings; what cannot be read is a problem, not an error."""
    catalog, problems = Catalog(lake), []

    def read(table: str, where: Mapping[str, Any] | None = None) -> list[Row]:
        try:
            rows: list[Row] = catalog.rows(table, where=where).to_pylist()
            return rows
        except SgcdError as error:
            log.warning("report=table-unread table=%s code=%s", table, error.code)
            problems.append(f"The table {table} could not be read: {error}")
            return []

    chosen = {"model": model, "model_version": version}
    of_model = model is not None
    results = read("results", chosen) if of_model else []
    meta, text = _pack(lake, model, version, problems) if of_model else ({}, "")
    shown = {row["scan_id"] for row in results if row["output_uri"]}
    tables = ("scans", "results", "metrics", "site_metrics")
    return Source(
        lake, model, version,
        target=next((r["target"] for r in results if r["target"]), meta.get("target")),
        scans=[scan for scan in read("scans") if scan["code"] != REPLACED
               or scan["scan_id"] in shown],
        results={row["scan_id"]: row for row in results},
        metrics=read("metrics", chosen) if of_model else [],
        site_metrics=read("site_metrics", chosen) if of_model else [],
        runs=sorted(read("runs"), key=lambda row: str(row["started_at"])),
        meta=meta, config_text=text, config=_config(lake, text, problems),
        versions={name: _version(catalog, name) for name in tables},
        problems=problems,
    )  # fmt: skip


def newest_model(lake: Lake) -> tuple[str, int] | None:
    """The model that made the newest result of the lake; None when nothing was harmonized."""
    columns = ("model", "model_version", "recorded_at")
    rows = Catalog(lake).rows("results", columns=columns).to_pylist()
    if not rows:
        return None
    newest = max(rows, key=lambda row: row["recorded_at"])
    return newest["model"], newest["model_version"]


def _version(catalog: Catalog, table: str) -> int | None:
    try:
        return catalog.version(table)
    except SgcdError:
        return None  # already among the problems


def _pack(
    lake: Lake, model: str | None, version: int | None, problems: list[str]
) -> tuple[Row, str]:
    """`meta` and settings of the model as far as they are there; no weights."""
    folder = lake.model(str(model), str(version))
    try:
        body = json.loads(Store().read_bytes(join(folder, "pack.json"), max_bytes=10**7))
        text = Store().read_bytes(join(folder, "config.yaml"), max_bytes=10**6).decode()
        return dict(body["meta"]), text
    except (SgcdError, ValueError, KeyError, TypeError):
        log.warning("report=model-unread model=%s version=%s", model, version)
        problems.append("The model's files could not be read; its settings are not known.")
        return {}, ""


def _config(lake: Lake, text: str, problems: list[str]) -> SgcdConfig | None:
    """The model's settings, else those the lake's scans were last prepared with."""
    try:
        if text:
            return parse_config(yaml.safe_load(text))
        if not Store().exists(lake.prepared_with):
            return None
        found = json.loads(Store().read_bytes(lake.prepared_with, max_bytes=10**6))
        return parse_config(found)
    except (SgcdError, ValueError, TypeError, yaml.YAMLError):
        problems.append("The settings could not be parsed; there are no pictures without them.")
        return None
