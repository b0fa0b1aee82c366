"""How much closer harmonized scans come to the same subject's own scan at the target site.

Only test subjects count, and their scan at the target site is used for nothing but the comparison:
no output is scaled, matched or chosen by it (method.md, Evaluation).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.baselines import Baseline, make_baseline
from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.plan import replaced_scans
from pipelines.prepare import PreparedFiles, load_prepared
from pipelines.record_figures import record_figures, unread
from pipelines.truth import load_truth
from pipelines.verdict import SITE_DISTANCE, Summary, estimate, person, summarize
from sgcd_core.config import SgcdConfig
from sgcd_core.errors import ModelError, SgcdError
from sgcd_core.io.nifti import read_nifti
from sgcd_core.io.store import Store
from sgcd_core.metrics import MEASURES, histogram_distance, masked_histogram, measure_all
from sgcd_core.words import counted

log = logging.getLogger(__name__)

Row = dict[str, Any]
Histogram = NDArray[np.float64]

#: Training scans of the target site a baseline is fit on, at most, by sequence.
MAX_FIT_SCANS = 40
#: Code of a scan that is not compared, since other scans of its subject are no test scans.
SPLIT = "SCAN-SPLIT"


@dataclass(frozen=True)
class EvaluationSummary:
    """What was computed and written.

    Attributes:
        model: Name in the registry.
        version: Version in the registry.
        target: The target site; None for a global model.
        summary: Tables and sentences.
        site_rows: Rows of `site_metrics`.
        pairs: Scans compared with a truth.
        skipped: scan_id → code of scans that could not be compared.
        written: False when the same evaluation was in the tables already.
    """

    model: str
    version: int
    target: str | None
    summary: Summary
    site_rows: list[Row] = field(default_factory=list)
    pairs: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    written: bool = False

    @property
    def verdict(self) -> list[str]:
        """The result in sentences."""
        if not self.pairs and (lost := unread(self.skipped)):
            return [f"Nothing was compared: {counted(len(lost), 'scan')} could not be read."]
        return self.summary.verdict


def evaluate(
    lake: Lake,
    model: str,
    version: int,
    config: SgcdConfig,
    *,
    training_sites: Collection[str] | None = None,
    methods: Sequence[str] = ("raw", "nyul"),
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationSummary:
    """Score every harmonized test scan and every site; write `metrics` and `site_metrics`.

    Args:
        lake: Where results, prepared scans and tables lie.
        model: Name in the registry.
        version: Version in the registry.
        config: Settings of the run; `config.prepare` names the prepared scans.
        training_sites: The model's training sites; None leaves `seen` open.
        methods: Baselines beside the model; `raw` is always included.
        progress: Called with (scans done, scans in all).

    Raises:
        ModelError: MODEL-MISSING when this version harmonized nothing.
        StorageError: A table or the store cannot be reached.
    """
    catalog = Catalog(lake)
    results = usable_results(catalog, model, version)
    job = _Job(lake, config, catalog.rows("scans").to_pylist(), results, training_sites, methods)
    for number, result in enumerate(results, 1):
        job.score(result)
        if progress is not None:
            progress(number, len(results))
    base = {"model": model, "model_version": version, "target": job.target}
    metrics = [base | row for row in job.metrics]
    sites = [base | row for row in job.site_rows()]
    mine = {*MEASURES, SITE_DISTANCE}.__contains__
    lost = job.methods.lost(job.skipped)
    written = record_figures(catalog, "metrics", base, metrics, mine, lost)
    written |= record_figures(catalog, "site_metrics", base, sites, mine, lost)
    return EvaluationSummary(
        model, version, job.target, summarize(metrics, sites, seed=config.seed), sites,
        pairs=job.pairs, skipped=job.skipped, written=written,
    )  # fmt: skip


def usable_results(catalog: Catalog, model: str, version: int) -> list[Row]:
    """Latest rows of `results` that have an output (ok and flagged), ordered by scan_id.

    Those of scans whose file was replaced since are left out: another scan stands for it.

    Raises:
        ModelError: MODEL-MISSING when this version harmonized nothing.
    """
    rows: list[Row] = catalog.rows(
        "results", where={"model": model, "model_version": version}
    ).filter(~pc.field("scan_id").isin(replaced_scans(catalog))).to_pylist()  # fmt: skip
    found = [r for r in rows if r["status"] in ("ok", "flagged") and r["model_grid_uri"]]
    if not found:
        raise ModelError(
            f"{model} version {version} has no result to evaluate.", where=catalog.lake.uri,
            hint=f"Run `sgcd harmonize --lake LAKE --model {model}` first.",
        )  # fmt: skip
    return found


class Truths:
    """Which scans have a truth: the same subject's scan of the same sequence at the target site.

    Only test scans have one, and none of a subject of whom training may have seen any scan.

    Args:
        scans: All rows of `scans`, read once.
        target: The target site; without one nothing has a truth.
    """

    def __init__(self, scans: Iterable[Row], target: str | None) -> None:
        self.target = target
        self._at_target: dict[tuple[str, str | None], Row] = {}
        self._trained_on: set[str] = set()  # people; what is gone is in no split
        for scan in scans:
            if scan["status"] != "ok":
                continue
            if scan["split"] != "test":
                self._trained_on.add(person(scan))
            elif scan["site"] == target and scan["subject"] is not None:
                key = person(scan), scan["sequence"]
                before = self._at_target.setdefault(key, scan)
                self._at_target[key] = min(before, scan, key=_first)

    def of(self, scan: Row) -> Row | None:
        """The truth of a scan, if there is one."""
        return None if person(scan) in self._trained_on else self._there(scan)

    def split_apart(self, scan: Row) -> bool:
        """Whether a scan has none only because its subject's scans are of several splits."""
        return person(scan) in self._trained_on and self._there(scan) is not None

    def _there(self, scan: Row) -> Row | None:
        if self.target is None or scan["split"] != "test" or scan["site"] == self.target:
            return None
        return self._at_target.get((person(scan), scan["sequence"]))


