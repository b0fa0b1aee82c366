"""What both training stages share: the schedule, the Ray Train run, a worker's steps.

The schedule names the scans of every step in advance. Rank r of n takes every n-th scan of a
step, so n workers together see at each step what one worker would see.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.lake import Lake
from ray_jobs.checkpoint import Checkpoints
from ray_jobs.volume_stream import Looks, training_stream
from ray_jobs.watch import Watch
from sgcd_core.config import SgcdConfig
from sgcd_core.errors import ConfigError, SgcdError

log = logging.getLogger(__name__)

Row = dict[str, Any]


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


def fit(
    ray: Any, worker: Callable[[dict[str, Any]], None], schedule: list[Row], lake: Lake,
    config: SgcdConfig, checkpoints: Checkpoints, *, looks: Looks, label: str, total: int,
    workers: int, gpus: bool, extra: dict[str, Any],
) -> list[dict[str, float]]:  # fmt: skip
    """Run `worker` on Ray Train from the newest checkpoint to the end of `schedule`.

    Returns:
        The losses of every step that was done here, in order.

    Raises:
        SgcdError: As raised in a worker.
    """
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    batch = len(schedule) // total
    if batch % workers:
        raise ConfigError(
            f"a batch of {batch} volumes cannot be shared by {workers} workers alike.",
            where="batch_size", hint="Choose --workers that divide batch_size.",
        )  # fmt: skip
    start = checkpoints.step()
    rest = [row for row in schedule if row["step"] >= start]
    shares = {
        f"rank-{rank}": training_stream(
            ray,
            [row for i, row in enumerate(rest) if i % batch % workers == rank],
            lake.uri,
            config,
            looks,
        )
        for rank in range(workers)
        if rest
    }
    setup = {
        "config": config.model_dump(mode="json"), "lake": lake.uri, "label": label,
        "folder": checkpoints.folder, "batch": batch // workers, "total": total,
        "workers": workers, **extra,
    }  # fmt: skip
    with (
        tempfile.TemporaryDirectory(prefix="sgcd-train-") as scratch,
        Watch(label, total, start) as watch,
    ):
        setup["watch"] = watch.queue
        trainer = TorchTrainer(
            worker,
            train_loop_config=setup,
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=gpus,
                resources_per_worker={"CPU": 1, "GPU": 1} if gpus else {"CPU": 1},
            ),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            # Each rank reads its own share whole: what is seen at a step depends on no race.
            datasets=shares,
            dataset_config=DataConfig(datasets_to_split=[]),
            run_config=RunConfig(
                name=os.path.basename(scratch), storage_path=scratch,
                failure_config=FailureConfig(max_failures=2),
            ),
        )  # fmt: skip
        try:
            trainer.fit()
        except Exception as error:
            # Ray Train wraps what a worker raised; a user is owed the cause, not the wrapper.
            cause = _cause(error)
            if cause is None:
                raise
            raise cause from error
    return watch.history


def _cause(error: BaseException | None) -> SgcdError | None:
    """The first error with a code that `error` was made from."""
    seen: set[int] = set()
    queue_: list[BaseException | None] = [error]
    while queue_:
        item = queue_.pop(0)
        if item is None or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, SgcdError):
            return item
        queue_ += [getattr(item, "cause", None), item.__cause__, item.__context__]
        failures = getattr(item, "worker_failures", None)
        if isinstance(failures, dict):
            queue_ += list(failures.values())
    return None
