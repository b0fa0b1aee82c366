"""Volumes for the viewer: looked up in the catalog, never by a path from the network.

Before, after and their difference are computed, since the scan's own file has another intensity
scale: what is compared must be shown on one.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from pipelines.lake import Lake
from pipelines.pair import Pair, Volume, load_pair, load_pair_truth
from pipelines.report.source import Source, load_source
from sgcd_core.errors import InputError, ModelError
from sgcd_core.io.nifti import encode_nifti

Row = dict[str, Any]

KINDS = ("before", "after", "change", "uncertainty", "truth")
#: The tables are read again after so many seconds.
FRESH_SECONDS = 30.0
_KEPT_SCANS = 2
_KEPT_FILES = 8


class Volumes:
    """What the viewer of one lake may ask for. Safe to use from several threads.

    Args:
        lake: Whose catalog names the scans.
        clock: For tests.
    """

    def __init__(self, lake: Lake, clock: Callable[[], float] = time.monotonic) -> None:
        self.lake = lake
        self._clock = clock
        self._lock = threading.Lock()  # one scan at a time: a volume may fill much memory
        self._sources: dict[tuple[str, int], tuple[float, Source]] = {}
        self._pairs: OrderedDict[tuple[str, int, str], Pair] = OrderedDict()
        self._files: OrderedDict[tuple[str, int, str, str], bytes] = OrderedDict()

    def source(self, model: str, version: int) -> Source:
        """The tables of a version, at most `FRESH_SECONDS` old."""
        with self._lock:
            return self._source(model, version)

    def row(self, model: str, version: int, scan_id: str) -> Row:
        """The row of a scan, see `Source.scan_rows`.

        Raises:
            InputError: SCAN-MISSING when the catalog does not name it.
        """
        found = self.source(model, version).scan_rows()
        return _pick(found, scan_id)

    def available(self, model: str, version: int, scan_id: str) -> list[str]:
        """The kinds of volume that a scan has; errors as for `load_pair`."""
        with self._lock:
            row, source, pair = self._pair(model, version, scan_id)
            out = ["before"]
            if pair.after is not None:
                out += ["after", "change"]
            if pair.uncertainty is not None:
                out.append("uncertainty")
            if pair.after is not None and _has_truth(source, row):
                out.append("truth")
            return out

    def file(self, model: str, version: int, scan_id: str, kind: str) -> bytes:
        """A .nii.gz of one of `KINDS`, on the scan's own voxels, float32, about [0, 1].

        Raises:
            InputError: SCAN-MISSING when there is no such volume.
            SgcdError: As for `load_pair`.
        """
        key = (model, version, scan_id, kind)
        with self._lock:
            self._source(model, version)  # forgets what is no longer true
            if key not in self._files:
                row, source, pair = self._pair(model, version, scan_id)
                volume = _volume(source, row, pair, kind)
                if volume is None:
                    raise InputError(f"this scan has no volume {kind!r}.", code="SCAN-MISSING")
                _keep(self._files, key, encode_nifti(volume, pair.placement), _KEPT_FILES)
            self._files.move_to_end(key)
            return self._files[key]

    def _source(self, model: str, version: int) -> Source:
        now = self._clock()
        kept = self._sources.get((model, version))
        if kept is None or now - kept[0] > FRESH_SECONDS:
            source = load_source(self.lake, model, version)
            # Volumes of results that were made anew meanwhile must not be shown.
            self._pairs.clear()
            self._files.clear()
            kept = self._sources[model, version] = (now, source)
        return kept[1]

    def _pair(self, model: str, version: int, scan_id: str) -> tuple[Row, Source, Pair]:
        source = self._source(model, version)
        row = _pick(source.scan_rows(), scan_id)
        if row["scan"] is None:
            raise InputError("the scan is not indexed any more.", code="SCAN-MISSING")
        if source.config is None:
            raise ModelError("the model's settings cannot be read.", code="MODEL-MISSING")
        key = (model, version, scan_id)
        if key not in self._pairs:
            pair = load_pair(self.lake, source.config.prepare, row["scan"], row["result"])
            _keep(self._pairs, key, pair, _KEPT_SCANS)
        return row, source, self._pairs[key]


def _pick(rows: list[Row], scan_id: str) -> Row:
    for row in rows:
        if row["scan_id"] == scan_id:
            return row
    raise InputError("the catalog names no such scan.", code="SCAN-MISSING")


def _has_truth(source: Source, row: Row) -> bool:
    return source.truths.of(row["scan"]) is not None


def _volume(source: Source, row: Row, pair: Pair, kind: str) -> Volume | None:
    if kind == "truth":
        assert source.config is not None
        return load_pair_truth(
            source.lake, source.config.prepare, row["scan"], source.scans, source.target,
            pair.prepared,
        )  # fmt: skip
    volumes = {
        "before": pair.before, "after": pair.after, "change": pair.change,
        "uncertainty": pair.uncertainty,
    }  # fmt: skip
    return volumes.get(kind)


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    kept[key] = value
    while len(kept) > most:
        kept.popitem(last=False)
