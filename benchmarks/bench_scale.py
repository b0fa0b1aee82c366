"""A lake of many scans: time and memory of the driver, and what a million scans would cost.

    python benchmarks/bench_scale.py plan [--scans 100000]    plan, names, looks for a resumed run
    python benchmarks/bench_scale.py run [--scans 10000]      Ray Data, tries, rows, commits
    python benchmarks/bench_scale.py commit [--rows 100000]   appends, reading, compaction
    python benchmarks/bench_scale.py requests                 and processor time of one scan
    python benchmarks/bench_scale.py cost --seconds 2 …       the table of docs/scale.md

Without a word: the first four, with few scans.
`run` sends scans of no voxels through a null model: what is left is what the machinery costs for
each scan. Nothing is asserted about time.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import psutil
import pyarrow as pa

from pipelines.catalog import Catalog
from pipelines.derivative import stems
from pipelines.harmonize import Job, blank_row, harmonize_scan
from pipelines.lake import Lake
from pipelines.ledger import attempt, end_attempts
from pipelines.plan import plan
from pipelines.schemas import RESULTS, SCANS
from pipelines.turns import Turns
from ray_jobs.commit import COMMIT_ROWS, Committer
from ray_jobs.harmonize import WORK, in_order
from ray_jobs.harmonize_stream import Pool, harmonize_stream
from ray_jobs.session import session
from ray_jobs.volume_stream import packed, unpacked
from sgcd_core.config import SgcdConfig, load_config
from sgcd_core.harmonizer import Harmonizer
from sgcd_core.io.store import Store
from sgcd_core.modelpack import load_modelpack

SITES = 100


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    sub = parser.add_subparsers(dest="part")
    for name, count in (("plan", 100_000), ("run", 10_000), ("commit", 100_000)):
        p = sub.add_parser(name)
        p.add_argument("--scans", "--rows", type=int, default=count)
    sub.add_parser("requests").set_defaults(scans=4)
    cost = sub.add_parser("cost")
    cost.add_argument("--scans", type=int, default=1_000_000)
    cost.add_argument("--seconds", type=float, nargs="+", required=True,
                      help="of one GPU for one scan")  # fmt: skip
    cost.add_argument("--overhead", type=float, required=True, help="ms of the driver for a scan")
    cost.add_argument("--puts", type=float, required=True, help="PUT and LIST requests of a scan")
    cost.add_argument("--gets", type=float, required=True, help="other requests of a scan")
    cost.add_argument("--gpu-hour", type=float, required=True, help="dollars")
    args = parser.parse_args()
    if args.part == "cost":
        print("\n".join(cost_table(args)))
        return
    parts = {"plan": bench_plan, "run": bench_run, "commit": bench_commit,
             "requests": bench_requests}  # fmt: skip
    few = {"plan": 100_000, "run": 1000, "commit": 10_240, "requests": 4}
    for part, scans in ({args.part: args.scans} if args.part else few).items():
        with tempfile.TemporaryDirectory() as folder:
            parts[part](Lake.open(folder, create=True), scans)


def megabytes() -> float:
    """Resident memory of this process."""
    return psutil.Process().memory_info().rss / 1e6


@contextmanager
def timed(what: str, count: int) -> Iterator[None]:
    """Print seconds, and what memory has grown by."""
    gc.collect()
    before, started = megabytes(), time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    print(f"  {what:44s} {seconds:8.2f} s  {1e6 * seconds / count:8.1f} µs each  "
          f"{megabytes() - before:+8.0f} MB", flush=True)  # fmt: skip


def scans_table(count: int) -> pa.Table:
    """Rows of `scans` as an index would write them."""
    now = datetime.now(UTC)
    columns: dict[str, Callable[[int], Any]] = {
        "scan_id": lambda i: f"{(i * 2654435761) % 2**32:08x}{i:024x}",
        "dataset": lambda _: "bench", "subject": lambda i: f"{i:07d}",
        "site": lambda i: f"site{i % SITES:03d}",
        "sequence": lambda i: ("T1w", "T2w")[i // SITES % 2], "split": lambda _: "train",
        "uri": lambda i: f"s3://bucket/cohort/sub-{i:07d}/anat/sub-{i:07d}_T{1 + i // SITES % 2}w"
        ".nii.gz",
        "bytes": lambda _: 12_000_000, "status": lambda _: "ok", "indexed_at": lambda _: now,
        "recorded_at": lambda _: now,
    }  # fmt: skip
    schema = SCANS.arrow
    return pa.table(
        [pa.array(map(columns[f.name], range(count)), f.type) if f.name in columns
         else pa.nulls(count, f.type) for f in schema],
        schema=schema,
    )  # fmt: skip


def write_scans(lake: Lake, count: int) -> None:
    """A `scans` table of `count` rows in one commit."""
    from deltalake import write_deltalake

    write_deltalake(lake.table("scans"), scans_table(count))


def job_of(lake: Lake) -> Job:
    """A job of a model that is not there."""
    return Job(lake, "null", 1, None, SgcdConfig(), "bench", "bench")


def finished(lake: Lake, scans: pa.Table) -> pa.Table:
    """Rows of `results` for `scans`, as Arrow."""
    job = job_of(lake)
    row = blank_row(dict.fromkeys(WORK), job) | {"status": "ok"}
    row |= {"output_uri": "s3://bucket/lake/derivatives/null-v1/x", "output_sha256": "0" * 64}
    row["recorded_at"] = row["finished_at"]
    count, same = scans.num_rows, {"scan_id", "subject", "site", "sequence", "dataset"}
    return pa.table(
        [scans[f.name] if f.name in same else pa.array([row.get(f.name)] * count, f.type)
         for f in RESULTS.arrow],
        schema=RESULTS.arrow,
    )  # fmt: skip


def bench_plan(lake: Lake, count: int) -> None:
    """Plan a run half of which was done before."""
    from deltalake import write_deltalake

    write_scans(lake, count)
    half = finished(lake, scans_table(count).slice(0, count // 2))
    write_deltalake(lake.table("results"), half, partition_by=list(RESULTS.partition_by))
    del half
    print(f"{count} scans, half of them done, {SITES} sites")
    with timed("plan", count):
        made = plan(Catalog(lake), "null", 1, sequences=("T1w", "T2w"))
    assert made.todo.num_rows + made.skipped.num_rows == count
    with timed("names of all outputs", count):
        named = stems(made.scans)
    assert named.num_rows == count
    with timed("a window of 2000 scans as rows", 2000):
        window = made.todo.slice(0, 2000).to_pylist()
    assert len(window) == min(2000, made.todo.num_rows)


class NullActor:
    """Counts the try and hands back a row: all that is not the scan's own work."""

    def __init__(self, job: Job, **_: Any) -> None:
        self._job, self._turns = job, Turns()

    def __call__(self, item: dict[str, Any]) -> dict[str, bytes]:
        scan, job = unpacked(item), self._job
        with attempt(job.lake, job.key, scan["scan_id"], job.batch_id, self._turns) as this:
            row = blank_row(scan, job) | {"status": "ok"}
            this.keep(row, job.made_by)
        return packed(row | {"tries": [this.begun() | {"ended": "ok"}]})


