"""`sgcd harmonize`: every planned scan through a pool of actors; the driver commits the rows."""

from __future__ import annotations

import dataclasses
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.catalog import Catalog
from pipelines.harmonize import Job, Row, blank_row
from pipelines.lake import Lake
from pipelines.ledger import forget_attempts, model_key, taken_back
from pipelines.plan import FAILED_AT_INDEX, LABELS, Plan, plan
from ray_jobs.commit import Committer
from ray_jobs.context import code_version, open_lake, quoted, tracked
from ray_jobs.harmonize_stream import Pool, harmonize_stream
from ray_jobs.models import alias_of, meta_of, pinned, resolve
from ray_jobs.outcome import DONE, WITH_FAILURES, Outcome, failure_line
from ray_jobs.preflight import need_of
from ray_jobs.prepare import PrepareJob
from ray_jobs.session import session
from ray_jobs.settings import over_model
from ray_jobs.site_looks import few_notes, site_looks

log = logging.getLogger(__name__)

#: Columns of `scans` that go to the workers.
WORK = ("scan_id", "dataset", "subject", "session", "site", "sequence", "uri")
#: Failed scans that are named at the end; the catalog has them all.
MOST_NAMED = 1000
#: Mean deviation over the seeds, of intensities in [0, 1], below which a map of it says nothing.
LEAST_SPREAD = 1e-3


@dataclass
class Tally:
    """What a run has done so far.

    Attributes:
        counts: Rows of each status.
        bad: Scans without an output, the first `MOST_NAMED`.
        flags: Flagged scans of each code.
        lesions: Scans whose lesion mask was honoured.
        spread: The largest mean of an uncertainty map; None without any.
    """

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[Row] = field(default_factory=list)
    flags: Counter[str] = field(default_factory=Counter)
    lesions: int = 0
    spread: float | None = None

    @property
    def failed(self) -> int:
        """Scans without an output."""
        return self.counts["failed"] + self.counts["quarantined"]

    def add(self, scan: Row, row: Row) -> None:
        """Count one row."""
        self.counts[row["status"]] += 1
        if row["status"] == "flagged":
            self.flags[row["code"]] += 1
        self.lesions += row.get("lesion_ml") is not None
        if (spread := row.get("uncertainty_mean")) is not None:
            self.spread = max(spread, self.spread or 0.0)
        if row["status"] not in ("ok", "flagged") and len(self.bad) < MOST_NAMED:
            kept = {name: row[name] for name in ("scan_id", "code", "message")}
            self.bad.append(kept | {"uri": scan["uri"]})

    def notes(self, lake: str, model: str, version: int) -> list[str]:
        """What a user should know of the outputs."""
        found = []
        if self.flags:
            codes = ", ".join(f"{n} {code}" for code, n in self.flags.most_common())
            named = model.replace("'", "''")
            ask = (
                "SELECT site, subject, sequence, message FROM results WHERE status = 'flagged' "
                f"AND model = '{named}' AND model_version = {version}"
            )
            ask = re.sub(r'(["$`\\])', r"\\\1", ask)  # as a shell reads it between these quotes
            query = f'sgcd query "{ask}" --lake {quoted(lake)}'
            found.append(f"note: flagged: {codes}; which and why: `{query}`.")
        return found + self._spread_note()

    def _spread_note(self) -> list[str]:
        if self.spread is None or self.spread >= LEAST_SPREAD:
            return []
        return [
            "note: what this model draws hardly depends on its noise (the seeds differ by "
            f"{self.spread:.1g} of the range): the uncertainty maps say nothing."
        ]


