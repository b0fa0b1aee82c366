"""One self-contained page about one version of one model: how much closer, and what failed.

Written for a person who was not there: the verdict first, then numbers, pictures, failures and what
made them. It is written also when nothing could be compared and when every scan failed. Everything
on the page is escaped; nothing comes from a header or sidecar.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipelines import figures
from pipelines.catalog import Catalog
from pipelines.evaluate import SITE_DISTANCE
from pipelines.lake import Lake
from pipelines.report_pictures import data_uri, draw_pictures
from pipelines.schemas import STATUSES
from pipelines.verdict import METHOD_TITLES, Line, number, summarize
from sgcd_core.errors import CODES, SgcdError
from sgcd_core.io.store import Store, join
from sgcd_core.metrics import MEASURES

log = logging.getLogger(__name__)

Row = dict[str, Any]

#: Rows of the table of failures; the rest is counted.
FAILURES = 200


def write_report(lake: Lake, model: str, version: int, out: str | None = None) -> str:
    """Write the page and return its address.

    Args:
        lake: Where tables and volumes lie.
        model: Name in the registry.
        version: Version in the registry.
        out: Address of the page; default `reports/MODEL-vVERSION.html` in the lake.

    Raises:
        StorageError: The tables cannot be read or the page cannot be written.
    """
    page = render(gather(lake, model, version))
    uri = out or lake.report(f"{model}-v{version}.html")
    Store().write_bytes(uri, page)
    return uri


def render(content: Row) -> bytes:
    """The page from its content; every value is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html").render(**content).encode()


def gather(lake: Lake, model: str, version: int) -> Row:
    """Everything the page shows."""
    catalog = Catalog(lake)
    chosen = {"model": model, "model_version": version}
    results: list[Row] = catalog.rows("results", where=chosen).to_pylist()
    scans: list[Row] = catalog.rows("scans").to_pylist()
    summary = summarize(catalog.rows("metrics", where=chosen).to_pylist())
    site_rows: list[Row] = catalog.rows("site_metrics", where=chosen).to_pylist()
    target = next((r["target"] for r in results if r["target"]), None)
    pack = _pack(lake, model, version)
    recipe = _recipe(lake, pack)
    pictures, histograms, matrices = draw_pictures(lake, recipe, scans, results, target)
    counts = Counter(r["status"] for r in results)
    unusable = [s for s in scans if s["status"] != "ok"]
    seconds = [sum(r[k] or 0 for k in r if k.startswith("seconds_")) for r in results]
    sequences = sorted({line.sequence for line in summary.lines})
    return {
        "title": f"{model} version {version}",
        "model": model, "version": version, "target": target,
        "made_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "headline": summary.headline,
        "verdict": summary.verdict if results else [_nothing(scans)],
        "counts": {name: counts.get(name, 0) for name in STATUSES},
        "unusable": len(unusable), "scans": len(scans),
        "groups": [_cells(line) for line in summary.groups],
        "lines": [_cells(line) for line in summary.lines],
        "methods": _methods(summary.lines),
        "method_titles": METHOD_TITLES,
        "distances": [_distance(r) for r in site_rows if r["metric"] == SITE_DISTANCE],
        "plots": [
            (s, data_uri(figures.measures(summary.lines, sequence=s))) for s in sequences
        ],
        "histograms": histograms, "matrices": matrices, "pictures": pictures,
        "failures": _failures(results, unusable)[:FAILURES],
        "more_failures": max(0, len(_failures(results, unusable)) - FAILURES),
        "facts": _facts(lake, results, pack, recipe, seconds, catalog),
        "config": pack["config"],
    }  # fmt: skip


def _nothing(scans: Sequence[Row]) -> str:
    if not scans:
        return "Nothing was harmonized: no scan was indexed yet."
    return "Nothing was harmonized by this version yet."


