"""The commands that need no cluster: each parses nothing and computes nothing, it only asks."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray_jobs.context import absolute, open_lake, quoted, recorded
from ray_jobs.outcome import DONE, WITH_FAILURES, Outcome, failure_line, table
from ray_jobs.settings import from_args
from sgcd_core.config import load_config
from sgcd_core.errors import REPLACED, InputError, ModelError, StorageError, UsageError
from sgcd_core.words import counted


def check(args: Any) -> Outcome:
    """`sgcd check`: a line and a stable code for each scan; needs no lake."""
    from pipelines.check import check_uris, render_lines
    from pipelines.progress import Progress

    config = load_config(args.preset, args.config, args.settings).prepare
    with Progress("check", None) as progress:
        rows = check_uris(args.scans, config=config, progress=progress.reach)
    unfit = [row for row in rows if not row["usable"]]
    text = f"{len(rows) - len(unfit)} of {len(rows)} scans can be used"
    codes = Counter(row["code"] for row in unfit)
    if codes:
        text += f" ({', '.join(f'{n} {code}' for code, n in codes.most_common())})"
    if not unfit:
        code, follow = DONE, "sgcd index SOURCE --lake LAKE"
    elif len(unfit) < len(rows):
        code, follow = WITH_FAILURES, "sgcd index SOURCE --lake LAKE"
    else:  # nothing here can be used: the data, or the store they should lie in
        away = [str(name).startswith("STORE-") and name != "STORE-EMPTY" for name in codes]
        code = StorageError.exit_code if all(away) else InputError.exit_code
        follow = ""
    lines = render_lines(rows)
    return Outcome(text, next=follow, exit_code=code, lines=lines, data={"scans": rows})


def cohort(args: Any) -> Outcome:
    """`sgcd cohort`: a BIDS tree of digital traveling subjects."""
    from pipelines.cohort.make import make_cohort
    from pipelines.progress import Progress
    from ray_jobs.cpus import cpu_count

    with Progress("cohort", None) as progress:

        def tell(done: int, total: int, subject: str) -> None:
            progress.reach(done, total)

        made = make_cohort(
            absolute(args.out), subjects=args.subjects, sites=args.sites,
            traveling=args.traveling, unseen_sites=args.unseen_sites,
            anatomy=args.anatomy and absolute(args.anatomy), mm=args.mm, seed=args.seed,
            head=args.head, progress=tell, workers=args.workers or cpu_count(),
            dry_run=args.dry_run,
        )  # fmt: skip
    new = f"{made.written} {'to be made' if args.dry_run else 'new'}"
    text = (
        f"{made.scans} scans of {made.subjects} + {made.traveling} subjects at "
        f"{len(made.sites)} + {len(made.unseen_sites)} sites in {args.out} ({new})"
    )
    follow = "" if args.dry_run else f"sgcd index {quoted(args.out)} --lake LAKE"
    return Outcome(text, next=follow, data=made.row())


def index(args: Any) -> Outcome:
    """`sgcd index`: sources into the table `scans`; a bad scan is a row that says why."""
    from pipelines.catalog import Catalog
    from pipelines.lake import Lake
    from pipelines.manifest import index_sources, latest_by_uri
    from pipelines.plan import LABELS
    from pipelines.progress import Progress
    from pipelines.training_data import forget_prepared
    from sgcd_core.io.store import Store

    # The lake is made only once the sources are known to hold something.
    lake = Lake(absolute(args.lake))
    exists = Store().exists(lake.marker)
    sources = [source if "://" in source else absolute(source) for source in args.sources]
    if not exists and lake.uri in map(absolute, sources):
        raise UsageError(
            "the lake would lie in the source itself, among the raw data.", where=lake.uri,
            hint="Give --lake a folder of its own.",
        )  # fmt: skip
    config = from_args(args, lake).prepare
    known = Catalog(lake).rows("scans").to_pylist() if exists else []
    with Progress("index", None) as progress:
        found = index_sources(
            sources,
            site_from=args.site_from, sequences=args.sequences, known=known, config=config,
            progress=progress.reach,
        )  # fmt: skip
    # what a file held before it was repaired or replaced is no scan any more
    rows = [row for row in found.rows if row["code"] != REPLACED]
    bad = [row for row in rows if row["status"] != "ok"]
    was = {row["scan_id"]: row for row in known}
    again = [(was[row["scan_id"]], row) for row in rows if row["scan_id"] in was]
    corrected = sum(any(old[name] != row[name] for name in LABELS) for old, row in again)
    notes = list(found.notes)
    if corrected:
        notes.append(
            f"{counted(corrected, 'scan')} of another subject, session, site or sequence than "
            "before; what has a result is harmonized again"
        )
    lines = [f"note: {note}" for note in notes] + [failure_line(row) for row in bad]
    sites = Counter(row["site"] or "-" for row in rows if row["status"] == "ok")
    before = latest_by_uri(known)
    unfit = sum(before[uri]["status"] != "ok" for uri in found.unchanged)
    text = f"{counted(len(rows), 'scan')} new or changed"
    text += f", {len(bad)} of them cannot be used" if bad else ""
    text += f", {len(found.unchanged)} unchanged"
    text += f", {unfit} of them cannot be used" if unfit else ""
    if sites:
        text += f"; sites: {', '.join(f'{site} {n}' for site, n in sorted(sites.items()))}"
    usable = [row["site"] for row in rows if row["status"] == "ok"]
    usable += [before[uri]["site"] for uri in found.unchanged if before[uri]["status"] == "ok"]
    data = {
        "new": len(rows), "unchanged": len(found.unchanged), "unchanged_failed": unfit,
        "sites": dict(sites),
        "source_sites": sorted(set(usable)),
        "failed": [{k: row[k] for k in ("scan_id", "uri", "code", "message")} for row in bad],
        "notes": notes,
    }  # fmt: skip
    if args.dry_run:
        return Outcome(f"would list: {text}", lines=lines, data=data)
    lake = open_lake(args.lake, create=True)
    with recorded(lake, "index") as summary:
        # a scan is aligned with the template in its sequence's contrast
        forget_prepared(lake, {
            row["scan_id"] for old, row in again if row["sequence"] != old["sequence"]
        })  # fmt: skip
        Catalog(lake).append("scans", found.rows)
        summary.update(new=len(rows), unchanged=len(found.unchanged), failed=len(bad))
    follow = f"sgcd prepare --lake {quoted(args.lake)}"
    code = WITH_FAILURES if bad else DONE
    return Outcome(text, next=follow, exit_code=code, lines=lines, data=data)


def suggest(args: Any) -> Outcome:
    """`sgcd suggest-target`: the sites by how alike their own scans look."""
    from pipelines.catalog import Catalog
    from pipelines.target_site import best_target, suggest_target

    lake = open_lake(args.lake)
    rows = suggest_target(Catalog(lake), lake, from_args(args, lake).prepare.digest())
    best = best_target(rows)
    if best is None:
        raise InputError(
            "no site has prepared training scans of one sequence of two people.",
            code="LAKE-EMPTY", where=lake.uri,
            hint="Prepare more scans, or choose the target yourself: sgcd tune --target SITE.",
        )  # fmt: skip
    site, measured = best
    header = list(rows[0])
    lines = [*table(header, [[row[name] for name in header] for row in rows]), ""]
    text = f"of the sites with two people in {' and '.join(measured)}, {site} has the lowest mean "
    text += "distance between its own scans"
    follow = f"sgcd tune --lake {quoted(args.lake)} --target {quoted(site)}"
    has = {row["sequence"] for row in rows if row["site"] == site}
    if lacking := {row["sequence"] for row in rows} - has:
        text += f"; it has no training scan of {', '.join(sorted(lacking))}"
        follow += f" --sequences {' '.join(sorted(has))}"
    return Outcome(text, next=follow, lines=lines, data={"target": site, "rows": rows})


def report(args: Any) -> Outcome:
    """`sgcd report`: a page about the cohort and one per scan, whatever became of the run."""
    from pipelines.progress import Progress
    from pipelines.report import write_report
    from pipelines.report.source import newest_model
    from ray_jobs.cpus import cpu_count
    from ray_jobs.models import resolve

    lake = open_lake(args.lake)
    lines, code = [], DONE
    try:
        found = resolve(lake, args.model) if args.model else newest_model(lake)
    except ModelError as error:
        if newest_model(lake):  # a wrong name: the page would say that nothing was harmonized
            raise
        # training failed, say: the page then tells what there is
        found, lines, code = None, [str(error)], error.exit_code
    name, version = found or (None, None)
    with Progress("report", None, unit="page") as progress:
        written = write_report(
            lake, name, version, out=args.out and absolute(args.out), pages=args.pages,
            workers=args.workers or cpu_count(), progress=progress.reach,
        )  # fmt: skip
    counts = (
        f"{counted(written.scans, 'scan')}, {counted(written.pages, 'page')}, {written.new} new"
    )
    follow = "" if args.out else f"sgcd serve --lake {quoted(args.lake)}"
    data = {"report": written.uri, "pages": written.pages, "new": written.new}
    text = f"report: {written.uri} ({counts})"
    return Outcome(text, next=follow, exit_code=code, lines=lines, data=data)


def serve(args: Any) -> Outcome:
    """`sgcd serve`: reports and a 3D viewer until Ctrl-C."""
    from pipelines.viewer.server import LOOPBACK, Server

    with Server(open_lake(args.lake), args.host, args.port) as server:
        if args.host not in LOOPBACK:
            print(f"note: whoever reaches {args.host} with the token sees the scans.", flush=True)
        print(f"open {server.address}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return Outcome("stopped serving")
    return Outcome("")


def cite(args: Any) -> Outcome:
    """`sgcd cite`: a methods paragraph that a paper can paste."""
    from pipelines.cite import citation
    from ray_jobs.models import resolve

    lake = open_lake(args.lake)
    name, version = resolve(lake, args.model)
    text = citation(lake, name, version)
    return Outcome("", lines=text.splitlines(), data={"model": name, "version": version,
                                                      "text": text})  # fmt: skip