def run(args: Any) -> Outcome:
    """Plan, harmonize what is left to do, commit a row for every scan."""
    from pipelines.lesions import check_pattern
    from pipelines.training_data import check_sequences
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
    check_sequences(args.sequences or (), config.sequences)
    made = plan(
        catalog, model, version, sites=args.sites, sequences=args.sequences,
        known=config.sequences, only_new=args.only_new, retry_failed=args.retry_failed,
        force=args.force, only=only,
    )  # fmt: skip
    job = Job(
        lake=lake, model=model, version=version, target=target, config=config,
        code_version=code_version(), batch_id=uuid.uuid4().hex[:16], samples=args.samples,
        learned=None if learned is None else tuple(learned), lesions=args.lesions,
        deadline=args.scan_deadline,
    )  # fmt: skip
    planned, sentence = made.todo.num_rows, made.sentence()
    name = f"{model}@{version}"
    chosen = quoted(pinned(args.model, model, version))
    follow = f"sgcd evaluate --lake {quoted(args.lake)} --model {chosen}"
    data: Row = {
        "model": model, "version": version, "target": target,
        "planned": planned, "skipped": made.reasons(),
    }  # fmt: skip
    if args.dry_run:
        lines = [f"would harmonize {uri}" for uri in made.todo["uri"].to_pylist()]
        return Outcome(f"would harmonize with {name}: {sentence}", lines=lines, data=data)
    refused = list(_refused_at_index(catalog, job, made))
    if not planned and not refused:
        describe(lake, model, version)  # a run that was stopped may have left it undone
        return Outcome(f"nothing to harmonize with {name}: {sentence}", next=follow, data=data)
    tally = Tally()
    few: list[str] = []
    started = time.monotonic()
    tags = {"model": model, "version": version, "batch_id": job.batch_id, "asked": args.model}
    with tracked(lake, "harmonize", config, **tags) as (summary, tracker):
        if alias := alias_of(args.model):
            tracker.compare_alias(model, alias, version)
        with Committer(catalog, job) as commit:
            for row in refused:
                commit.add(row)
            if planned:
                with taken_back(lake, job.batch_id, job.key, preparing(job).key):
                    few = _harmonize(args, job, made, commit, tally)
        if tally.counts.total() != planned:  # a law of this program, not a user's mistake
            raise RuntimeError(f"{planned} scans went in, {tally.counts.total()} rows came out")
        summary.update(
            tally.counts, model=model, version=version, asked=args.model, failed=tally.failed,
            settings=args.settings,
        )  # fmt: skip
        found = {f"scans/{status}": float(n) for status, n in tally.counts.items()}
        tracker.log_metrics(found)
    describe(lake, model, version)
    seconds = time.monotonic() - started
    parts = ", ".join(f"{n} {status}" for status, n in tally.counts.most_common()) or "none"
    text = f"harmonized with {name}: {parts} of {planned} planned scans in {seconds:.0f} s"
    if tally.lesions:
        text += f", {tally.lesions} with a lesion mask"
    if refused:
        text += f"; {len(refused)} unusable scans noted"
    data |= {
        "counts": dict(tally.counts), "noted": len(refused), "lesion_masks": tally.lesions,
        "derivatives": lake.derivatives(job.key), "failed": tally.bad,
    }  # fmt: skip
    lines = [failure_line(row) for row in tally.bad]
    if tally.failed > len(tally.bad):
        lines.append(f"… and {tally.failed - len(tally.bad)} more: see the table `results`")
    if made.relabelled:
        lines.append(f"note: {made.relabelled} of them again: a label was corrected since.")
    lines += few + tally.notes(args.lake, model, version)
    code = WITH_FAILURES if tally.failed or refused else DONE
    return Outcome(text, next=follow, exit_code=code, lines=lines, data=data)


