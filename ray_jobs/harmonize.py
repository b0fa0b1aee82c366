"""`sgcd harmonize`: every planned scan through a pool of actors; the driver commits the rows."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import pickle
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pipelines.catalog import Catalog
from pipelines.harmonize import Job, Row, blank_row
from pipelines.lake import Lake
from pipelines.ledger import end_attempts, model_key
from ray_jobs.context import code_version, open_lake, quoted, tracked
from ray_jobs.models import alias_of, meta_of, pinned, resolve
from ray_jobs.outcome import DONE, WITH_FAILURES, Outcome, failure_line
from ray_jobs.preflight import need_of
from ray_jobs.session import cpu_count, session
from ray_jobs.settings import over_model
from ray_jobs.site_looks import site_looks
from ray_jobs.volume_stream import packed
from sgcd_core.config import SgcdConfig

log = logging.getLogger(__name__)

#: Rows per commit and the longest a finished row waits for one.
COMMIT_ROWS, COMMIT_SECONDS = 32, 15.0


def run(args: Any) -> Outcome:
    """Plan, harmonize what is left to do, commit a row for every scan."""
    from pipelines.dataset_files import write_description
    from pipelines.derivative import stems
    from pipelines.lesions import check_pattern
    from pipelines.plan import plan
    from pipelines.progress import Progress
    from sgcd_core.io.store import Store
    from sgcd_core.modelpack import load_modelpack

    check_pattern(args.lesions)
    lake = open_lake(args.lake)
    only = getattr(args, "only", None)  # of the BIDS App: these scans, into that folder
    lake = dataclasses.replace(lake, outputs=getattr(args, "outputs", None))
    catalog = Catalog(lake)
    model, version = resolve(lake, args.model)
    meta = meta_of(lake, model, version)
    target, learned = meta.get("target"), meta.get("sequences")
    config = over_model(args, load_modelpack(lake.model(model, version), Store()).config)
    todo = plan(
        catalog, model, version, sites=args.sites, sequences=args.sequences or config.sequences,
        only_new=args.only_new, force=args.force, only=only,
    )  # fmt: skip
    job = Job(
        lake=lake, model=model, version=version, target=target, config=config,
        code_version=code_version(), batch_id=uuid.uuid4().hex[:16], samples=args.samples,
        learned=None if learned is None else tuple(learned), lesions=args.lesions,
    )  # fmt: skip
    scans = catalog.rows("scans").to_pylist()
    named = stems(scans)
    work = [scan | {"stem": named[scan["scan_id"]]} for scan in todo.todo]
    refused = _refused_at_index(catalog, job, todo, scans)
    root = lake.derivatives(job.key)
    name = f"{model}@{version}"
    chosen = quoted(pinned(args.model, model, version))
    follow = f"sgcd evaluate --lake {quoted(args.lake)} --model {chosen}"
    data: Row = {
        "model": model, "version": version, "target": target,
        "planned": len(work), "skipped": todo.reasons(),
    }  # fmt: skip
    if args.dry_run:
        lines = [f"would harmonize {scan['uri']}" for scan in work]
        return Outcome(f"would harmonize with {name}: {todo.sentence()}", lines=lines, data=data)
    if not work and not refused:
        describe(lake, model, version)  # a run that was stopped may have left it undone
        return Outcome(
            f"nothing to harmonize with {name}: {todo.sentence()}", next=follow, data=data
        )
    counts: Counter[str] = Counter()
    bad: list[Row] = []
    lesions = 0
    started = time.monotonic()
    tags = {"model": model, "version": version, "batch_id": job.batch_id, "asked": args.model}
    need = need_of("harmonize", config, args.workers, args.gpus)
    with tracked(lake, "harmonize", config, **tags) as (summary, tracker):
        if alias := alias_of(args.model):
            tracker.compare_alias(model, alias, version)
        commit = Committer(catalog, job)
        for row in refused:
            commit.add(row)
        if work:
            where = {"model": model, "model_version": version}
            before = catalog.rows("results", where=where).to_pylist()
            written = {row["scan_id"] for row in before if row["output_uri"]}
            used = work + [scan for scan in scans if scan["scan_id"] in written]
            links = write_description(root, job.key, job.code_version, scans, used)
            job = dataclasses.replace(job, links=links)
            with (
                session(args.ray_address, need, lake) as ray,
                Progress("harmonize", len(work)) as progress,
                commit,
            ):
                looks = {}
                if config.condition.match != "none":
                    looks = site_looks(
                        ray, scans, work, lake, config, args.workers or cpu_count(),
                        again=args.force,
                    )  # fmt: skip
                work = [
                    scan | {"site_look": looks.get((scan["site"], scan["sequence"]))}
                    for scan in work
                ]
                for row in harmonize_stream(ray, work, job, args.workers, args.gpus):
                    commit.add(row)
                    counts[row["status"]] += 1
                    lesions += row.get("lesion_ml") is not None
                    if row["status"] not in ("ok", "flagged"):
                        uris = {scan["scan_id"]: scan["uri"] for scan in work}
                        bad.append(row | {"uri": uris[row["scan_id"]]})
                    progress.update(1, **counts)
        commit.flush()
        if counts.total() != len(work):  # a law of this program, not a user's mistake
            raise RuntimeError(f"{len(work)} scans went in, {counts.total()} rows came out")
        failed = counts["failed"] + counts["quarantined"]
        summary.update(
            counts, model=model, version=version, asked=args.model, failed=failed,
            settings=args.settings,
        )  # fmt: skip
        tracker.log_metrics({f"scans/{status}": float(n) for status, n in counts.items()})
    describe(lake, model, version)
    seconds = time.monotonic() - started
    parts = ", ".join(f"{n} {status}" for status, n in counts.most_common()) or "none"
    text = f"harmonized with {name}: {parts} of {len(work)} planned scans in {seconds:.0f} s"
    if lesions:
        text += f", {lesions} with a lesion mask"
    if refused:
        text += f"; {len(refused)} unusable scans noted"
    data |= {
        "counts": dict(counts), "noted": len(refused), "lesion_masks": lesions,
        "derivatives": root,
        "failed": [{k: row[k] for k in ("scan_id", "uri", "code", "message")} for row in bad],
    }  # fmt: skip
    lines = [failure_line(row) for row in bad]
    if args.samples > 1 and not uses_noise(config, target):
        lines.append("note: the sampler of these settings uses no noise: all seeds agree.")
    code = WITH_FAILURES if bad or refused else DONE
    return Outcome(text, next=follow, exit_code=code, lines=lines, data=data)


def describe(lake: Lake, model: str, version: int) -> None:
    """Bring participants.tsv and the citation of the derivative up to date; from the tables."""
    from pipelines.cite import citation
    from pipelines.dataset_files import LOGS, write_changed, write_participants
    from sgcd_core.io.store import Store, join

    catalog, where = Catalog(lake), {"model": model, "model_version": version}
    results = catalog.rows("results", where=where).to_pylist()
    if not any(row["output_uri"] for row in results):
        return
    root = lake.derivatives(model_key(model, version))
    write_participants(root, catalog.rows("scans").to_pylist(), results)
    text = citation(lake, model, version).encode()
    write_changed(Store(), join(root, LOGS, "CITATION.md"), text)


def uses_noise(config: SgcdConfig, target: str | None) -> bool:
    """Whether two seeds of the sampler can give two outputs."""
    samplers = [config.global_sampler] if target is None else [
        config.global_sampler, config.target_sampler,
    ]  # fmt: skip
    return any(sampler.start == "noise" for sampler in samplers)


def harmonize_stream(
    ray: Any, work: list[Row], job: Job, workers: int | None, gpus: bool
) -> Iterator[Row]:
    """Yield one row per scan of `work`, in the order they are done."""
    from ray_jobs.actors import HarmonizeActor

    places = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1))
    # On CPUs one place stays free: the tasks that feed the actors would starve otherwise.
    count = workers or (places if gpus else max(1, places - 1))
    count = min(count, len(work))
    # A block a scan: a lost worker costs one scan, and the plan spreads evenly.
    items = ray.data.from_items([packed(scan) for scan in work], override_num_blocks=len(work))
    rows = items.map(
        HarmonizeActor,
        fn_constructor_kwargs={"job": job, "workers": min(count, cpu_count()), "gpus": gpus},
        compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=1,
        num_gpus=1 if gpus else None,
    )
    for batch in rows.iter_batches(batch_size=1, prefetch_batches=0, batch_format="numpy"):
        yield pickle.loads(batch["row"][0])


class Committer:
    """Appends finished rows in batches; what is finished is kept even when the run is stopped."""

    def __init__(self, catalog: Catalog, job: Job) -> None:
        self._catalog, self._job = catalog, job
        self._rows: list[Row] = []
        self._last = time.monotonic()

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def add(self, row: Row) -> None:
        """Keep `row` for the next commit."""
        self._rows.append(row)
        waited = time.monotonic() - self._last
        if len(self._rows) >= COMMIT_ROWS or waited >= COMMIT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Commit what waits, then forget the tries of scans that are settled."""
        rows, self._rows, self._last = self._rows, [], time.monotonic()
        if not rows:
            return
        text = "\n".join(sorted(f"{row['scan_id']} {row['finished_at']}" for row in rows))
        txn = (
            f"{self._job.key}-{self._job.batch_id}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        )
        self._catalog.append("results", rows, txn=txn)
        for row in rows:
            if row["status"] != "quarantined":
                end_attempts(self._job.lake, self._job.key, row["scan_id"])


def _refused_at_index(catalog: Catalog, job: Job, todo: Any, scans: list[Row]) -> list[Row]:
    """Result rows of scans that the index found unusable and that have none yet."""
    where = {"model": job.model, "model_version": job.version}
    have = set(catalog.rows("results", where=where)["scan_id"].to_pylist())
    by_id = {scan["scan_id"]: scan for scan in scans}
    return [
        blank_row(by_id[skip.scan_id], job) | {"code": skip.code, "message": skip.message}
        for skip in todo.skipped
        if skip.reason == "failed at index" and skip.scan_id not in have
    ]
