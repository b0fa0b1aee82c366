"""What both training stages share: the schedule, the Ray Train run, a worker's steps.

The schedule names the scans of every step in advance. Rank r of n takes every n-th scan of a
step, so n workers together see at each step what one worker would see.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pipelines.lake import Lake
from pipelines.lease import Hold
from ray_jobs.checkpoint import Checkpoints
from ray_jobs.session import data_settings
from ray_jobs.volume_stream import Looks, training_stream
from ray_jobs.watch import PULSE, Losses, Watch, seen_on
from sgcd_core.config import SgcdConfig
from sgcd_core.errors import ConfigError, SgcdError, StorageError

log = logging.getLogger(__name__)

Row = dict[str, Any]

#: Starts of the workers before a training that gets no further is given up.
TRIES = 3


def schedule_steps(
    groups: Mapping[str, Sequence[Row]], config: SgcdConfig, steps: int, batch: int,
    *, site_balance: bool = True,
) -> list[Row]:  # fmt: skip
    """Rows `{"step", "scans": {role: (scan_id, sequence index, seed, site)}}`, `batch` per step.

    A sample's randomness comes from its seed alone, so it is the same on any worker.

    Args:
        groups: For each role in the stage the rows of `scans` to draw from.
        config: Gives the seed and the order of sequences.
        steps: Number of steps.
        batch: Volumes of each role per step, over all workers.
        site_balance: Every site and sequence equally often.
    """
    from pipelines.training_data import balanced_order
    from sgcd_core.batch import sample_seed

    index = {name: i for i, name in enumerate(config.sequences)}
    orders = {
        name: balanced_order(rows, steps * batch, config.seed + i, site_balance=site_balance)
        for i, (name, rows) in enumerate(sorted(groups.items()))
    }
    return [
        {
            "step": n // batch,
            "scans": {
                role: (
                    order[n]["scan_id"],
                    index[order[n]["sequence"]],
                    sample_seed(config.seed, role, n),
                    order[n]["site"],
                )
                for role, order in orders.items()
            },
        }
        for n in range(steps * batch)
    ]


def check_shares(batch: int, workers: int) -> None:
    """Refuse workers that cannot have the same number of volumes each.

    Raises:
        ConfigError: `batch` is no multiple of `workers`.
    """
    if batch % workers:
        raise ConfigError(
            f"a batch of {batch} volumes cannot be shared by {workers} workers alike.",
            where="batch_size", hint="Choose --workers that divide batch_size.",
        )  # fmt: skip


def fit(
    ray: Any, worker: Callable[[dict[str, Any]], None], schedule: list[Row], lake: Lake,
    config: SgcdConfig, checkpoints: Checkpoints, *, looks: Looks, label: str, total: int,
    workers: int, gpus: bool, hold: Hold, extra: dict[str, Any],
) -> list[Losses]:  # fmt: skip
    """Run `worker` on Ray Train from the newest sound checkpoint to the end of `schedule`.

    Lost workers are replaced. A training is given up when it failed again and again without
    getting any further, or with an error that another try cannot mend. `hold` is looked at before
    each start, before each checkpoint and before the model is written.

    Returns:
        The losses of every step from the first, in order.

    Raises:
        BusyError: LAKE-BUSY, another took the lease over.
        SgcdError: As raised in a worker.
        KeyboardInterrupt: The driver was told to stop; the state of the last step is kept.
    """
    batch = len(schedule) // total
    check_shares(batch, workers)
    shares = {
        f"rank-{rank}": partial(
            share_of, ray, schedule, rank, workers, batch, lake.uri, config, looks, checkpoints
        )
        for rank in range(workers)
    }
    setup = {
        "config": config.model_dump(mode="json"), "lake": lake.uri,
        "folder": checkpoints.folder, "batch": batch // workers, "total": total,
        "hold": hold,
        "notices": os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0", **extra,
    }  # fmt: skip
    done = checkpoints.repair()
    with Watch(label, total, done) as watch:
        setup["board"] = watch.board
        while True:
            hold.check()
            error = _run(worker, setup, shares, workers, gpus, watch)
            if error is None:
                break
            # Ray Train wraps what a worker raised; a user is owed the cause, not the wrapper.
            noted = watch.error()
            cause = coded(error) or (None if _passing(noted) else noted)
            before, done = done, checkpoints.repair()
            if _passing(cause) and done > before:
                log.warning("workers were lost; going on from step %d", done)
            elif cause is None:
                raise error
            else:
                raise cause from error
    return watch.history


def share_of(
    ray: Any, schedule: list[Row], rank: int, workers: int, batch: int, lake_uri: str,
    config: SgcdConfig, looks: Looks, checkpoints: Checkpoints,
) -> Any:  # fmt: skip
    """The volumes of one rank from the newest checkpoint on: every n-th scan of each step."""
    data_settings(ray)  # this runs in Ray Train's controller
    start = checkpoints.step()
    rows = [
        row
        for i, row in enumerate(schedule)
        if row["step"] >= start and i % batch % workers == rank
    ]
    return training_stream(ray, rows, lake_uri, config, looks)


def _run(
    worker: Callable[[dict[str, Any]], None], setup: dict[str, Any], shares: dict[str, Any],
    workers: int, gpus: bool, watch: Watch,
) -> Exception | None:  # fmt: skip
    """One run of Ray Train; the error it ended with."""
    from ray.data import DataContext
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    # Ray Train lays options of its own over those of a data set.
    ingest = copy.deepcopy(DataContext.get_current().execution_options)
    ingest.preserve_order = True
    with tempfile.TemporaryDirectory(prefix="sgcd-train-", ignore_cleanup_errors=True) as scratch:
        trainer = TorchTrainer(
            partial(_guarded, worker),
            train_loop_config=setup,
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=gpus,
                resources_per_worker={"CPU": 1, "GPU": 1} if gpus else {"CPU": 1},
            ),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            # Each rank reads its own share whole: what is seen at a step depends on no race. They
            # are made anew at each start of the workers, from the newest checkpoint on.
            datasets=shares,
            dataset_config=DataConfig(datasets_to_split=[], execution_options=ingest),
            run_config=RunConfig(
                name=os.path.basename(scratch), storage_path=scratch,
                failure_config=FailureConfig(max_failures=TRIES - 1),
            ),
        )  # fmt: skip
        return _fit_beside(trainer, watch)


def _fit_beside(trainer: Any, watch: Watch) -> Exception | None:
    """Run `trainer.fit()` in a thread, so that Ctrl-C and SIGTERM reach this program, not Ray's.

    Raises:
        KeyboardInterrupt: After the workers kept their state; at once when it comes again.
    """
    errors: list[Exception] = []
    # Not the thread is waited for: a `join` that an exception breaks off marks a thread that still
    # runs as ended (CPython up to 3.12), and the workers would be ended before they kept anything.
    ended = threading.Event()

    def run() -> None:
        try:
            trainer.fit()
        except Exception as error:  # handed on, whatever Ray raises
            errors.append(error)
        finally:
            ended.set()

    try:
        threading.Thread(target=run, name="ray-train", daemon=True).start()
        while not ended.wait(0.2):
            pass
    except KeyboardInterrupt:
        if not watch.stop():  # a node is waited for, and that may take for ever
            raise
        print("stopping at the end of this step; again to stop at once", file=sys.stderr)
        while not ended.wait(PULSE):
            if not watch.attended():  # the workers went with their node, and another is waited for
                raise
        for error in errors:  # the state of the last step is not kept then
            log.warning("event=stop_failed error=%s", type(error).__name__, exc_info=error)
        raise
    return errors[0] if errors else None


def _guarded(worker: Callable[[dict[str, Any]], None], setup: dict[str, Any]) -> None:
    """`worker`, which is not tried again after an error that another try cannot mend."""
    import ray

    board = setup["board"]
    known = ray.get(board.begin.remote())
    if known is not None and not _passing(known):
        raise known
    try:
        with seen_on(board):
            worker(setup)
    except Exception as error:  # noted for the driver, then left to Ray Train
        cause = coded(error)
        if cause is not None:
            ray.get(board.fail.remote(cause))
        raise


def _passing(cause: SgcdError | None) -> bool:
    """Whether it may be gone at the next try: a lost process has no code, a store may come back."""
    return cause is None or isinstance(cause, StorageError)


def coded(error: BaseException | None) -> SgcdError | None:
    """The first error with a code that `error` was made from."""
    seen: set[int] = set()
    queue_: list[BaseException | None] = [error]
    while queue_:
        item = queue_.pop(0)
        if item is None or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, SgcdError):
            # What Ray raises for a task is of both classes; the second alone travels well.
            inner = getattr(item, "cause", None)
            return inner if isinstance(inner, SgcdError) else item
        queue_ += [getattr(item, "cause", None), item.__cause__, item.__context__]
        failures = getattr(item, "worker_failures", None)
        if isinstance(failures, dict):
            queue_ += list(failures.values())
    return None