def bench_run(lake: Lake, count: int) -> None:
    """Rows through Ray Data and into the catalog; memory at every tenth."""
    work = in_order(scans_table(count).select(WORK))
    work = work.append_column("stem", [[f"sub-{i}/anat/sub-{i}_T1w" for i in range(count)]])
    job, done, marks = job_of(lake), 0, []
    started = time.perf_counter()
    with session() as ray, Committer(Catalog(lake), job) as commit:
        for _, row in harmonize_stream(ray, work, job, Pool(None, 0, {}, NullActor)):
            commit.add(row)
            done += 1
            if done % (count // 10) == 0:
                marks.append((done, time.perf_counter() - started, megabytes()))
                print(f"  {done:8d} scans {marks[-1][1]:7.1f} s  driver {marks[-1][2]:6.0f} MB",
                      flush=True)  # fmt: skip
    seconds = time.perf_counter() - started
    assert done == count
    growth = (marks[-1][2] - marks[1][2]) / (marks[-1][0] - marks[1][0]) * 1000
    print(f"{count} scans through a null model: {1000 * seconds / count:.1f} ms each, driver "
          f"{marks[-1][2]:.0f} MB, {growth:+.2f} MB for 1000 more scans")  # fmt: skip


def bench_commit(lake: Lake, count: int) -> None:
    """Appends as the driver makes them, the latest rows, and both after compaction."""
    from deltalake import DeltaTable

    catalog, job = Catalog(lake), job_of(lake)
    table = scans_table(count).sort_by([("site", "ascending"), ("sequence", "ascending")])
    seconds = []
    for start in range(0, count, COMMIT_ROWS):
        rows = [blank_row(scan, job) | {"status": "ok"}
                for scan in table.slice(start, COMMIT_ROWS).to_pylist()]  # fmt: skip
        began = time.perf_counter()
        catalog.append("results", rows, txn=f"bench-{start}")
        seconds.append(time.perf_counter() - began)
    tenth = max(1, len(seconds) // 10)
    print(f"{count} rows in {len(seconds)} commits of {COMMIT_ROWS}: "
          f"first tenth {1000 * sum(seconds[:tenth]) / tenth:.0f} ms a commit, "
          f"last tenth {1000 * sum(seconds[-tenth:]) / tenth:.0f} ms, "
          f"{1000 * sum(seconds) / count:.2f} ms a row")  # fmt: skip
    delta = DeltaTable(lake.table("results"))
    for when in ("as appended", "compacted"):
        files = len(delta.file_uris())
        with timed(f"latest rows, {files} files {when}", count):
            assert catalog.rows("results").num_rows == count
        if when == "as appended":
            with timed("compaction", count):
                delta.optimize.compact()
                delta.create_checkpoint()


#: Methods of `Store`, and the request each sends at least once. A LIST is priced like a PUT.
VERBS = {"write_bytes": "PUT", "list": "LIST", "read_bytes": "GET", "info": "HEAD",
         "delete": "DELETE"}  # fmt: skip


def bench_requests(lake: Lake, count: int) -> None:
    """Requests and processor time of real-size scans that were prepared before."""
    from bench_rate import build

    config = load_config("tiny")
    table = build(lake, config, count)
    job = Job(lake, "m", 1, "A", config, "bench", "bench")
    model = TimedModel(Harmonizer(load_modelpack(lake.model("m", 1))))
    counts: Counter[str] = Counter()
    for name, verb in VERBS.items():
        setattr(Store, name, counting(getattr(Store, name), counts, verb))
    began = time.process_time()
    rows = [harmonize_scan(scan, job, model, f"x/{scan['scan_id']}_T1w") for scan in table]
    beside = time.process_time() - began - model.seconds
    assert all(row["output_uri"] for row in rows)
    for row in rows:
        end_attempts(lake, job.key, row["scan_id"])
    each = {verb: counts[verb] / count for verb in VERBS.values()}
    print("requests of one scan: " + ", ".join(f"{n:g} {verb}" for verb, n in each.items()))
    print(f"processor seconds of one scan beside the model: {beside / count:.2f}")


class TimedModel:
    """A model, and the processor time it took."""

    def __init__(self, model: Harmonizer) -> None:
        self._model, self.seconds = model, 0.0

    def harmonize(self, *args: Any, **options: Any) -> Any:
        began = time.process_time()
        try:
            return self._model.harmonize(*args, **options)
        finally:
            self.seconds += time.process_time() - began

    def outlier_score(self, *args: Any) -> float:
        return self._model.outlier_score(*args)


def counting(method: Callable[..., Any], counts: Counter[str], verb: str) -> Callable[..., Any]:
    """`method`, counted."""

    def counted(*args: Any, **more: Any) -> Any:
        counts[verb] += 1
        return method(*args, **more)

    return counted


#: List prices of S3 Standard, us-east-1, dollars a request.
PUT, GET = 0.005 / 1000, 0.0004 / 1000


def cost_table(args: argparse.Namespace) -> list[str]:
    """Hours and dollars of `args.scans` scans on 1, 8, 64 and 512 GPUs, as Markdown.

    Hours = N · max(s / G, o): the GPUs work side by side, the driver takes one row after another.
    """
    n, overhead = args.scans, args.overhead / 1000
    requests = n * (args.puts * PUT + args.gets * GET)
    lines = ["| s a scan | GPUs | hours | GPU dollars | limit |", "|---|---|---|---|---|"]
    for seconds in args.seconds:
        for gpus in (1, 8, 64, 512):
            hours = n * max(seconds / gpus, overhead) / 3600
            limit = "GPUs" if seconds / gpus > overhead else "driver"
            lines.append(f"| {seconds:g} | {gpus} | {hours:,.1f} | "
                         f"{hours * gpus * args.gpu_hour:,.0f} | {limit} |")  # fmt: skip
    lines += [
        "",
        f"Requests: {n * (args.puts + args.gets) / 1e6:.0f} million, {requests:,.0f} dollars.",
    ]
    return lines


if __name__ == "__main__":
    main()
