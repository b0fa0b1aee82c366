"""Progress of a long command: a bar on a terminal, JSON lines anywhere else. Both go to stderr."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

#: Seconds between two JSON lines; a terminal is refreshed by tqdm's own clock.
EVERY_SECONDS = 5.0


class Progress:
    """Counts units of work and says how fast they go and how long the rest takes.

    Args:
        label: What is being done, one word or two.
        total: Units to do; None when it is not known.
        unit: Name of a unit.
        stream: Where to write; stderr unless told.
    """

    def __init__(
        self, label: str, total: int | None, unit: str = "scan", stream: TextIO | None = None
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._stream = stream if stream is not None else sys.stderr
        self._started = self._spoke = time.monotonic()
        self._fields: dict[str, Any] = {}
        self._bar: Any = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=label, unit=f" {unit}", file=self._stream, dynamic_ncols=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def update(self, units: int = 1, **fields: Any) -> None:
        """`units` more are done; `fields` (a loss, a count of failures) are shown beside."""
        self.done += units
        self._fields.update(fields)
        if self._bar is not None:
            if fields:
                self._bar.set_postfix(self._fields, refresh=False)
            self._bar.update(units)
        elif time.monotonic() - self._spoke >= EVERY_SECONDS:
            self._line("progress")

    def reach(self, done: int, total: int | None = None) -> None:
        """`done` units of `total` are behind us, whatever was said before."""
        if total is not None and total != self.total:
            self.total = total
            if self._bar is not None:
                self._bar.total = total
        self.update(done - self.done)

    def close(self) -> None:
        """Show the last state."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._line("done")

    def _line(self, event: str) -> None:
        self._spoke = time.monotonic()
        seconds = self._spoke - self._started
        rate = self.done / seconds if seconds > 0 else 0.0
        left = None
        if self.total is not None and rate > 0:
            left = round((self.total - self.done) / rate, 1)
        line = {
            "event": event, "label": self.label, "done": self.done, "total": self.total,
            "unit": self.unit, "per_second": round(rate, 3), "seconds": round(seconds, 1),
            "seconds_left": left, **self._fields,
        }  # fmt: skip
        print(json.dumps(line, default=str), file=self._stream, flush=True)
