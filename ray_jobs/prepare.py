"""`sgcd prepare`: every usable scan of the lake onto the model grid, a task of Ray Data each."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from pipelines.harmonize import SCAN_DEADLINE
from pipelines.lake import Lake
from pipelines.ledger import (
    MAX_ATTEMPTS,
    attempt,
    end_attempts,
    forget_attempts,
    note_late,
    taken_back,
)
from pipelines.turns import Turns
from ray_jobs.context import open_lake, quoted, recorded
from ray_jobs.outcome import DONE, WITH_FAILURES, Outcome, failure_line
from ray_jobs.preflight import need_of
from ray_jobs.session import NO_PROGRESS_SECONDS, session
from ray_jobs.settings import from_args, preparation_line, remember, settings_words
from ray_jobs.volume_stream import Row, packed, unpacked
from ray_jobs.windows import dataset_of, each_once, end_late, room, rows_of, window_size
from sgcd_core.config import PrepareConfig, SgcdConfig
from sgcd_core.errors import SgcdError
from sgcd_core.words import counted

if TYPE_CHECKING:
    from pipelines.catalog import Catalog


@dataclass(frozen=True)
class PrepareJob:
    """What is the same for every scan that is prepared.

    Attributes:
        lake: Where scans lie and prepared volumes go.
        config: The recipe.
        run: Who asks, so that what a stopped run began can be taken back.
        deadline: Seconds a scan may take.
    """

    lake: Lake
    config: PrepareConfig
    run: str = ""
    deadline: float = SCAN_DEADLINE

    @property
    def key(self) -> str:
        """Under which tries are counted."""
        return f"prepare-{self.config.digest()}"


def run(args: Any) -> Outcome:
    """`sgcd prepare`: every usable scan of the lake onto the model grid."""
    from pipelines.catalog import Catalog
    from pipelines.progress import Progress
    from pipelines.training_data import check_sites, prepared_ids
    from sgcd_core.errors import InputError

    lake = open_lake(args.lake)
    catalog = Catalog(lake)
    scans = catalog.rows("scans").to_pylist()
    if not scans:
        raise InputError(
            "no scan was indexed yet.", code="LAKE-EMPTY", where=lake.uri,
            hint="Index some with `sgcd index SOURCE --lake LAKE`.",
        )  # fmt: skip
    check_sites(args.sites or (), scans, lake.uri)
    if args.model:
        config, scans = _for_model(args, lake, catalog)
        follow = f"sgcd harmonize --lake {quoted(args.lake)} --model {quoted(args.model)}"
    else:
        config = from_args(args, lake)
        words = ["sgcd", "train", "--lake", args.lake, *settings_words(args)]
        follow = " ".join(map(quoted, words))
    recipe = config.prepare.digest()
    usable = [
        scan
        for scan in scans
        if scan["status"] == "ok"
        and scan["sequence"] in config.sequences
        and (not args.sites or scan["site"] in args.sites)
    ]
    ready = set() if args.force else prepared_ids(lake, recipe)
    todo = [scan for scan in usable if scan["scan_id"] not in ready]
    skipped = len(usable) - len(todo)
    data: Row = {"recipe": recipe, "to_do": len(todo), "already_prepared": skipped}
    if args.dry_run:
        return Outcome(
            f"would prepare {counted(len(todo), 'scan')}, {skipped} are prepared", data=data
        )
    kept: list[str] = []
    if not args.model:  # what a model was built with is its own affair
        remember(lake, config)
        kept = preparation_line(config)
    if not todo:
        text = f"{counted(skipped, 'scan')} prepared before; nothing to do"
        if not usable and not args.model:  # with it only what is not harmonized is looked at
            text, follow = "no scan can be used; nothing to do", _look(args)
        return Outcome(text, next=follow, lines=kept, data=data)
    job = PrepareJob(lake, config.prepare, uuid.uuid4().hex[:16], args.scan_deadline)
    if args.force:  # also what was set aside
        forget_attempts(lake, job.key, {scan["scan_id"] for scan in todo})
    failed: list[Row] = []
    done, site_of = 0, {scan["scan_id"]: scan["site"] or "-" for scan in todo}
    extracted: dict[str, set[str]] = {"given": set(), "here": set()}
    with recorded(lake, "prepare", config.digest()) as summary:
        with (
            taken_back(lake, job.run, job.key),
            session(args.ray_address, need_of("prepare", config, args.workers), lake) as ray,
            Progress("prepare", len(todo)) as progress,
        ):
            for row in prepare_stream(ray, todo, job, args.workers, args.force):
                done += 1
                if row["status"] != "ok":
                    failed.append(row)
                elif row["mask_source"]:  # not of one that was prepared meanwhile
                    where = "given" if row["mask_source"] == "given" else "here"
                    extracted[where].add(site_of[row["scan_id"]])
                progress.update(1, failed=len(failed))
        if done != len(todo):  # a law of this program, not a user's mistake
            raise RuntimeError(f"{len(todo)} scans went in, {done} rows came out")
        summary.update(prepared=done - len(failed), failed=len(failed), recipe=recipe)
    codes = Counter(row["code"] for row in failed)
    lines = [failure_line(row) for row in failed] + kept + _mixed(extracted)
    reasons = ", ".join(f"{n} {code}" for code, n in codes.most_common())
    text = f"prepared {counted(done - len(failed), 'scan')}, {skipped} were prepared before"
    text += f", {len(failed)} failed ({reasons})" if failed else ""
    keep = ("scan_id", "uri", "code", "message")
    data |= {
        "prepared": done - len(failed),
        "failed": [{key: row[key] for key in keep} for row in failed],
    }
    code = WITH_FAILURES if failed else DONE
    if not args.model and len(failed) == len(usable):  # nothing to go on with
        follow = _look(args)
    return Outcome(text, next=follow, exit_code=code, lines=lines, data=data)


def _mixed(extracted: dict[str, set[str]]) -> list[str]:
    """A note where some brains came extracted and others were extracted here."""
    if not all(extracted.values()):
        return []
    given, here = (", ".join(sorted(extracted[key])) for key in ("given", "here"))
    return [
        f"note: scans of {given} came brain-extracted, those of {here} were extracted here: what "
        "the tools do differently is taken for the scanners'. Whole heads of all sites are better."
    ]


def _look(args: Any) -> str:
    return f"sgcd report --lake {quoted(args.lake)}"


def _for_model(args: Any, lake: Lake, catalog: Catalog) -> tuple[SgcdConfig, list[Row]]:
    """A model's own settings, and the scans it has still to harmonize."""
    from pipelines.plan import plan
    from ray_jobs.models import resolve
    from ray_jobs.settings import over_model
    from sgcd_core.io.store import Store
    from sgcd_core.modelpack import load_modelpack

    name, version = resolve(lake, args.model)
    config = over_model(args, load_modelpack(lake.model(name, version), Store()).config)
    return config, plan(catalog, name, version).todo.to_pylist()


