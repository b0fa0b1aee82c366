"""`sgcd new-site`: the scheduled job, from new scans to a report, only what is new.

A source nobody saw is harmonized with a model there is: inference only. A site asked for as a
target is learned first: Stage 2 only. Each step is a command a user would type and is safe to
repeat, so the job is, too. Two of them on one lake and model take turns (`pipelines/lease.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.lease import Lease, lease
from pipelines.plan import plan
from pipelines.training_data import check_sequences
from ray_jobs.context import open_lake, quoted, recorded
from ray_jobs.models import models, resolve, target_model
from ray_jobs.outcome import Outcome
from ray_jobs.session import session
from ray_jobs.settings import over_model, settings_words
from ray_jobs.steps import step
from sgcd_core.config import SgcdConfig
from sgcd_core.errors import InputError, ModelError, UsageError
from sgcd_core.io.store import Store
from sgcd_core.words import counted

Row = dict[str, Any]


def run(args: Any) -> Outcome:
    """Index, prepare, tune if a target is asked for, harmonize, evaluate, report."""
    if args.target and args.model:
        raise UsageError("--target makes a model of its own: leave --model out.")
    lake = open_lake(args.lake)
    model = target_model(args.target) if args.target else the_model(lake, args.model)
    # Before anything is indexed: settings, and names that no model knows.
    made = not args.target or model in models(lake)
    config = _config(lake, model if made else "global")
    over_model(args, config)
    check_sequences(args.sequences or (), config.sequences)
    if args.dry_run:
        return _dry_run(args, lake, model, made, config.sequences)
    name = model.partition("@")[0]
    with (
        lease(lake, f"new-site-{name}", wait=60 * args.wait) as held,
        recorded(lake, "new-site") as summary,
    ):
        return NewSite(args, lake, model, held).work(summary)


def the_model(lake: Lake, asked: str | None) -> str:
    """The model to use: the one asked for, else the only target model of the lake.

    Raises:
        ModelError: MODEL-MISSING, there is none.
        UsageError: There are several.
    """
    if asked:
        resolve(lake, asked)
        return asked
    targets = sorted(name for name in models(lake) if name.startswith("target-"))
    if not targets:
        raise ModelError(
            "there is no target model to harmonize with.", where=lake.uri,
            hint="Make one with `sgcd train` and `sgcd tune`, or ask for one: --target SITE.",
        )  # fmt: skip
    if len(targets) > 1:
        raise UsageError(f"the lake has {', '.join(targets)}: name one with --model.")
    return targets[0]


def require_scans(
    scans: list[Row], target: str, sequences: list[str] | tuple[str, ...], least: int, where: str
) -> None:
    """Refuse to tune to a site with fewer than `least` training scans of a sequence it has.

    Raises:
        InputError: TARGET-UNKNOWN or TARGET-FEW.
    """
    mine = [scan for scan in scans if scan["site"] == target]
    if not mine:
        known = sorted({scan["site"] for scan in scans if scan["site"] is not None})
        raise InputError(
            f"the lake has no site {target!r}; it has {', '.join(known) or 'none'}.",
            code="TARGET-UNKNOWN", where=where,
            hint="Index its scans: name their source, and see --site-from.",
        )  # fmt: skip
    free = Counter(
        scan["sequence"] for scan in mine if scan["status"] == "ok" and scan["split"] != "test"
    )
    few = [name for name in sequences if free[name] < least and (free[name] or not free)]
    if few:
        have = ", ".join(f"{free[name]} {name}" for name in few)
        raise InputError(
            f"site {target!r} has too few usable training scans to be a target: {have}; "
            f"{least} of each sequence are needed.", code="TARGET-FEW", where=where,
            hint="Index more of its scans, choose another (`sgcd suggest-target`), leave a "
            "sequence out with --sequences, or lower --min-scans.",
        )  # fmt: skip


class NewSite:
    """One run of the job.

    Args:
        args: The command line.
        lake: Where everything goes.
        model: `NAME[@VERSION]` to harmonize with; with `--target` the one to be made.
        held: The lease, looked at between steps.
    """

    def __init__(self, args: Any, lake: Lake, model: str, held: Lease) -> None:
        self.args, self.lake, self.model, self.held = args, lake, model, held
        self.catalog = Catalog(lake)
        self.lines: list[str] = []
        self.exit_code = 0
        self.words = ["--lake", args.lake]
        self.of_model = settings_words(args)
        self.cluster = ["--ray-address", args.ray_address] if args.ray_address else []
        self.ray = [*self.cluster, *(["--workers", str(args.workers)] if args.workers else [])]
        self.gpus = ["--gpus"] if args.gpus else []
        self.sequences = ["--sequences", *args.sequences] if args.sequences else []

    def work(self, summary: Row) -> Outcome:
        """All steps in their order; `summary` is kept in the table `runs`."""
        args = self.args
        indexed = self._step(
            "index", *args.sources, *self.words, "--site-from", args.site_from, *self.sequences,
            *self.of_model,
        )  # fmt: skip
        sites = self._sites(indexed)
        tuned = self._tune_first()
        # A new target is a new look for every scan; without one only the source's sites are new.
        where = [] if args.target else ["--sites", *sites]
        harmonized, counts = self._harmonize(where)
        name, version = resolve(self.lake, self.model)
        reported = self._evaluate(name, version, summary)
        summary.update(
            counts, model=name, version=version, sources=len(args.sources), sites=sites,
            new=indexed.data["new"], tuned=tuned, failed=counts.get("failed", 0)
            + counts.get("quarantined", 0),
        )  # fmt: skip
        parts = ", ".join(f"{n} {status}" for status, n in counts.items()) or "nothing new"
        text = f"{counted(indexed.data['new'], 'scan')} new at the source"
        text += f", tuned {name} version {version}" if tuned else ""
        text += f", harmonized with {name}@{version}: {parts}; report: {reported}"
        data = {
            "model": name, "version": version, "sites": sites, "tuned": tuned,
            "index": indexed.data, "counts": counts, "report": reported,
            "failed": harmonized.data.get("failed", []),
        }  # fmt: skip
        follow = f"sgcd status --lake {quoted(args.lake)}"
        return Outcome(text, next=follow, exit_code=self.exit_code, lines=self.lines, data=data)

    def _step(self, *words: str) -> Outcome:
        self.held.check()
        outcome = step(self.args.json, *words)
        self.exit_code = max(self.exit_code, outcome.exit_code)
        return outcome

    def _sites(self, indexed: Outcome) -> list[str]:
        """The sites of the source's usable scans."""
        sites: list[str] = indexed.data["source_sites"]
        if not sites:
            raise InputError(
                "no scan of the source can be used.", code="LAKE-EMPTY",
                where=", ".join(self.args.sources),
                hint="The lines above say why where they are new; of all of them: `sgcd query "
                "\"SELECT uri, code, message FROM scans WHERE status = 'failed'\" --lake LAKE`.",
            )  # fmt: skip
        return sites

    def _tune_first(self) -> bool:
        """Stage 2 for the target that was asked for, unless its model is there already."""
        args = self.args
        if not args.target:
            return False
        if self.model in models(self.lake):
            self.lines.append(
                f"note: {self.model} is there already and was not tuned again; "
                "`sgcd tune --force` makes another version."
            )
            return False
        scans = self.catalog.rows("scans").to_pylist()
        parent = _config(self.lake, "global")
        known = args.sequences or parent.sequences
        require_scans(scans, args.target, known, args.min_scans, args.lake)
        with self._session():
            here = ["--model", "global", "--sites", args.target]
            self._step("prepare", *self.words, *here, *self.ray)
            self._step(
                "tune", *self.words, "--target", args.target, *self.sequences, *self.of_model,
                *self.cluster, *self._trainers(parent), *self.gpus, "--wait", str(args.wait),
            )  # fmt: skip
        return True

    def _trainers(self, parent: SgcdConfig) -> list[str]:
        """Workers for Stage 2, whose batch they share alike: at most as many as asked for."""
        if not self.args.workers:
            return []
        batch = over_model(self.args, parent).target_stage.batch_size
        most = min(self.args.workers, batch)
        return ["--workers", str(max(n for n in range(1, most + 1) if batch % n == 0))]

    def _harmonize(self, where: list[str]) -> tuple[Outcome, dict[str, int]]:
        """Prepare and harmonize what has no result yet."""
        name, version = resolve(self.lake, self.model)
        todo = plan(
            self.catalog, name, version, sites=where[1:] or None, sequences=self.args.sequences,
            known=_config(self.lake, self.model).sequences,
        ).todo  # fmt: skip
        words = [*self.words, "--model", self.model, *where, *self.ray]
        with self._session(todo.num_rows > 0):
            if todo.num_rows:
                self._step("prepare", *words)
            done = self._step(
                "harmonize", *words, *self.sequences, *self.of_model, *self.gpus
            )  # fmt: skip
        return done, dict(done.data.get("counts", {}))

    def _evaluate(self, name: str, version: int, summary: Row) -> str:
        """Figures and page of the model, unless those there are of the tables as they stand."""
        now = {table: self.catalog.version(table) for table in ("scans", "results")}
        before = self._last_run(name, version)
        report = str(before.get("report", ""))
        if before.get("tables") == now and report and Store().has_any(report):
            summary.update(tables=now, report=report)
            return report
        model = ["--model", f"{name}@{version}"]
        results = self.catalog.rows("results", where={"model": name, "model_version": version})
        whole = True
        if any(status in ("ok", "flagged") for status in results["status"].to_pylist()):
            whole = self._step("evaluate", *self.words, *model, *self.of_model).exit_code == 0
        report = str(self._step("report", *self.words, *model).data["report"])
        # what could not be read is evaluated by the next run
        summary.update(tables=now if whole else None, report=report)
        return report

    def _last_run(self, name: str, version: int) -> Row:
        """Summary of the newest finished run of this job for this model; empty when none is."""
        runs = self.catalog.rows("runs", where={"command": "new-site"})
        rows = [row for row in runs.to_pylist() if row["status"] in ("ok", "partial")]
        for row in sorted(rows, key=lambda row: row["finished_at"], reverse=True):
            found: Row = json.loads(row["summary"])
            if (found.get("model"), found.get("version")) == (name, version):
                return found
        return {}

    @contextmanager
    def _session(self, needed: bool = True) -> Iterator[None]:
        """One Ray for the steps within; none is started where there is nothing to do."""
        if not needed:
            yield
            return
        with session(self.args.ray_address, lake=self.lake):
            yield


