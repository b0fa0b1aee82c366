"""Task 2: do grey and white matter keep their volume and place when a scan is harmonized?

The same subject's brain is segmented as it is, by each method, and at the target site, by one
contrast-sensitive segmenter. Volumes (AP) and overlap (Dice) are compared with the segmentation of
the subject's own scan at the target, and, for digital subjects, with the truth.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.catalog import Catalog
from pipelines.evaluate import SPLIT, MethodImages, Truths, usable_results
from pipelines.lake import Lake
from pipelines.prepare import PreparedFiles, load_prepared
from pipelines.record_figures import record_figures
from pipelines.segment import (
    GREY,
    STEM,
    WHITE,
    Image,
    Labels,
    Mask,
    Segmenter,
    labels_on_grid,
    make_segmenter,
    tissues_of_truth,
)
from pipelines.truth import load_truth
from pipelines.verdict import Estimate, estimate, person
from sgcd_core.config import SgcdConfig
from sgcd_core.errors import InputError, SgcdError
from sgcd_core.io.nifti import read_nifti
from sgcd_core.io.store import Store, join
from sgcd_core.metrics import ap, dice

log = logging.getLogger(__name__)

Row = dict[str, Any]

#: Tissues that are scored, by `metrics.region`.
REGIONS = {"grey matter": GREY, "white matter": WHITE}
#: `metrics.reference` of a comparison with the digital truth; otherwise it is a scan_id.
TRUTH = "truth"


@dataclass(frozen=True)
class TissueLine:
    """One measure of one tissue at one site, by method.

    Attributes:
        site: Where the scans were taken; the target's own scans are compared with the truth only.
        sequence: BIDS suffix.
        seen: Whether the site is among the model's training sites; None when not known.
        region: Key of `REGIONS`.
        measure: `dice` or `ap`.
        against: `target`, the subject's own scan there, or `truth`.
        n: Subjects.
        by_method: Method → estimate.
    """

    site: str
    sequence: str
    seen: bool | None
    region: str
    measure: str
    against: str
    n: int
    by_method: dict[str, Estimate]


@dataclass(frozen=True)
class TissueSummary:
    """What Task 2 found.

    Attributes:
        segmenter: Its name.
        lines: By site, sequence, tissue, reference and measure.
        site_rows: Rows of `site_metrics`.
        pairs: Scans compared with the subject's scan at the target.
        truths: Scans compared with the truth.
        skipped: scan_id → code of scans that could not be compared.
        written: False when the same evaluation was in the tables already.
    """

    segmenter: str
    lines: list[TissueLine] = field(default_factory=list)
    site_rows: list[Row] = field(default_factory=list)
    pairs: int = 0
    truths: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    written: bool = False


def evaluate_tissue(
    lake: Lake,
    model: str,
    version: int,
    config: SgcdConfig,
    *,
    segmenter: str = "gmm",
    training_sites: Collection[str] | None = None,
    methods: Sequence[str] = ("raw", "nyul"),
    progress: Callable[[int, int], None] | None = None,
) -> TissueSummary:
    """Segment every test scan of a traveling subject by every method; write the tables.

    Args:
        lake: Where results, prepared scans and tables lie.
        model: Name in the registry.
        version: Version in the registry.
        config: Settings of the run; `config.prepare` names the prepared scans.
        segmenter: `gmm`, `kmeans` or a command line; see `segment.make_segmenter`.
        training_sites: The model's training sites; None leaves `seen` open.
        methods: Baselines beside the model; `raw` is always included.
        progress: Called with (scans done, scans in all).

    Raises:
        InputError: SEGMENTER-FAILED when the program failed on every scan.
        ConfigError: SEGMENTER-FAILED when its program does not exist or cannot be run.
        UsageError: The segmenter is no command line.
        ModelError: MODEL-MISSING when this version harmonized nothing.
        StorageError: A table or the store cannot be reached.
    """
    catalog = Catalog(lake)
    results = usable_results(catalog, model, version)
    job = _Job(
        lake, config, catalog.rows("scans").to_pylist(), results, make_segmenter(segmenter),
        training_sites, methods,
    )  # fmt: skip
    # A subject's scans together, so that its scan at the target is segmented once.
    results.sort(key=lambda r: (r["sequence"] or "", r["subject"] or "", r["scan_id"]))
    for number, result in enumerate(results, 1):
        job.score(result)
        if progress is not None:
            progress(number, len(results))
    if job.failure is not None and not job.metrics:
        raise job.failure
    base = {"model": model, "model_version": version, "target": job.target}
    lines = tissue_lines(job.metrics, config.seed)
    sites = [base | row for row in _site_rows(lines, job.segmenter.name)]
    # The segmenter is part of the measure: two segmenters' figures are not one series.
    name = job.segmenter.name
    rows = [base | r | {"metric": f"{r['metric']}.{name}"} for r in job.metrics]

    def mine(metric: str) -> bool:
        return metric.startswith(("dice.", "ap.")) and metric.endswith(f".{name}")

    lost = job.methods.lost(job.skipped)
    written = record_figures(catalog, "metrics", base, rows, mine, lost)
    written |= record_figures(catalog, "site_metrics", base, sites, mine, lost)
    return TissueSummary(name, lines, sites, job.pairs, job.truths, job.skipped, written)


def compare(labels: Labels, reference: Labels, where: Mask) -> Iterable[tuple[str, str, float]]:
    """(region, measure, value) of a segmentation against a reference, inside `where`.

    AP of a tissue that the reference lacks is NaN. Both are (X, Y, Z) on one grid; unit 1.
    """
    for region, tissue in REGIONS.items():
        a, b = (labels == tissue) & where, (reference == tissue) & where
        yield region, "dice", dice(a, b)
        yield region, "ap", ap(float(a.sum()), float(b.sum())) if b.any() else float("nan")


class _Job:
    """One evaluation of tissues: a few volumes at a time."""

    def __init__(
        self,
        lake: Lake,
        config: SgcdConfig,
        scans: list[Row],
        results: list[Row],
        segmenter: Segmenter,
        training_sites: Collection[str] | None,
        methods: Sequence[str],
    ) -> None:
        self.lake, self.segmenter, self.scans = lake, segmenter, scans
        self.config, self.recipe = config, config.prepare.digest()
        self.by_id = {s["scan_id"]: s for s in scans}
        self.target: str | None = next((r["target"] for r in results if r["target"]), None)
        self.training_sites = None if training_sites is None else frozenset(training_sites)
        self.pairing = Truths(scans, self.target)
        self.methods = MethodImages(lake, self.recipe, scans, self.target, methods)
        self.metrics: list[Row] = []
        self.skipped: dict[str, str] = {}
        self.failure: InputError | None = None
        self.pairs = self.truths = 0
        self._targets: set[str] = set()
        self._repositioned: dict[str, bool] = {}

    def score(self, result: Row) -> None:
        """Segment one scan by every method, and compare; a scan that cannot be is named."""
        scan = self.by_id.get(result["scan_id"])
        if scan is None or scan["site"] is None:
            return
        other = self.pairing.of(scan)
        if other is None:
            if self.pairing.split_apart(scan):
                self.skipped[scan["scan_id"]] = SPLIT
            return
        try:
            self._score(scan, result, other)
        except InputError as error:
            if error.code == "SEGMENTER-FAILED":
                self.failure = error
            self._skip(scan, error)
        except SgcdError as error:
            if error.code == "SEGMENTER-FAILED":  # it cannot be run at all
                raise
            self._skip(scan, error)

    def _skip(self, scan: Row, error: SgcdError) -> None:
        log.warning("tissue=skipped scan=%s code=%s", scan["scan_id"], error.code)
        self.skipped[scan["scan_id"]] = error.code

    def _score(self, scan: Row, result: Row, other: Row) -> None:
        prepared = load_prepared(self.lake, self.recipe, scan["scan_id"])
        images = self.methods.of(scan, result, prepared)
        found = {name: self._segment(i, prepared, scan) for name, i in images.items()}
        self._score_target(other)
        inside, wanted = self._at_target(other, prepared)
        both = prepared.mask & inside
        if not both.any():
            raise InputError("the two scans do not overlap.", code="SCAN-REGISTRATION")
        self.pairs += 1
        for method, labels in found.items():
            self._add(scan, method, other["scan_id"], compare(labels, wanted, both))
        truth = self._truth(scan, prepared)
        if truth is not None:
            self.truths += 1
            for method, labels in found.items():
                self._add(scan, method, TRUTH, compare(labels, truth, _scored(truth, prepared)))

    def _segment(self, image: Image, prepared: PreparedFiles, scan: Row) -> Labels:
        grid = np.array(prepared.geometry.model_affine)
        return self.segmenter.segment(image, prepared.mask, scan["sequence"], grid)

    def _at_target(self, other: Row, own: PreparedFiles) -> tuple[NDArray[np.bool_], Labels]:
        """The subject's scan at the target, on the voxels of `own`: brain, and segmentation."""
        image, mask = load_truth(self.lake, self.config.prepare, other, own)
        grid = np.array(own.geometry.model_affine)
        return mask, self.segmenter.segment(image, mask, other["sequence"], grid)

    def _score_target(self, other: Row) -> None:
        """The target's own scan against the truth, once: what no harmonization can be held to."""
        if other["scan_id"] in self._targets:
            return
        self._targets.add(other["scan_id"])
        prepared = load_prepared(self.lake, self.recipe, other["scan_id"])
        truth = self._truth(other, prepared)
        if truth is not None:
            labels = self._segment(prepared.image, prepared, other)
            self._add(other, "raw", TRUTH, compare(labels, truth, _scored(truth, prepared)))

    def _add(
        self, scan: Row, method: str, reference: str, values: Iterable[tuple[str, str, float]]
    ) -> None:
        site = scan["site"]
        seen = None if self.training_sites is None else site in self.training_sites
        for region, measure, value in values:
            self.metrics.append(
                {
                    "scan_id": scan["scan_id"], "dataset": scan["dataset"],
                    "subject": scan["subject"], "site": site, "sequence": scan["sequence"],
                    "method": method, "metric": measure,
                    "value": value, "unit": "1", "region": region, "reference": reference,
                    "seen": seen,
                }
            )  # fmt: skip

    def _truth(self, scan: Row, prepared: PreparedFiles) -> Labels | None:
        """The subject's true tissues on the scan's model grid; None when there is no truth."""
        root, _, rest = scan["uri"].rpartition(f"/sub-{scan['subject']}/")
        if not rest:
            return None
        name = f"sub-{scan['subject']}"
        uri = join(root, "derivatives", "truth", name, "anat", f"{name}_desc-tissue_dseg.nii.gz")
        if not Store().exists(uri) or self._moved(root):
            return None
        found = read_nifti(uri)
        tissues = tissues_of_truth(np.rint(found.data))
        world = prepared.geometry.model_world_affine()
        return labels_on_grid(tissues, found.affine, world, prepared.mask.shape)

    def _moved(self, root: str) -> bool:
        """Whether the cohort's scans were repositioned, so that the truth lies elsewhere."""
        if root not in self._repositioned:
            where = join(root, "derivatives", "truth", "cohort.json")
            try:
                request = json.loads(Store().read_bytes(where, max_bytes=1_000_000))
                moved = float(request["shift"]) != 0
            except (InputError, ValueError, KeyError, TypeError):
                moved = True
            if moved:
                log.warning("tissue=no-truth reason=scans are not where the truth is")
            self._repositioned[root] = moved
        return self._repositioned[root]


