"""One process of a Ray Train run: its device, its share of the scans, its checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pipelines.lake import Lake
from ray_jobs.checkpoint import Checkpoints, Writer
from ray_jobs.models import find_trained
from ray_jobs.session import threads_per_worker
from ray_jobs.watch import SECONDS, WAIT, Losses, last_means, packed_history, unpacked_history
from sgcd_core.config import parse_config
from sgcd_core.errors import ModelError
from sgcd_core.io.store import Store

if TYPE_CHECKING:
    from sgcd_core.modelpack import ModelPack

State = dict[str, Any]

#: Steps between two reports to Ray Train, which all ranks make together.
REPORT_EVERY = 10


class Worker:
    """What a training loop needs from Ray Train.

    Args:
        setup: As `loop.fit` builds it.

    Attributes:
        stopping: The driver asked to stop; the state is kept and no step follows.
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
        self.device = str(get_device())
        self.stopping = False
        self._writer = Writer(Checkpoints(setup["folder"]))
        self._history: list[Losses] = []
        self._answer: Any = None  # of the board, to the step before
        self._noticed: list[str] = []
        self._clock, self._waited = 0.0, math.nan
        torch.set_num_threads(threads_per_worker(context.get_local_world_size()))

    def resume(self, load: Callable[[State], None]) -> int:
        """Hand the newest state to `load`, if there is one; steps it has behind it."""
        done, state = self._writer.checkpoints.load()
        if state is not None:
            load(state["stage"])
            self._history = unpacked_history(state["losses"])
            self._tell(self._history)
        return done

    def prepare_network(self, network: Any) -> Any:
        """The network on its device, with gradients averaged over the workers."""
        from ray.train.torch import prepare_model

        return prepare_model(network)

    def steps(self, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and columns of every step from `start` on, until the end or a stop."""
        from ray import train

        if start >= self.total:
            return
        share = train.get_dataset_shard(f"rank-{self.rank}")
        batches = iter(
            share.iter_batches(
                batch_size=self.setup["batch"], prefetch_batches=2, batch_format="numpy"
            )
        )
        self._clock = time.perf_counter()
        for step in range(start, self.total):
            asked = time.perf_counter()
            columns = next(batches)
            now = time.perf_counter()
            # The first wait is for the pipeline to fill, and belongs to the start.
            self._waited = now - asked if step > start else math.nan
            found = set(columns["step"].tolist())
            if found != {step}:  # a law of this program: the order is what makes runs repeatable
                raise RuntimeError(f"step {step} was given volumes of {sorted(found)}")
            yield step, columns
            if self.stopping:
                return
        if next(batches, None) is not None:
            raise RuntimeError(f"volumes came after step {self.total - 1}, the last")

    def after_step(
        self, step: int, losses: Losses, state: Callable[[], State], checkpoint_every: int
    ) -> None:
        """Show the losses, keep a checkpoint when it is time or when this worker is to go.

        Args:
            step: Number of the step that is done.
            losses: Of this worker's share.
            state: Gives the stage's state.
            checkpoint_every: Steps between two checkpoints.

        Raises:
            ModelError: TRAIN-DIVERGED when a loss is not finite; TRAIN-RANKS.
            StorageError: From a checkpoint that could not be written.
        """
        from ray import train

        done = step + 1
        values = self._over_workers(losses)
        self.stopping = self.stopping and done < self.total
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            raise ModelError(
                f"the loss {wrong[0]!r} is not finite at step {step}.", code="TRAIN-DIVERGED",
                hint="Lower learning_rate, or use precision=fp32, and run again.",
            )  # fmt: skip
        self._history.append({"step": step, **values})
        self._tell(self._history[-1:])
        self._writer.check()
        leaving = self._notice() or self.stopping
        if (done % checkpoint_every == 0 or leaving) and done < self.total:
            self._save(done, state(), leaving)
        if done % REPORT_EVERY == 0 or done == self.total:
            train.report({"step": done, **values})

    def finish(self, pack: Callable[[dict[str, Any]], ModelPack]) -> None:
        """Rank 0 saves the model where the driver said, the losses of its last steps with it.

        Raises:
            BusyError: LAKE-BUSY, another holds the lease of this model.
        """
        self._writer.wait()
        self._asked_to_stop()  # the last step has arrived
        if self.rank != 0 or self.stopping:
            return
        from sgcd_core.modelpack import save_modelpack

        self.setup["hold"].check()
        meta = dict(self.setup["meta"])
        if find_trained(self.lake, meta["name"], meta) == meta["version"]:
            return  # by this worker's predecessor, which was lost before it could say so
        meta["losses"] = last_means(self._history)
        save_modelpack(self.lake.model(meta["name"], meta["version"]), pack(meta), Store())

    def _save(self, done: int, state: State, at_once: bool) -> None:
        """Rank 0 keeps `state`, beside the training or (`at_once`) before it goes on.

        Raises:
            BusyError: LAKE-BUSY, another holds the lease of this model.
        """
        if "record" in state:
            rows = gathered(state["record"]["values"].flatten().tolist(), self.device)
            if bool((rows != rows[0]).any()):
                raise ModelError(
                    "the workers hold different records.", code="TRAIN-RANKS",
                    hint="Run again, and please report it with the logs.",
                )  # fmt: skip
        if self.rank == 0:
            self.setup["hold"].check()
            losses = packed_history(self._history)
            self._writer.save(done, {"stage": state, "losses": losses})
            if at_once:
                self._writer.wait()

    def _over_workers(self, losses: Losses) -> Losses:
        """Means over the workers, the longest wait for data, and whether to stop, for all alike."""
        now = time.perf_counter()
        took, self._clock = now - self._clock, now
        names = sorted(losses)
        mine = [float(losses[name]) for name in names]
        rows = gathered([*mine, self._waited, float(self._asked_to_stop())], self.device)
        values: Losses = dict(zip(names, rows[:, :-2].mean(0).tolist(), strict=True))
        self.stopping = bool(rows[:, -1].any())
        wait = float(rows[:, -2].max())
        if math.isfinite(wait):
            values |= {SECONDS: took, WAIT: wait}
        return values

    def _tell(self, items: list[Losses]) -> None:
        if self.rank == 0:
            self._answer = self.setup["board"].put.remote(items)

    def _asked_to_stop(self) -> bool:
        """What the board answered to the step before: by now it is here and nobody waits."""
        import ray

        return self._answer is not None and bool(ray.get(self._answer))

    def _notice(self) -> bool:
        """Whether Ray has just said that a node of this training will be taken away.

        The state is kept at once and training goes on; when the node is gone Ray Train starts the
        workers again.
        """
        from ray import train

        ask = getattr(train, "get_preemption_info", None)  # Ray 2.59 and later
        if ask is None or not self.setup["notices"]:
            return False
        info = ask()
        if info is None or info.preempted_node_ids == self._noticed:
            return False
        self._noticed = info.preempted_node_ids
        return True


def gathered(values: list[float], device: str) -> Any:
    """`values` of every worker, float64 (workers, values) on the CPU; the same on all of them."""
    import torch
    import torch.distributed as dist

    mine = torch.tensor(values, dtype=torch.float64)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mine[None]
    if dist.get_backend() == "nccl":  # it moves tensors on the GPU only
        mine = mine.to(device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return torch.stack(rows).cpu()
