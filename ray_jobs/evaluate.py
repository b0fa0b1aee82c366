"""`sgcd evaluate`: Task 1 voxels, Task 2 tissues, Task 3 sites and ages; into tables, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray_jobs.context import code_version, open_lake, quoted, tracked
from ray_jobs.outcome import DONE, WITH_FAILURES, Outcome, table
from sgcd_core.errors import UsageError
from sgcd_core.words import counted

if TYPE_CHECKING:
    from pipelines.downstream import DownstreamLine, Repeated
    from pipelines.evaluate import EvaluationSummary
    from pipelines.lake import Lake
    from pipelines.tissue import TissueLine
    from pipelines.verdict import Estimate, Line
    from sgcd_core.config import SgcdConfig

Row = dict[str, Any]

#: The last column of tables of means over subjects.
INTERVAL = "sgcd, 95 %"
_SEEN = {True: "yes", False: "no", None: "-"}


@dataclass(frozen=True)
class _Part:
    """What one task hands on: tables to print, a part of the summary line, rows, data."""

    lines: list[str]
    text: str
    rows: list[Row]
    skipped: dict[str, str]
    written: bool
    data: Row = field(default_factory=dict)
    found: EvaluationSummary | None = None


@dataclass(frozen=True)
class _Question:
    """What is the same for all tasks."""

    args: Any
    lake: Lake
    name: str
    version: int
    config: SgcdConfig
    sites: list[str] | None

    @property
    def images(self) -> list[str]:
        """The methods that are applied to images."""
        return [method for method in self.args.methods if method != "combat"]


def run(args: Any) -> Outcome:
    """`sgcd evaluate`: figures per scan and per site into the catalog, the verdict in words."""
    from pipelines.record_figures import unread
    from pipelines.run_figures import run_figures
    from pipelines.training_data import prepared_ids
    from ray_jobs.models import meta_of, pinned, resolve
    from ray_jobs.settings import over_model
    from sgcd_core.io.store import Store
    from sgcd_core.modelpack import load_modelpack

    for option, task in (("segmenter", 2), ("features", 3)):
        if getattr(args, option) is not None and task not in args.tasks:
            raise UsageError(f"--{option} belongs to task {task}: add --tasks {task}.")
    lake = open_lake(args.lake)
    name, version = resolve(lake, args.model)
    config = over_model(args, load_modelpack(lake.model(name, version), Store()).config)
    sites = meta_of(lake, name, version).get("training_sites")
    check_tools(args)  # before hours of another task
    if args.dry_run:
        return Outcome(f"would evaluate {name}@{version}")
    question = _Question(args, lake, name, version, config, sites)
    with tracked(lake, "evaluate", config, model=name, version=version) as (summary, tracker):
        parts = [{1: _voxels, 2: _tissues, 3: _downstream}[task](question) for task in args.tasks]
        rows = [row for part in parts for row in part.rows]
        tracker.log_metrics(
            {
                f"{row['site'] or 'all'}/{row['sequence']}/{row['method']}/{row['metric']}": value
                for row in rows
                if isinstance(value := row["after"], float)
            }
        )
        for part in parts:
            if part.found is not None and tracker.run_id is not None:
                drawn = run_figures(lake, part.found)
                for figure, png in drawn.items():
                    tracker.log_figure(figure, png)
        skipped = {scan: code for part in parts for scan, code in part.skipped.items()}
        pairs = next((part.data["pairs"] for part in parts if "pairs" in part.data), None)
        lost = unread(skipped)
        summary.update(
            model=name, version=version, tasks=list(args.tasks), pairs=pairs, skipped=len(skipped),
            failed=len(lost),
        )  # fmt: skip
    text = f"evaluated {name}@{version}: {'; '.join(part.text for part in parts)}"
    if skipped:
        text += f", {len(skipped)} could not be compared"
    text += "" if any(part.written for part in parts) else " (already in the tables)"
    data: Row = {"model": name, "version": version, "tasks": list(args.tasks)}
    for part in parts:
        data |= part.data
    data |= {"skipped": skipped, "rows": rows}
    chosen = quoted(pinned(args.model, name, version))
    follow = f"sgcd report --lake {quoted(args.lake)} --model {chosen}"
    if lost:
        text += f"; {len(lost)} could not be read: figures of before stay"
        if "SCAN-MISSING" in skipped.values():  # in `prepared`, or an output
            redo = lost <= prepared_ids(lake, config.prepare.digest())
            follow = f"sgcd prepare --lake {quoted(args.lake)}"
            if redo:
                follow = f"sgcd harmonize --lake {quoted(args.lake)} --model {chosen} --force"
    return Outcome(
        text, next=follow, exit_code=WITH_FAILURES if lost else DONE,
        lines=[x for part in parts for x in part.lines], data=data,
    )  # fmt: skip


def check_tools(args: Any) -> None:
    """Refuse a segmenter, features or ComBat that are not there, as their tasks would.

    Raises:
        UsageError, ConfigError, ModelError, StorageError: What is wrong with them.
    """
    if args.segmenter is not None:
        from pipelines.segment import make_segmenter

        make_segmenter(args.segmenter)
    if args.features is not None:
        from pipelines.features import load_features

        load_features(args.features)
    if 3 in args.tasks and "combat" in args.methods:
        from pipelines.downstream import combat_class

        combat_class()


def _voxels(q: _Question) -> _Part:
    """Task 1: traveling subjects, voxel by voxel."""
    from pipelines.evaluate import evaluate
    from pipelines.model_figures import write_figures
    from pipelines.progress import Progress

    with Progress("evaluate", None) as progress:
        found = evaluate(
            q.lake, q.name, q.version, q.config, training_sites=q.sites, methods=q.images,
            progress=progress.reach,
        )  # fmt: skip
    shown = before_after(found.summary.lines) or distance_table(found.site_rows)
    figures = write_figures(q.lake, found, code_version())
    return _Part(
        ["", *shown, *([""] if shown else []), *found.verdict, ""],
        f"{counted(found.pairs, 'scan')} compared with the truth",
        found.site_rows, found.skipped, found.written,
        {"pairs": found.pairs, "verdict": found.verdict, "table": shown, "figures": figures},
        found,
    )  # fmt: skip


def _tissues(q: _Question) -> _Part:
    """Task 2: grey and white matter."""
    from pipelines.progress import Progress
    from pipelines.tissue import evaluate_tissue

    with Progress("tissues", None) as progress:
        found = evaluate_tissue(
            q.lake, q.name, q.version, q.config, segmenter=q.args.segmenter or "gmm",
            training_sites=q.sites, methods=q.images, progress=progress.reach,
        )  # fmt: skip
    shown = tissue_table(found.lines)
    if not shown:
        shown = ["No test subject was also scanned at the target site: no tissue is compared."]
    return _Part(
        ["", f"Tissues as segmented by {found.segmenter}; higher is closer:", "", *shown, ""],
        f"tissues of {counted(found.pairs, 'scan')} compared with the target's, "
        f"of {found.truths} with the truth",
        found.site_rows, found.skipped, found.written,
        {"tissue_pairs": found.pairs, "tissue_truths": found.truths, "tissue_table": shown},
    )  # fmt: skip


def _downstream(q: _Question) -> _Part:
    """Task 3: site classification and brain age."""
    from pipelines.downstream import evaluate_downstream
    from pipelines.progress import Progress

    with Progress("downstream", None) as progress:
        found = evaluate_downstream(
            q.lake, q.name, q.version, q.config, features=q.args.features or "auto",
            methods=q.args.methods, progress=progress.reach,
        )  # fmt: skip
    shown = downstream_table(found.lines)
    scans = {line.sequence: line.scans for line in found.lines}
    return _Part(
        ["", f"Site and age from features of {found.features} (mean ± standard deviation of five "
         "random partitions):", "", *shown, *([""] if shown else []), *found.notes, ""],
        f"site and age told from {counted(sum(scans.values()), 'scan')} by {found.features}",
        found.site_rows, found.skipped, found.written,
        {"features": found.features, "downstream_notes": found.notes, "downstream_table": shown},
    )  # fmt: skip


def before_after(lines: Sequence[Line]) -> list[str]:
    """One row per site, sequence and measure: every method's mean over subjects, and the bootstrap
    interval of the model's.
    """
    if not lines:  # no traveling subject: the verdict says so
        return []
    methods = _methods(line.by_method for line in lines)
    rows = [
        [
            line.site, line.sequence, _SEEN[line.seen], line.metric, line.n,
            *_cells(line.metric, line.n, line.by_method, methods),
        ]
        for line in lines
    ]  # fmt: skip
    return table(["site", "sequence", "seen", "measure", "subjects", *methods, INTERVAL], rows)


def distance_table(rows: Iterable[Row]) -> list[str]:
    """One row per site and sequence: by every method the distance of the site's mean histogram to
    the target's, and the bootstrap interval of the model's. For lakes without a truth.
    """
    from pipelines.verdict import SITE_DISTANCE, Estimate

    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["metric"] == SITE_DISTANCE:
            found.setdefault((row["sequence"], row["site"]), []).append(row)
    if not found:
        return []
    lines = [
        (group[0], {r["method"]: Estimate(r["after"], r["low"], r["high"]) for r in group})
        for _, group in sorted(found.items())
    ]
    methods = _methods(by_method for _, by_method in lines)
    body = [
        [
            first["site"], first["sequence"], _SEEN[first["seen"]], SITE_DISTANCE, first["n"],
            *_cells(SITE_DISTANCE, first["n"], by_method, methods),
        ]
        for first, by_method in lines
    ]  # fmt: skip
    return table(["site", "sequence", "seen", "measure", "subjects", *methods, INTERVAL], body)


def tissue_table(lines: Sequence[TissueLine]) -> list[str]:
    """One row per site, sequence, tissue, measure and reference; as `before_after`."""
    if not lines:
        return []
    methods = _methods(line.by_method for line in lines)
    rows = [
        [
            line.site, line.sequence, _SEEN[line.seen], line.region, line.measure, line.against,
            line.n, *_cells(line.measure, line.n, line.by_method, methods),
        ]
        for line in lines
    ]  # fmt: skip
    head = ["site", "sequence", "seen", "tissue", "measure", "against", "subjects", *methods]
    return table([*head, INTERVAL], rows)


def _cells(
    measure: str, subjects: int, by_method: dict[str, Estimate], methods: Sequence[str]
) -> list[str]:
    """Every method's mean, then the interval of the model's; none of one subject."""
    from pipelines.verdict import number

    means = [number(measure, by_method[m].mean) if m in by_method else "-" for m in methods]
    model = by_method.get("sgcd")
    if model is None or subjects < 2:
        return [*means, "-"]
    return [*means, f"{number(measure, model.low)} to {number(measure, model.high)}"]


def downstream_table(lines: Sequence[DownstreamLine]) -> list[str]:
    """One row per sequence and measure: every method, chance and shuffled labels."""
    if not lines:
        return []
    methods = _methods(line.by_method for line in lines)

    def text(found: Repeated | None) -> str:
        return "-" if found is None else f"{found.mean:.3f} ± {found.std:.3f}"

    rows = [
        [
            line.sequence, line.measure, line.classes or "-", line.subjects, line.scans,
            *(text(line.by_method.get(m)) for m in methods),
            "-" if line.chance is None else f"{line.chance:.3f}", text(line.shuffled),
        ]
        for line in lines
    ]  # fmt: skip
    head = ["sequence", "measure", "sites", "subjects", "scans", *methods, "chance", "shuffled"]
    return table(head, rows)


def _methods(found: Iterable[dict[str, Any]]) -> list[str]:
    """All methods: raw first, the model last."""
    return sorted({m for by in found for m in by}, key=lambda m: (m == "sgcd", m != "raw", m))
