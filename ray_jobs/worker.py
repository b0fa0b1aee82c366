"""One process of a Ray Train run: its device, its share of the scans, its checkpoints."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pipelines.lake import Lake
from ray_jobs.checkpoint import Checkpoints
from ray_jobs.session import threads_per_worker
from ray_jobs.watch import LAST_STEPS, last_means
from sgcd_core.config import parse_config
from sgcd_core.errors import ModelError
from sgcd_core.io.store import Store

if TYPE_CHECKING:
    from sgcd_core.modelpack import ModelPack

#: Steps between two reports to Ray Train, which all ranks make together.
REPORT_EVERY = 10


class Worker:
    """What a training loop needs from Ray Train.

    Args:
        setup: As `loop.fit` builds it.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        import torch
        from ray import train
        from ray.train.torch import get_device

        context = train.get_context()
        self.setup = setup
        self.config = parse_config(setup["config"])
        self.lake = Lake(setup["lake"])
        self.rank, self.total = context.get_world_rank(), int(setup["total"])
        self.checkpoints = Checkpoints(setup["folder"])
        self.device = str(get_device())
        self._last: deque[dict[str, float]] = deque(maxlen=LAST_STEPS)
        torch.set_num_threads(threads_per_worker(context.get_local_world_size()))

    def prepare_network(self, network: Any) -> Any:
        """The network on its device, with gradients averaged over the workers."""
        from ray.train.torch import prepare_model

        return prepare_model(network)

    def steps(self, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and columns of every step from `start` on."""
        from ray import train

        if start >= self.total:
            return
        share = train.get_dataset_shard(f"rank-{self.rank}")
        for columns in share.iter_batches(
            batch_size=self.setup["batch"], prefetch_batches=2, batch_format="numpy"
        ):
            step = int(columns["step"][0])
            if step >= start:  # a restarted worker may find steps it has behind it
                yield step, columns

    def after_step(
        self,
        step: int,
        losses: dict[str, float],
        state: Callable[[], dict[str, Any]],
        checkpoint_every: int,
    ) -> None:
        """Show the losses, keep a checkpoint when it is time.

        Raises:
            ModelError: TRAIN-DIVERGED when a loss is not finite.
        """
        from ray import train

        values = {name: float(value) for name, value in losses.items()}
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            raise ModelError(
                f"the loss {wrong[0]!r} is not finite at step {step}.", code="TRAIN-DIVERGED",
                hint="Lower learning_rate, or use precision=fp32, and run again.",
            )  # fmt: skip
        done = step + 1
        self._last.append(values)
        if self.rank == 0:
            self.setup["watch"].put({"step": step, **values})
            if done % checkpoint_every == 0 and done < self.total:
                self.checkpoints.save(done, state())
        if done % REPORT_EVERY == 0 or done == self.total:
            train.report({"step": done, **values})

    def finish(self, pack: Callable[[dict[str, Any]], ModelPack]) -> None:
        """Rank 0 saves the model where the driver said, the losses of its last steps with it."""
        if self.rank != 0:
            return
        from sgcd_core.modelpack import save_modelpack

        meta = dict(self.setup["meta"])
        if self._last:  # a run that was resumed at its very end did no step here
            meta["losses"] = last_means(list(self._last))
        save_modelpack(self.lake.model(meta["name"], meta["version"]), pack(meta), Store())