def _config(lake: Lake, model: str) -> Any:
    from sgcd_core.modelpack import load_modelpack

    name, version = resolve(lake, model)
    return load_modelpack(lake.model(name, version), Store()).config


def _dry_run(args: Any, lake: Lake, model: str, made: bool, known: tuple[str, ...]) -> Outcome:
    """What is new at the source and what has no result yet.

    `made`: the model is there, else it is to be tuned; `known`: the sequences it has or will have.
    """
    words = ["--lake", args.lake, "--dry-run"]
    named = ["--sequences", *args.sequences] if args.sequences else []
    new = step(
        args.json, "index", *args.sources, "--site-from", args.site_from, *words, *named,
        *settings_words(args),
    )  # fmt: skip
    if not made:
        if args.target not in new.data["sites"]:  # else its new scans count, too
            scans = Catalog(lake).rows("scans").to_pylist()
            require_scans(scans, args.target, args.sequences or known, args.min_scans, args.lake)
        return Outcome(f"would tune {model}, then harmonize every scan with it", data=new.data)
    name, version = resolve(lake, model)
    wanted = None if args.target else set(new.data["source_sites"])
    todo = plan(Catalog(lake), name, version, sequences=args.sequences, known=known).todo
    waiting = [
        scan for scan in todo.to_pylist() if wanted is None or scan["site"] in wanted
    ]  # fmt: skip
    text = (
        f"would add {counted(new.data['new'], 'scan')}, and harmonize what is new and "
        f"{len(waiting)} listed before with {name}@{version}"
    )
    return Outcome(text, data={"new": new.data["new"], "waiting": len(waiting), "model": name})