def prepare_stream(
    ray: Any, todo: list[Row], job: PrepareJob, workers: int | None, force: bool = False
) -> Iterator[Row]:
    """Yield one row per scan of `todo`, in the order they are done.

    Args:
        ray: The connected module.
        todo: Rows of `scans`.
        job: What is the same for every scan.
        workers: Scans at a time; None: as many as the cluster has CPUs, or may have.
        force: Also what is prepared already.

    Raises:
        StorageError: See `each_once`.
    """
    start = 0
    while start < len(todo):
        size = workers or max(1, int(room(ray, "CPU")))
        scans = todo[start : start + window_size(size)]
        start += len(scans)
        for _, row in each_once(scans, partial(_preparation, ray, job, size, force)):
            yield row


def _preparation(
    ray: Any, job: PrepareJob, workers: int, force: bool, scans: list[Row]
) -> Iterator[Row]:
    rows = dataset_of(ray, scans).map(
        prepare_packed, fn_kwargs={"job": job, "force": force}, num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=min(workers, len(scans))),
    )  # fmt: skip
    yield from rows_of(rows, NO_PROGRESS_SECONDS + job.deadline)


def prepare_packed(item: dict[str, Any], job: PrepareJob, force: bool = False) -> dict[str, bytes]:
    """Prepare one scan; a scan that ends its worker again and again is set aside as a row."""
    row = unpacked(item)
    try:
        return packed(row | _prepared(row, job, force))
    except SgcdError as error:  # the store, where tries are counted
        failed = {"status": "failed", "code": error.code, "message": error.sentence}
        return packed(row | failed)


def _prepared(row: Row, job: PrepareJob, force: bool) -> Row:
    """What came of one counted try."""
    from pipelines.prepare import prepare_one
    from pipelines.training_data import COMPLETE
    from sgcd_core.io.store import Store, join

    lake, config, scan_id = job.lake, job.config, row["scan_id"]
    with attempt(lake, job.key, scan_id, job.run, _turns(lake, job.key, job.deadline)) as this:
        if this.number > MAX_ATTEMPTS:
            text = f"preparing it ended its worker {MAX_ATTEMPTS} times."
            return {"status": "failed", "code": "SCAN-QUARANTINED", "message": text}
        if this.number > 1 and this.was_late(job.deadline):
            text = f"preparing it took longer than {job.deadline:g} s."
            done = {"status": "failed", "code": "SCAN-DEADLINE", "message": text}
        else:
            if force:
                Store().delete(join(lake.prepared(config.digest(), scan_id), COMPLETE))
            done = prepare_one(row, lake, config)
    end_attempts(lake, job.key, scan_id)
    return done


@lru_cache(maxsize=8)
def _turns(lake: Lake, key: str, deadline: float) -> Turns:
    """Watches over the scans that this process prepares, one after another."""
    note = partial(note_late, lake, key, seconds=deadline)
    return Turns(deadline, partial(end_late, note, deadline))
