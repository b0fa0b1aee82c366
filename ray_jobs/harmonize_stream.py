"""Scans through a pool of Ray Data actors, in windows, one row for each.

A window is one execution of Ray Data. It bounds what the driver holds at once, whatever the number
of scans, and takes the size of the cluster anew. What a stuck or broken execution leaves over goes
through another one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.harmonize import Job, Row
from ray_jobs.actors import HarmonizeActor
from ray_jobs.session import NO_PROGRESS_SECONDS, cpu_count
from ray_jobs.volume_stream import packed, unpacked
from sgcd_core.errors import SgcdError, StorageError

log = logging.getLogger(__name__)

#: Scans an actor holds at once: one is read, one computed, one written.
IN_FLIGHT = 3
#: Scans of a window, in all and for each actor, whichever is more: starting one takes seconds.
WINDOW, WINDOW_PER_ACTOR = 2000, 50
#: Executions in a row that yield no row before the job gives up.
FRUITLESS = 3


@dataclass(frozen=True)
class Pool:
    """Who does the work.

    Attributes:
        workers: Actors; None: as many as the cluster has room for.
        gpus: Part of a GPU for each, or whole ones; 0: none.
        looks: Looks of the sites by site and sequence.
        actor: The class that is started; takes the arguments of `HarmonizeActor`.
    """

    workers: int | None
    gpus: float
    looks: Mapping[tuple[str, str], Any]
    actor: type = HarmonizeActor

    def size(self, ray: Any) -> int:
        """Actors for the cluster as it is now."""
        have = ray.cluster_resources()
        if self.gpus:
            room = int(have.get("GPU", 0) / self.gpus)
        else:  # one CPU stays free for the driver and for Ray itself
            room = int(have.get("CPU", 1)) - 1
        return max(1, self.workers or room)


def harmonize_stream(ray: Any, work: pa.Table, job: Job, pool: Pool) -> Iterator[tuple[Row, Row]]:
    """Yield each scan of `work` with its row, in the order they are done.

    Args:
        ray: The connected module.
        work: Columns of `scans` that the work needs, and `stem`.
        job: What is the same for every scan.
        pool: Who does it.

    Raises:
        SgcdError: As raised by an actor that cannot start (a damaged model).
        StorageError: CLUSTER when `FRUITLESS` executions in a row did not bring a single row.
    """
    start = 0
    while start < work.num_rows:
        length = max(WINDOW, WINDOW_PER_ACTOR * pool.size(ray))
        scans = work.slice(start, length).to_pylist()
        start += length
        yield from _window(ray, {scan["scan_id"]: scan for scan in scans}, job, pool)


def _window(ray: Any, left: dict[str, Row], job: Job, pool: Pool) -> Iterator[tuple[Row, Row]]:
    from ray.exceptions import RayTaskError, UserCodeException

    fruitless = 0
    while left:
        try:
            for row in _execution(ray, list(left.values()), job, pool):
                scan = left.pop(row["scan_id"])  # a second row would be a fault: KeyError
                fruitless = 0
                yield scan, row
            if left:
                raise RuntimeError(f"{len(left)} scans have no row")
        except (SgcdError, RayTaskError, UserCodeException, KeyError):
            raise  # a fault of the actor or of this program: trying again is no help
        except Exception as error:
            # The edge to Ray, which raises bare exceptions when nodes die or nothing moves.
            fruitless += 1
            name = type(error).__name__
            log.warning("event=execution_broken error=%s left=%d", name, len(left))
            if fruitless >= FRUITLESS:
                raise StorageError(
                    f"the cluster's workers bring no scan to an end ({name}).", code="CLUSTER",
                    hint="Look at the cluster with `sgcd doctor` or `ray status`; then run the "
                    "same command again, it goes on from here.",
                ) from error  # fmt: skip


def _execution(ray: Any, scans: list[Row], job: Job, pool: Pool) -> Iterator[Row]:
    count = min(pool.size(ray), len(scans))
    # A block a scan: a lost worker costs what it held, and the plan spreads evenly.
    items = ray.data.from_items([packed(scan) for scan in scans], override_num_blocks=len(scans))
    rows = items.map(
        pool.actor,
        fn_constructor_kwargs={
            "job": job, "looks": pool.looks, "workers": min(count, cpu_count()),
            "gpus": pool.gpus,
        },
        compute=ray.data.ActorPoolStrategy(
            size=count,
            max_concurrent_calls_per_actor=IN_FLIGHT,
            max_tasks_in_flight_per_actor=IN_FLIGHT,
            enable_true_multi_threading=True,
        ),
        num_cpus=1,
        num_gpus=pool.gpus or None,
    )  # fmt: skip
    # One scan may take its whole deadline, and then another that waited to be alone.
    rows.context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS + 2 * job.deadline
    for batch in rows.iter_batches(batch_size=1, prefetch_batches=0, batch_format="numpy"):
        yield unpacked({"row": batch["row"][0]})
