"""Losses on their way from rank 0 to the driver, which shows them and keeps them."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Self

from pipelines.progress import Progress

#: Steps whose mean stands for the loss at the end of a training.
LAST_STEPS = 20


class Watch:
    """Receives the losses of every step while a training runs.

    Attributes:
        queue: Where rank 0 puts `{"step": …, loss: value, …}`.
        history: What came, in order of the steps; a step that was done again after a lost worker
            stands there once.
    """

    def __init__(self, label: str, total: int, start: int) -> None:
        from ray.util.queue import Queue

        self.queue = Queue(actor_options={"num_cpus": 0})
        self._progress = Progress(label, total, "step")
        self._progress.done = start
        self._by_step: dict[int, dict[str, float]] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._receive, daemon=True)

    @property
    def history(self) -> list[dict[str, float]]:
        """The losses by step, once each."""
        return [self._by_step[step] for step in sorted(self._by_step)]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join(timeout=10)
        self._progress.close()
        self.queue.shutdown(force=True)

    def _receive(self) -> None:
        from ray.exceptions import RayError
        from ray.util.queue import Empty

        while True:
            try:
                item: dict[str, Any] = self.queue.get(timeout=0.5)
            except Empty:
                if self._end.is_set():
                    return
                continue
            except RayError:  # the session is closing
                return
            new = item["step"] not in self._by_step
            self._by_step[item["step"]] = item
            shown = {k: round(v, 4) for k, v in item.items() if k in ("loss", "total")}
            self._progress.update(int(new), **shown)


def last_means(history: list[dict[str, float]], steps: int = LAST_STEPS) -> dict[str, float]:
    """Mean of each loss over the last `steps` steps."""
    tail = history[-steps:]
    names = sorted({name for item in tail for name in item} - {"step"})
    values = {name: [item[name] for item in tail if name in item] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}
