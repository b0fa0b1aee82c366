"""Scans through a pool of Ray Data actors, in windows, one row for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines.harmonize import Job, Row
from ray_jobs.actors import HarmonizeActor
from ray_jobs.session import NO_PROGRESS_SECONDS
from ray_jobs.windows import dataset_of, each_once, nodes_to_come, room, rows_of, window_size

if TYPE_CHECKING:
    from sgcd_core.style.look import SiteLook

#: Scans an actor holds at once: one is read, one computed, one written.
IN_FLIGHT = 3


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
    looks: Mapping[tuple[str, str], SiteLook]
    actor: type = HarmonizeActor

    def size(self, ray: Any) -> int:
        """Actors for the cluster as it is now and as it may grow."""
        if self.workers:
            return self.workers
        # of the CPUs one stays free for the driver and for Ray itself
        places = room(ray, "GPU") / self.gpus if self.gpus else room(ray, "CPU") - 1
        return max(1, int(places + 1e-9))


def harmonize_stream(ray: Any, work: pa.Table, job: Job, pool: Pool) -> Iterator[tuple[Row, Row]]:
    """Yield each scan of `work` with its row, in the order they are done.

    Args:
        ray: The connected module.
        work: Columns of `scans` that the work needs, and `stem`.
        job: What is the same for every scan.
        pool: Who does it.

    Raises:
        SgcdError, StorageError: See `each_once`.
    """
    start = 0
    while start < work.num_rows:
        length = window_size(pool.size(ray))
        scans = work.slice(start, length).to_pylist()
        start += length
        yield from each_once(scans, partial(_execution, ray, job, pool))


def _execution(ray: Any, job: Job, pool: Pool, scans: list[Row]) -> Iterator[Row]:
    count = min(pool.size(ray), len(scans))
    rows = dataset_of(ray, scans).map(
        pool.actor,
        fn_constructor_kwargs={
            "job": job, "looks": pool.looks, "workers": _beside(ray, count, pool.gpus),
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
    yield from rows_of(rows, NO_PROGRESS_SECONDS + 2 * job.deadline)


def _beside(ray: Any, count: int, gpus: float) -> int:
    """How many of `count` actors share a node at most.

    Ray spreads them over the nodes that are there; on nodes to come they may all lie together.
    """
    name, share = ("GPU", gpus) if gpus else ("CPU", 1.0)
    now = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    places = [
        [int(n) for node in nodes if (n := node.get(name, 0.0) / share + 1e-9) >= 1]
        for nodes in (now, nodes_to_come(name))
    ]
    here, to_come = places
    if count <= sum(here):
        return max(1, min(max(here), math.ceil(count / len(here))))
    return max(1, min(count, max([*here, *to_come, 1])))