def _first(scan: Row) -> tuple[str, str]:
    return scan["session"] or "", scan["scan_id"]


def find_truth(scan: Row, scans: Iterable[Row], target: str | None) -> Row | None:
    """The truth of a single scan, see `Truths`."""
    return Truths(scans, target).of(scan)


def load_output(result: Row, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The harmonized volume on the model grid, float32, (X, Y, Z), [0, 1].

    Raises:
        InputError: It is missing or damaged.
        StorageError: STORE-DIGEST when it is not what the row says, else as for `read_nifti`.
        ModelError: MODEL-GRID when it has another shape than `shape`.
    """
    uri, digest = result["model_grid_uri"], result.get("model_grid_sha256")
    data: NDArray[np.float32] = read_nifti(uri, Store(), sha256=digest).data
    if data.shape != shape:
        raise ModelError(
            f"the output has shape {data.shape}, the prepared scan {shape}.", code="MODEL-GRID",
            where=uri,
        )  # fmt: skip
    return np.clip(np.nan_to_num(data), 0, 1)


class MethodImages:
    """One scan by every method: the baselines, each fit once for a sequence, and the model.

    Args:
        lake: Where prepared scans and outputs lie.
        recipe: Digest of the preparation settings.
        scans: Rows of `scans`.
        target: The target site; without one there is nothing to fit a baseline on.
        methods: Baselines; `raw` is always included.
    """

    def __init__(
        self,
        lake: Lake,
        recipe: str,
        scans: list[Row],
        target: str | None,
        methods: Sequence[str] = ("raw", "nyul"),
    ) -> None:
        self.lake, self.recipe, self.scans, self.target = lake, recipe, scans, target
        self.names = tuple(dict.fromkeys(("raw", *methods)))
        self._baselines: dict[tuple[str, str], Baseline | None] = {}
        self._unread: dict[str, str] = {}  # training scans of the target, by code

    def of(self, scan: Row, result: Row, prepared: PreparedFiles) -> dict[str, NDArray[np.float32]]:
        """The scan by every method, on the model grid; errors as for `load_output`."""
        images = {}
        for name in self.names:
            baseline = self._baseline(name, scan["sequence"])
            if baseline is not None:
                images[name] = baseline.apply(prepared.image, prepared.mask)
        images["sgcd"] = load_output(result, prepared.image.shape)
        return images

    def _baseline(self, name: str, sequence: str) -> Baseline | None:
        """The baseline, fit once; None when the target has no training scan of the sequence."""
        key = (name, sequence)
        if key not in self._baselines:
            baseline = make_baseline(name, sequence)
            if name == "raw":
                self._baselines[key] = baseline
            else:
                training = [(p.image, p.mask) for p in self.target_training(sequence)]
                self._baselines[key] = baseline.fit(training) if training else None
        return self._baselines[key]

    def target_training(self, sequence: str) -> Iterator[PreparedFiles]:
        """The target site's training scans of a sequence that are prepared, at most so many."""
        rows = [
            s for s in self.scans
            if s["site"] == self.target and self.target is not None
            and s["sequence"] == sequence and s["split"] != "test" and s["status"] == "ok"
        ]  # fmt: skip
        for row in sorted(rows, key=lambda s: s["scan_id"])[:MAX_FIT_SCANS]:
            try:
                yield load_prepared(self.lake, self.recipe, row["scan_id"])
            except SgcdError as error:
                log.warning("evaluate=not-fit-on scan=%s code=%s", row["scan_id"], error.code)
                if error.code != "SCAN-MISSING":  # it may never have been prepared
                    self._unread[row["scan_id"]] = error.code

    def lost(self, skipped: dict[str, str]) -> list[Row]:
        """Rows of scans that the store did not give, for `record_figures`, and notes in `skipped`.

        Where a training scan of the target is among them, all scans of its sequence are: what they
        are compared with is not what it was.
        """
        skipped |= self._unread
        mine, theirs = unread(skipped), unread(self._unread)
        sequences = {scan["sequence"] for scan in self.scans if scan["scan_id"] in theirs}
        return [s for s in self.scans if s["scan_id"] in mine or s["sequence"] in sequences]


class _Job:
    """One evaluation: holds histograms and numbers, never more than a few volumes."""

    def __init__(
        self,
        lake: Lake,
        config: SgcdConfig,
        scans: list[Row],
        results: list[Row],
        training_sites: Collection[str] | None,
        methods: Sequence[str],
    ) -> None:
        self.lake = lake
        self.config = config
        self.recipe = config.prepare.digest()
        self.scans = scans
        self.by_id = {s["scan_id"]: s for s in scans}
        self.results = results
        self.target: str | None = next((r["target"] for r in results if r["target"]), None)
        self.training_sites = None if training_sites is None else frozenset(training_sites)
        self.truths = Truths(scans, self.target)
        self.methods = MethodImages(lake, self.recipe, scans, self.target, methods)
        self.metrics: list[Row] = []
        self.skipped: dict[str, str] = {}
        self.pairs = 0
        self._references: dict[str, Histogram | None] = {}
        # (site, sequence, method) → subject → histograms
        self._histograms: dict[tuple[str, str, str], dict[str, list[Histogram]]] = {}

    def score(self, result: Row) -> None:
        """Histograms of one scan, and its distances to the truth if there is one."""
        scan = self.by_id.get(result["scan_id"])
        if scan is None or scan["site"] is None or scan["site"] == self.target:
            return
        try:
            prepared = load_prepared(self.lake, self.recipe, scan["scan_id"])
            images = self.methods.of(scan, result, prepared)
            truth = self.truths.of(scan)
            other = None if truth is None else load_truth(
                self.lake, self.config.prepare, truth, prepared
            )  # fmt: skip
        except SgcdError as error:
            # One scan that cannot be read must not end the evaluation of the others.
            log.warning("evaluate=skipped scan=%s code=%s", scan["scan_id"], error.code)
            self.skipped[scan["scan_id"]] = error.code
            return
        subject = person(scan)
        for method, image in images.items():
            place = self._histograms.setdefault((scan["site"], scan["sequence"], method), {})
            place.setdefault(subject, []).append(masked_histogram(image, prepared.mask))
        if truth is None or other is None:
            if self.truths.split_apart(scan):
                self.skipped[scan["scan_id"]] = SPLIT
            return
        goal, mask = other[0], prepared.mask & other[1]
        if not mask.any():
            self.skipped[scan["scan_id"]] = "SCAN-REGISTRATION"
            return
        self.pairs += 1
        for method, image in images.items():
            for metric, value in measure_all(image, goal, mask).items():
                self.metrics.append(
                    {
                        "scan_id": scan["scan_id"], "dataset": scan["dataset"],
                        "subject": scan["subject"], "site": scan["site"],
                        "sequence": scan["sequence"],
                        "method": method, "metric": metric, "value": value,
                        "unit": MEASURES[metric].unit, "region": "brain",
                        "reference": truth["scan_id"], "seen": self.seen(scan["site"]),
                    }
                )  # fmt: skip

    def seen(self, site: str) -> bool | None:
        """Whether the model was trained on scans of this site."""
        return None if self.training_sites is None else site in self.training_sites

    def _reference(self, sequence: str) -> Histogram | None:
        """Mean histogram of the target's training scans; of all sites' raw ones without target."""
        if sequence not in self._references:
            if self.target is not None:
                found = [
                    masked_histogram(p.image, p.mask)
                    for p in self.methods.target_training(sequence)
                ]
            else:
                found = [
                    _mean(by_subject)
                    for (_, seq, method), by_subject in self._histograms.items()
                    if seq == sequence and method == "raw"
                ]
            self._references[sequence] = np.mean(found, axis=0) if found else None
        return self._references[sequence]

    def site_rows(self) -> list[Row]:
        """`site_metrics` without the model's columns: by site, sequence, method and metric."""
        out: list[Row] = []
        groups: dict[tuple[str, str, str, str], list[Row]] = {}
        for row in self.metrics:
            key = (row["site"], row["sequence"], row["method"], row["metric"])
            groups.setdefault(key, []).append(row)
        for (site, sequence, method, metric), rows in sorted(groups.items()):
            after = estimate(rows, self.config.seed)
            before = estimate(groups[site, sequence, "raw", metric], self.config.seed)
            out.append(
                {
                    "site": site, "sequence": sequence, "method": method, "metric": metric,
                    "before": before.mean, "after": after.mean, "low": after.low,
                    "high": after.high, "n": len({person(r) for r in rows}),
                    "seen": self.seen(site),
                }
            )  # fmt: skip
        return out + self._distance_rows()

    def _distance_rows(self) -> list[Row]:
        """Distance of each site's mean histogram to the target's; needs no traveling subject."""
        out: list[Row] = []
        for (site, sequence, method), by_subject in sorted(self._histograms.items()):
            goal = self._reference(sequence)
            if goal is None:
                continue
            raw = self._histograms[site, sequence, "raw"]
            low, high = _interval(by_subject, goal, self.config.seed)
            out.append(
                {
                    "site": site, "sequence": sequence, "method": method,
                    "metric": SITE_DISTANCE, "before": histogram_distance(_mean(raw), goal),
                    "after": histogram_distance(_mean(by_subject), goal),
                    "low": low, "high": high, "n": len(by_subject), "seen": self.seen(site),
                }
            )  # fmt: skip
        return out


def _mean(by_subject: dict[str, list[Histogram]]) -> Histogram:
    """Mean over subjects of the mean over their scans."""
    return np.asarray(np.mean([np.mean(h, axis=0) for h in by_subject.values()], axis=0))


def _interval(
    by_subject: dict[str, list[Histogram]], goal: Histogram, seed: int
) -> tuple[float, float]:
    """95 % bootstrap interval of the distance of the mean histogram, subjects drawn."""
    means = np.stack([np.mean(by_subject[s], axis=0) for s in sorted(by_subject)])
    picks = np.random.default_rng(seed).integers(0, len(means), (500, len(means)))
    distances = [histogram_distance(means[p].mean(axis=0), goal) for p in picks]
    low, high = np.quantile(distances, (0.025, 0.975))
    return float(low), float(high)
