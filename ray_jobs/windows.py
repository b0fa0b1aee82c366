"""Scans through Ray Data in windows, one row for each, whatever breaks on the way.

A window is one execution of Ray Data. It bounds what the driver holds at once, whatever the number
of scans, and takes the size of the cluster anew. What a stuck or broken execution leaves over goes
through another one.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ray_jobs.preflight import growth
from ray_jobs.volume_stream import packed, unpacked
from sgcd_core.errors import SgcdError, StorageError

log = logging.getLogger(__name__)

Row = dict[str, Any]
#: Scans of a window, in all and for each worker, whichever is more: starting one takes seconds.
WINDOW, WINDOW_PER_WORKER = 2000, 50
#: Executions in a row that yield no row before the job gives up.
FRUITLESS = 3
#: What no node that dies raises: a fault of this program, or of Ray's.
OURS = (AttributeError, KeyError, TypeError)
#: The longest a process that is to end waits for the store to take its notes.
NOTE_SECONDS = 10.0


def window_size(workers: int) -> int:
    """Scans of a window for so many workers."""
    return max(WINDOW, WINDOW_PER_WORKER * workers)


def room(ray: Any, name: str) -> float:
    """CPUs or GPUs of the cluster, those an autoscaler may add for such work included.

    It adds nodes only when work waits for them, so more has to be asked for than is there.
    """
    grown = sum(node.get(name, 0.0) for node in nodes_to_come(name))
    return max(float(ray.cluster_resources().get(name, 0.0)), grown)


def nodes_to_come(name: str) -> list[dict[str, float]]:
    """Nodes an autoscaler may add for work that wants CPUs or GPUs: not GPUs for their CPUs."""
    return [node for node in growth() if (name == "GPU") == (node.get("GPU", 0.0) > 0)]


def each_once(
    scans: Iterable[Row], execution: Callable[[list[Row]], Iterator[Row]]
) -> Iterator[tuple[Row, Row]]:
    """Yield each scan of a window with its row, in the order they are done.

    Args:
        scans: With `scan_id`.
        execution: Sends scans through the cluster and yields a row, with `scan_id`, for each.

    Raises:
        SgcdError: As raised by a worker that cannot start (a damaged model).
        StorageError: CLUSTER when `FRUITLESS` executions in a row did not bring a single row.
    """
    from ray.exceptions import RayTaskError, UserCodeException

    left = {scan["scan_id"]: scan for scan in scans}
    fruitless = 0
    while left:
        try:
            for row in execution(list(left.values())):
                scan = left.pop(row["scan_id"])  # a second row would be a fault: KeyError
                fruitless = 0
                yield scan, row
            if left:
                raise RuntimeError(f"{len(left)} scans have no row")
        except (SgcdError, RayTaskError, UserCodeException, *OURS):
            raise  # a fault of the worker or of this program: trying again is no help
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


def dataset_of(ray: Any, scans: list[Row]) -> Any:
    """A Ray dataset with a block for each scan: a lost worker costs what it held, no more."""
    return ray.data.from_items([packed(scan) for scan in scans], override_num_blocks=len(scans))


def rows_of(dataset: Any, patience: float) -> Iterator[Row]:
    """Carry out the dataset and yield each packed row as soon as it is there.

    Args:
        dataset: Of packed rows.
        patience: Seconds without any row after which Ray gives the execution up.
    """
    dataset.context.execution_no_progress_timeout_s = patience
    for batch in dataset.iter_batches(batch_size=1, prefetch_batches=0, batch_format="numpy"):
        yield unpacked({"row": batch["row"][0]})


def end_late(note: Callable[[str], None], deadline: float, scan_ids: list[str]) -> None:
    """End this process for scans that hang, and leave a note of each; Ray starts another.

    The store itself may be what hangs, so the note is waited for `NOTE_SECONDS` at most.
    """
    log.error("event=scan_late scans=%s seconds=%g", ",".join(scan_ids), deadline)

    def note_all() -> None:
        for scan_id in scan_ids:
            note(scan_id)

    notes = threading.Thread(target=note_all, daemon=True)
    notes.start()
    notes.join(NOTE_SECONDS)
    os._exit(1)
