"""The pictures of a report: a few scans before and after, histograms and distances of the sites.

At most a few scans of each site are read, one after the other; only small pictures are kept.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines import figures
from pipelines.evaluate import find_truth, load_output
from pipelines.lake import Lake
from pipelines.prepare import load_prepared
from sgcd_core.errors import SgcdError
from sgcd_core.metrics import histogram_distance, masked_histogram

log = logging.getLogger(__name__)

Row = dict[str, Any]

#: Scans read for the histograms, by site and sequence.
HISTOGRAM_SCANS = 8
#: Scans shown.
PICTURES = 8


@dataclass
class _Look:
    """Volumes of one site and sequence, as far as they were read."""

    before: list[NDArray[np.float64]] = field(default_factory=list)
    after: list[NDArray[np.float64]] = field(default_factory=list)


def draw_pictures(
    lake: Lake, recipe: str | None, scans: list[Row], results: list[Row], target: str | None
) -> tuple[list[Row], list[tuple[str, str]], list[tuple[str, str]]]:
    """Before, after and target of a few scans; histograms and distances by sequence."""
    if recipe is None:
        return [], [], []
    by_id = {s["scan_id"]: s for s in scans}
    looks: dict[str, dict[str, _Look]] = {}
    shown: list[Row] = []
    pairs: set[tuple[str, str]] = set()  # (site, sequence) that have a picture
    goal = _goal(lake, recipe, scans, target)
    usable = [
        r for r in results if r["status"] in ("ok", "flagged") and r["model_grid_uri"]
        and r["scan_id"] in by_id and r["site"] != target and r["site"] is not None
    ]  # fmt: skip
    # Scans with a truth first, so that the pictures have something to be held against.
    usable.sort(key=lambda r: (find_truth(by_id[r["scan_id"]], scans, target) is None, _order(r)))
    for result in usable:
        look = looks.setdefault(result["sequence"], {}).setdefault(result["site"], _Look())
        wants_picture = (result["site"], result["sequence"]) not in pairs and len(shown) < PICTURES
        if len(look.before) >= HISTOGRAM_SCANS and not wants_picture:
            continue
        try:
            prepared = load_prepared(lake, recipe, result["scan_id"])
            after = load_output(result, prepared.image.shape)
            truth = find_truth(by_id[result["scan_id"]], scans, target)
            other = None if truth is None else load_prepared(lake, recipe, truth["scan_id"]).image
        except SgcdError as error:
            log.warning("report=skipped scan=%s code=%s", result["scan_id"], error.code)
            continue
        look.before.append(masked_histogram(prepared.image, prepared.mask))
        look.after.append(masked_histogram(after, prepared.mask))
        if wants_picture:
            pairs.add((result["site"], result["sequence"]))
            shown.append(
                {
                    "site": result["site"], "sequence": result["sequence"],
                    "subject": result["subject"], "status": result["status"],
                    "before": data_uri(figures.slice_png(prepared.image)),
                    "after": data_uri(figures.slice_png(np.where(prepared.mask, after, 0))),
                    "truth": None if other is None else data_uri(figures.slice_png(other)),
                }
            )  # fmt: skip
    histograms, matrices = [], []
    for sequence, sites in sorted(looks.items()):
        means = {
            site: (np.mean(look.before, axis=0), np.mean(look.after, axis=0))
            for site, look in sorted(sites.items())
            if look.before
        }
        if not means:
            continue
        wanted = goal.get(sequence)
        picture = figures.histograms(means, wanted, sequence=sequence)
        histograms.append((sequence, data_uri(picture)))
        names = list(means)
        before, after_all = [m[0] for m in means.values()], [m[1] for m in means.values()]
        if wanted is not None:
            names.append(f"{target} (target)")
            before.append(wanted)
            after_all.append(wanted)
        if len(names) > 1:
            picture = figures.distance_matrix(
                names, _matrix(before), _matrix(after_all), sequence=sequence
            )
            matrices.append((sequence, data_uri(picture)))
    shown.sort(key=lambda p: (p["sequence"], p["site"]))
    return shown, histograms, matrices


def _goal(
    lake: Lake, recipe: str, scans: list[Row], target: str | None
) -> dict[str, NDArray[np.float64]]:
    """The target's mean histogram by sequence, over some of its training scans."""
    found: dict[str, list[NDArray[np.float64]]] = {}
    for scan in sorted(scans, key=_order):
        of_target = scan["site"] == target and target is not None and scan["status"] == "ok"
        if not of_target or scan["split"] == "test":
            continue
        if len(found.setdefault(scan["sequence"], [])) >= HISTOGRAM_SCANS:
            continue
        try:
            prepared = load_prepared(lake, recipe, scan["scan_id"])
        except SgcdError:
            continue
        found[scan["sequence"]].append(masked_histogram(prepared.image, prepared.mask))
    return {sequence: np.mean(h, axis=0) for sequence, h in found.items() if h}


def _matrix(histograms: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.array([[histogram_distance(p, q) for q in histograms] for p in histograms])


def _order(row: Row) -> tuple[str, ...]:
    names = ("site", "sequence", "subject", "session", "scan_id")
    return tuple(row[name] or "" for name in names)


def data_uri(png: bytes) -> str:
    """A picture inside the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