def _scored(truth: Labels, prepared: PreparedFiles) -> Mask:
    """Where truth and brain mask agree that there is brain; the stem is neither grey nor white."""
    where: Mask = prepared.mask & (truth > 0) & (truth != STEM)
    return where


def tissue_lines(rows: Sequence[Row], seed: int = 0) -> list[TissueLine]:
    """Means over subjects with intervals, by site, sequence, tissue, reference and measure."""
    groups: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
    for row in rows:
        against = TRUTH if row["reference"] == TRUTH else "target"
        key = (
            row["sequence"] or "", {True: 0, False: 1, None: 2}[row["seen"]], row["site"],
            against, row["region"], row["metric"],
        )  # fmt: skip
        groups.setdefault(key, {}).setdefault(row["method"], []).append(row)
    lines = []
    for (sequence, _, site, against, region, measure), methods in sorted(groups.items()):
        longest = max(methods.values(), key=len)
        lines.append(
            TissueLine(
                site, sequence, longest[0]["seen"], region, measure, against,
                n=len({person(r) for r in longest}),
                by_method={m: estimate(found, seed) for m, found in methods.items()},
            )
        )  # fmt: skip
    return lines


def _site_rows(lines: Sequence[TissueLine], segmenter: str) -> list[Row]:
    """`site_metrics` without the model's columns; metrics as `dice.grey_matter.target.gmm`."""
    out = []
    for line in lines:
        metric = f"{line.measure}.{line.region.replace(' ', '_')}.{line.against}.{segmenter}"
        for method, found in line.by_method.items():
            out.append(
                {
                    "site": line.site, "sequence": line.sequence, "method": method,
                    "metric": metric, "before": line.by_method["raw"].mean,
                    "after": found.mean, "low": found.low, "high": found.high, "n": line.n,
                    "seen": line.seen,
                }
            )  # fmt: skip
    return out