def _pack(lake: Lake, model: str, version: int) -> Row:
    """`meta` and `config` (YAML text) of the model, as far as they are there; no weights."""
    store, folder = Store(), lake.model(model, version)
    found: Row = {"meta": {}, "config": ""}
    try:
        body = json.loads(store.read_bytes(join(folder, "pack.json"), max_bytes=10**7))
        found["meta"] = dict(body["meta"])
        found["config"] = store.read_bytes(join(folder, "config.yaml"), max_bytes=10**6).decode()
    except (SgcdError, ValueError, KeyError, TypeError):
        log.warning("report=model-unknown model=%s version=%s", model, version)
    return found


def _recipe(lake: Lake, pack: Row) -> str | None:
    """Digest of the preparation settings: the model's, else of any prepared scan."""
    from sgcd_core.config import parse_config

    if pack["config"]:
        try:
            return parse_config(yaml.safe_load(pack["config"])).prepare.digest()
        except (SgcdError, yaml.YAMLError):
            log.warning("report=config-unknown lake=%s", lake.uri)
    root = lake.prepared("")
    first = next(iter(Store().list(root)), None)
    return None if first is None else first.uri[len(root) :].strip("/").split("/")[0]


def _methods(lines: Sequence[Line]) -> list[str]:
    return [m for m in METHOD_TITLES if any(m in line.by_method for line in lines)]


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
    rivals = [m for m in ("raw", "nyul") if line.closer("sgcd", m) is not None]
    beaten = [METHOD_TITLES[m] for m in rivals if line.closer("sgcd", m)]
    return {
        "site": line.site, "sequence": line.sequence, "seen": line.seen, "n": line.n,
        "scans": line.scans, "measure": measure.title, "unit": unit,
        "arrow": "↑" if measure.higher_is_better else "↓", "values": values,
        "closer": " and ".join(beaten) or ("neither" if len(rivals) > 1 else "none"),
        "all": len(beaten) == len(rivals), "any": bool(beaten),
    }  # fmt: skip


def _distance(row: Row) -> Row:
    keys = ("before", "after", "low", "high")
    texts = {k: "–" if row[k] is None else f"{row[k]:.4f}" for k in keys}
    return row | {"texts": texts, "closer": row["after"] < row["before"]}


def _failures(results: Sequence[Row], unusable: Sequence[Row]) -> list[Row]:
    """Flagged, failed and quarantined scans and those that could not be indexed, worst first."""
    rank = {"quarantined": 0, "failed": 1, "not usable": 2, "flagged": 3}
    rows = [
        {
            "status": r["status"], "site": r["site"] or "–", "sequence": r["sequence"] or "–",
            "subject": r["subject"] or "–", "scan": r["scan_id"][:8], "code": r["code"] or "–",
            "reason": r["message"] or CODES.get(r["code"] or "", ""),
        }
        for r in results
        if r["status"] != "ok"
    ]  # fmt: skip
    rows += [
        {
            "status": "not usable", "site": s["site"] or "–", "sequence": s["sequence"] or "–",
            "subject": s["subject"] or "–", "scan": s["scan_id"][:8], "code": s["code"] or "–",
            "reason": s["message"] or CODES.get(s["code"] or "", ""),
        }
        for s in unusable
    ]  # fmt: skip
    return sorted(rows, key=lambda r: (rank.get(r["status"], 9), r["code"], r["site"], r["scan"]))


def _facts(
    lake: Lake, results: Sequence[Row], pack: Row, recipe: str | None, seconds: Sequence[float],
    catalog: Catalog,
) -> list[tuple[str, str]]:  # fmt: skip
    """What made this page, as name and value."""
    meta = pack["meta"]
    codes = sorted({r["code_version"] for r in results if r["code_version"]})
    configs = sorted({r["config_digest"] for r in results if r["config_digest"]})
    facts = [
        ("Lake", lake.uri),
        ("Training sites", ", ".join(meta.get("training_sites") or []) or "not recorded"),
        ("Code version", ", ".join(codes) or "–"),
        ("Settings digest", ", ".join(configs) or "–"),
        ("Preparation recipe", recipe or "–"),
        ("Median time a scan", f"{float(np.median(seconds)):.1f} s" if seconds else "–"),
    ]
    for table in ("scans", "results", "metrics", "site_metrics"):
        version = catalog.version(table)
        facts.append((f"Table {table}", "empty" if version is None else f"version {version}"))
    return facts
