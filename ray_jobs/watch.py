"""What driver and workers of a training say to each other while it runs.

Losses come from rank 0, which the driver shows and keeps; the driver's wish to stop goes back with
the answer. An error that another try cannot mend is left here, so that none is made.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from pipelines.progress import Progress
from sgcd_core.errors import SgcdError

#: Steps whose mean stands for the loss at the end of a training.
LAST_STEPS = 20
#: Seconds a step took, and seconds of them that the slowest worker waited for data.
SECONDS, WAIT = "step_seconds", "data_wait_seconds"
#: Seconds from one sign of life of a worker to the next, and without any until none is there.
PULSE, SILENCE = 5.0, 60.0

Losses = dict[str, float]


class Board:
    """State of the actor in the middle; it lives on the driver's node and takes no CPU."""

    def __init__(self) -> None:
        self._items: list[Losses] = []
        self._stop, self._heard = False, -math.inf
        self._error: SgcdError | None = None

    def put(self, items: Sequence[Losses]) -> bool:
        """Add steps; whether the driver wants the workers to stop."""
        self._items += items
        return self._stop

    def take(self) -> list[Losses]:
        """What came since the last call."""
        items, self._items = self._items, []
        return items

    def begin(self) -> SgcdError | None:
        """A worker has started; the error that was left, if there is one."""
        self.pulse()
        return self._error

    def pulse(self) -> None:
        """A worker is there."""
        self._heard = time.monotonic()

    def attended(self) -> bool:
        """Whether there is any worker: there is none while a node is waited for."""
        return time.monotonic() - self._heard < SILENCE

    def stop(self) -> bool:
        """Ask the workers to keep a checkpoint and stop at the end of their step; `attended`."""
        self._stop = True
        return self.attended()

    def fail(self, error: SgcdError | None) -> None:
        """Leave the error that ends the training; None takes it away."""
        self._error = error

    def error(self) -> SgcdError | None:
        """The error that was left."""
        return self._error


@contextlib.contextmanager
def seen_on(board: Any) -> Iterator[None]:
    """While the body runs in a worker, the board is told that it is there."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(PULSE):
            board.pulse.remote()

    threading.Thread(target=tell, name="pulse", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class Watch:
    """Receives the losses of every step while a training runs.

    Attributes:
        board: Handle of the actor; rank 0 puts `{"step": …, loss: value, …}`.
        history: What came, in order of the steps; a step that was done again after a lost worker
            stands there once.
    """

    def __init__(self, label: str, total: int, start: int) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Beside the driver: elsewhere it would go with the first node that is taken away.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
        self._start = start
        self._progress = Progress(label, total, "step")
        self._progress.done = start
        self._by_step: dict[int, Losses] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._receive, daemon=True)

    @property
    def history(self) -> list[Losses]:
        """The losses by step, once each."""
        return [self._by_step[step] for step in sorted(self._by_step)]

    def stop(self) -> bool:
        """See `Board.stop`."""
        return self._asked(self.board.stop)

    def attended(self) -> bool:
        """See `Board.attended`."""
        return self._asked(self.board.attended)

    def _asked(self, question: Any) -> bool:
        import ray
        from ray.exceptions import RayError

        answer = True  # where Ray is gone the training ends by itself
        with contextlib.suppress(RayError):  # where all was told to stop, Ray may be gone
            answer = bool(ray.get(question.remote()))
        return answer

    def error(self) -> SgcdError | None:
        """The error with a code that a worker ended with; it is forgotten here."""
        import ray

        found: SgcdError | None = ray.get(self.board.error.remote())
        ray.get(self.board.fail.remote(None))
        return found

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import ray
        from ray.exceptions import RayError

        self._end.set()
        self._thread.join(timeout=60)
        self._progress.close()
        with contextlib.suppress(RayError):
            ray.kill(self.board)

    def _receive(self) -> None:
        import ray
        from ray.exceptions import RayError

        ended = False
        while not ended:
            ended = self._end.wait(0.5)  # what came before the end is still taken
            try:
                items: list[Losses] = ray.get(self.board.take.remote())
            except RayError:  # the session is closing
                return
            for item in items:
                self._show(item)

    def _show(self, item: Losses) -> None:
        step = int(item["step"])
        new = step >= self._start and step not in self._by_step
        self._by_step[step] = item
        shown = {k: round(v, 4) for k, v in item.items() if k in ("loss", "total")}
        if item.get(SECONDS):
            shown["data_wait"] = round(item[WAIT] / item[SECONDS], 3)
        if step >= self._start:
            self._progress.update(int(new), **shown)


def last_means(history: Sequence[Losses], steps: int = LAST_STEPS) -> Losses:
    """Mean of each loss over the last `steps` steps."""
    tail = history[-steps:]
    names = sorted({name for item in tail for name in item} - {"step", SECONDS, WAIT})
    values = {name: [item[name] for item in tail if name in item] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def data_wait(history: Sequence[Losses]) -> float | None:
    """Part of the steps' time that was spent waiting for data, 0 to 1; None when none was timed.

    The first step after a start is not timed: it waits for the pipeline to fill.
    """
    seconds = sum(item.get(SECONDS, 0.0) for item in history)
    return sum(item.get(WAIT, 0.0) for item in history) / seconds if seconds else None


def in_words(last: Losses, waited: float | None) -> str:
    """How a training ended, for its last line: from `last_means` and `data_wait`."""
    losses = ", ".join(f"{name} {value:.4g}" for name, value in last.items())
    wait = "" if waited is None else f"; {waited:.1%} of a step waits for data"
    return f"({losses}){wait}"


def packed_history(history: Sequence[Losses]) -> dict[str, Any]:
    """`history` as a checkpoint keeps it: names, and float64 (steps, names), NaN where absent."""
    import torch

    names = sorted({name for item in history for name in item})
    rows = [[item.get(name, math.nan) for name in names] for item in history]
    return {"names": names, "values": torch.tensor(rows, dtype=torch.float64)}


def unpacked_history(state: dict[str, Any]) -> list[Losses]:
    """The history again."""
    return [
        {k: v for k, v in zip(state["names"], row, strict=True) if not math.isnan(v)}
        for row in state["values"].tolist()
    ]