def _harmonize(args: Any, job: Job, made: Plan, commit: Committer, tally: Tally) -> list[str]:
    """Send every planned scan through the cluster's workers; notes about the sites' looks."""
    from pipelines.dataset_files import write_description
    from pipelines.derivative import output_names
    from pipelines.progress import Progress

    lake = job.lake
    if args.force:  # also what was set aside
        for key in (job.key, preparing(job).key):
            forget_attempts(lake, key, set(made.todo["scan_id"].to_pylist()))
    named = output_names(Catalog(lake), made.scans, job.model, job.version)
    work = in_order(made.todo.select(WORK))
    mine = pc.index_in(work["scan_id"], named["scan_id"])
    work = work.append_column("stem", named["stem"].take(mine))
    where = {"model": job.model, "model_version": job.version}
    before = Catalog(lake).rows("results", where=where).filter(pc.field("output_uri").is_valid())
    used = pc.field("scan_id").isin(pa.concat_arrays([
        *before["scan_id"].chunks, *work["scan_id"].chunks
    ]))  # fmt: skip
    links = write_description(
        lake.derivatives(job.key), job.key, job.code_version, _addresses(made.scans),
        _addresses(made.scans.filter(used)),
    )  # fmt: skip
    job = dataclasses.replace(job, links=links)
    share = args.gpu_fraction if args.gpus else 0.0
    with (
        session(
            args.ray_address, need_of("harmonize", job.config, args.workers, share), lake
        ) as ray,
        Progress("harmonize", work.num_rows) as progress,
    ):
        looks = {}
        if job.config.condition.match != "none":
            looks = site_looks(
                ray, made.scans, work, preparing(job), job.config, args.workers,
                again=args.force and getattr(args, "only", None) is None,
            )  # fmt: skip
        pool = Pool(args.workers, share, looks)
        for scan, row in harmonize_stream(ray, work, job, pool):
            commit.add(row)
            tally.add(scan, row)
            progress.update(1, **tally.counts)
    return few_notes(looks)


def preparing(job: Job) -> PrepareJob:
    """The preparation of scans that a harmonization measures looks on."""
    return PrepareJob(job.lake, job.config.prepare, job.batch_id, job.deadline)


def in_order(work: pa.Table) -> pa.Table:
    """By site and sequence, so that a commit adds a file to few partitions of `results`."""
    return work.sort_by([(name, "ascending") for name in ("site", "sequence", "scan_id")])


def _addresses(scans: pa.Table) -> list[Row]:
    """What tells which data sets scans lie in."""
    rows: list[Row] = scans.select(["uri", "subject"]).to_pylist()
    return rows


def describe(lake: Lake, model: str, version: int) -> None:
    """Bring the derivative up to date with the tables: its people, its citation, and no output
    under a label that its scan has no more.
    """
    from pipelines.cite import citation
    from pipelines.dataset_files import LOGS, write_changed, write_participants
    from pipelines.derivative import misnamed_outputs, participant_of
    from sgcd_core.io.store import Store, join

    catalog, where = Catalog(lake), {"model": model, "model_version": version}
    results = catalog.rows("results", where=where, columns=("scan_id", "output_uri"))
    results = results.filter(pc.field("output_uri").is_valid())
    done = results["scan_id"].combine_chunks()
    if not len(done):
        return
    whose = pa.array(map(participant_of, results["output_uri"].to_pylist()), pa.string())
    scans = catalog.rows("scans", columns=("scan_id", "uri", "age", "sex", *LABELS))
    mine = scans.filter(pc.field("scan_id").isin(done))
    at = pc.index_in(mine["scan_id"].combine_chunks(), done)
    mine = mine.append_column("participant", whose.take(at))
    root = lake.derivatives(model_key(model, version))
    misnamed = misnamed_outputs(catalog, scans, root, model, version)
    write_participants(
        root,
        (scan for batch in mine.to_batches(max_chunksize=10_000) for scan in batch.to_pylist()),
        gone={names.participant for names in misnamed},
    )  # fmt: skip
    for names in misnamed:
        log.info("event=misnamed_removed uri=%s", names.native)
        for uri in names.files:
            Store().delete(uri)
    text = citation(lake, model, version).encode()
    write_changed(Store(), join(root, LOGS, "CITATION.md"), text)


def _refused_at_index(catalog: Catalog, job: Job, made: Plan) -> Iterator[Row]:
    """Result rows of scans asked for that the index found unusable and that have none yet.

    A file that was repaired or replaced since has another scan, and that one a row.
    """
    results = catalog.rows("results", where={"model": job.model, "model_version": job.version})
    refused = made.skipped.filter(
        (pc.field("reason") == FAILED_AT_INDEX)
        & ~pc.field("scan_id").isin(results["scan_id"].combine_chunks())
    )
    for batch in refused.to_batches(max_chunksize=10_000):
        for scan in batch.to_pylist():
            yield blank_row(scan, job) | {"code": scan["code"], "message": scan["message"]}
